"""What the control groups of Linux, hence containers and batch systems, grant to this process."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """`None` where nothing limits. Memory in bytes; page cache that can be dropped counts as available."""

    cores: float | None = None
    memory: int | None = None
    memory_available: int | None = None


def cgroup_limits(root: Path = Path("/")) -> Limits:
    """The tightest limits among the process's control groups and their ancestors, of version 1 and 2.

    `root` is where the file system begins, so that another machine can be described to it.
    """
    cores: list[float] = []
    memory: list[int] = []
    available: list[int] = []
    for directory in _directories(root, "cpu"):
        granted = _cores(directory)
        if granted is not None:
            cores.append(granted)
    for directory in _directories(root, "memory"):
        limit = _number(directory, "memory.max", "memory.limit_in_bytes")
        if limit is not None:
            used = _number(directory, "memory.current", "memory.usage_in_bytes") or 0
            memory.append(limit)
            available.append(max(0, limit - max(0, used - _droppable(directory))))
    return Limits(min(cores, default=None), min(memory, default=None), min(available, default=None))


def _directories(root: Path, controller: str) -> Iterator[Path]:
    """The process's group for `controller`, then its ancestors up to the mount."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the path may be the host's and missing here: then the ancestors that exist count.
        inside = Path(group.strip("/"))
        for part in (inside, *inside.parents) if inside.parts else (inside,):
            yield mount / part


def _cores(directory: Path) -> float | None:
    quota, _, period = _read(directory / "cpu.max").partition(" ")
    if not quota:
        quota = _read(directory / "cpu.cfs_quota_us")
        period = _read(directory / "cpu.cfs_period_us")
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None


def _droppable(directory: Path) -> int:
    counters = dict(line.split(" ", 1) for line in _read(directory / "memory.stat").splitlines() if " " in line)
    return int(counters.get("total_inactive_file", counters.get("inactive_file", "0")))


def _number(directory: Path, *names: str) -> int | None:
    for name in names:
        text = _read(directory / name)
        if text.isdigit():
            return int(text)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
