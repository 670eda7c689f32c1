"""The layout of a run on disk, and the lock by which one process owns it."""

import fcntl
import json
import os
import shutil
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from align.errors import UserError
from align.run.files import TEMPORARY_SUFFIX, redacted, write_atomically

State = Literal["running", "finished", "paused", "failed", "interrupted"]

STATES: tuple[State, ...] = ("running", "finished", "paused", "failed", "interrupted")
STATUS_KEYS = ("state", "stage", "started", "ended", "error")
LOCK = "run.lock"
STATUS = "status.json"


class _Inside:
    """An attribute that is the path of something in the run directory, by its name there."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, run: "RunDirectory", _: type | None = None) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. `RunDirectory(path)` only names them; `create` makes the run and owns it.

    The owner holds the lock until it says how the run ended, or for as long as this object lives. It does not
    travel to other processes: give them `path`.
    """

    path: Path
    lock: BinaryIO | None = field(default=None, repr=False, compare=False)

    lock_file = _Inside(LOCK)
    status_file = _Inside(STATUS)
    recipe_file = _Inside("recipe.yaml")
    environment_file = _Inside("environment.json")
    metrics_file = _Inside("metrics.jsonl")
    events_file = _Inside("events.jsonl")
    evaluations_file = _Inside("evaluations.jsonl")
    log_file = _Inside("log.txt")
    tensorboard_directory = _Inside("tensorboard")
    trackers_directory = _Inside("trackers")
    """What other trackers have of the run, and their local files."""
    samples_directory = _Inside("samples")
    stacks_directory = _Inside("stacks")
    evaluations_directory = _Inside("evaluations")
    scores_directory = _Inside("scores")
    """What `align score` and `align eval` wrote of the run afterwards."""
    checkpoints_directory = _Inside("checkpoints")
    initial_directory = _Inside("initial")
    """A policy drawn at random for this run, before any training."""
    final_directory = _Inside("final")
    lengthened_file = _Inside("lengthened.json")
    """How long the logs of a finished run were when it was made longer, and at which step that was."""
    weights_directory = _Inside("weights")
    """New weights on their way to the rollout workers, where they travel as files."""

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> Self:
        """Make a new run in `path` and own it; with `overwrite`, in the place of an earlier run.

        Raises UserError when another process owns the run; when `path` holds a run and `overwrite` is false;
        when it holds files that no run wrote; or when it cannot be written. What was there is then untouched.
        """
        return cls._own(path, earlier_run="replace" if overwrite else "refuse")

    @classmethod
    def reopen(cls, path: str | Path) -> Self:
        """Own the run in `path` again with all that it holds, or make a new one. Raises UserError as `create` does."""
        return cls._own(path, earlier_run="keep")

    @classmethod
    def _own(cls, path: str | Path, *, earlier_run: Literal["refuse", "replace", "keep"]) -> Self:
        root = Path(path).expanduser().absolute()
        if any(part.startswith("_ray_pkg_") for part in root.parts):
            raise UserError(
                f"{root} is inside the copy of the working directory that Ray made for this job. Ray may remove it, and the next job gets another: "
                "give run.dir a whole path on storage that stays"
            )
        with ExitStack() as undo:
            try:
                # A run that goes on leaves the files of others where they are.
                if earlier_run != "keep" or read_status(root) is None:
                    _refuse_foreign_files(root)
                _make_directories(root, undo)
                lock = _acquire(root, undo)
                earlier = read_status(root)
                if earlier_run != "keep" or earlier is None:
                    _refuse_foreign_files(root)
                if earlier is not None and earlier_run == "refuse":
                    raise UserError(_holds_a_run(root, earlier))
                if earlier is None or earlier_run != "keep":
                    _remove_run(root)
                    earlier = {}
                run = cls(root, lock)
                kept = {key: earlier[key] for key in ("started", "checkpoint") if key in earlier}
                run._write_status({"state": "running", "started": _now()} | kept)
            except OSError as error:
                raise UserError(
                    f"cannot write the run directory {root}: {error.strerror or error}. Choose another with run.dir=…"
                ) from error
            undo.pop_all()
        return run

    def samples_file(self, step: int) -> Path:
        return self.samples_directory / f"step_{step:05d}.parquet"

    def save_recipe(self, text: str) -> None:
        write_atomically(self.recipe_file, text)

    def save_environment(self, record: dict[str, Any]) -> None:
        write_atomically(self.environment_file, _json(record))

    def save_stacks(self, stacks: str) -> str | None:
        """Keep what threads were doing when something took too long, or failed.

        Returns the path of the file in the run, or None for empty `stacks`.
        """
        if not stacks:
            return None
        self.stacks_directory.mkdir(exist_ok=True)
        file = self.stacks_directory / f"{len(list(self.stacks_directory.iterdir())) + 1:03d}.txt"
        file.write_text(redacted(stacks), encoding="utf-8")
        return str(file.relative_to(self.path))

    def enter(self, stage: str) -> None:
        """Note in status.json which stage is running."""
        self._write_status((read_status(self.path) or {}) | {"stage": stage})

    def note_checkpoint(self, step: int | None) -> None:
        """Note in status.json of which step the newest checkpoint is; None: there is none, and there need be none."""
        self._write_status((read_status(self.path) or {}) | {"checkpoint": step})

    def finish(self) -> None:
        self._end("finished")

    def pause(self) -> None:
        """Mark the run as paused: the stages that were asked for are done, and others remain."""
        self._end("paused")

    def fail(self, error: BaseException | str) -> None:
        self._end("failed", error=redacted(error if isinstance(error, str) else f"{type(error).__name__}: {error}"))

    def interrupt(self) -> None:
        self._end("interrupted")

    @property
    def has_metrics(self) -> bool:
        """Whether the run or a stage inside it has written metrics."""
        return any(file.stat().st_size > 0 for file in self.path.rglob("metrics.jsonl"))

    def discard(self) -> None:
        """Remove the run's files and release the directory for another run."""
        _remove_run(self.path)
        self.status_file.unlink(missing_ok=True)
        self.lock_file.unlink(missing_ok=True)
        if self.lock is not None:
            self.lock.close()
        _remove_if_empty(self.path)

    def _end(self, state: State, error: str | None = None) -> None:
        try:
            before = read_status(self.path) or {}
            self._write_status(before | {"state": state, "ended": _now(), "error": error})
        finally:
            if self.lock is not None:
                self.lock.close()

    def _write_status(self, status: dict[str, Any]) -> None:
        write_atomically(self.status_file, _json(dict.fromkeys(STATUS_KEYS) | status))


LAYOUT = frozenset(
    {entry.name for entry in vars(RunDirectory).values() if isinstance(entry, _Inside)} | {"report.html", "report.md"}
)
"""Everything that a run has in its directory, but for the stages inside it."""


def read_status(path: Path) -> dict[str, Any] | None:
    """The status of the run in `path`, or None when `path` holds no run of ours."""
    try:
        status = json.loads((path / STATUS).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    ours = isinstance(status, dict) and status.keys() >= set(STATUS_KEYS) and status["state"] in STATES
    return status if ours else None


def _refuse_foreign_files(root: Path) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise UserError(f"{root} is a file, so no run can be made there. Choose a directory with run.dir=…")
    if read_status(root) is None:
        belongs, complaint = _is_residue, "is not empty and holds no run"
    else:
        belongs, complaint = _is_ours, "holds a run and also files that no run wrote"
    foreign = sorted(entry.name for entry in root.iterdir() if not belongs(entry))
    if foreign:
        named = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise UserError(
            f"{root} {complaint} ({named}). Nothing there was changed: "
            "choose another directory with run.dir=…, or move those files away"
        )


def _is_residue(entry: Path) -> bool:
    """Whether `entry` can be left over from a crash between locking the directory and writing its status."""
    return entry.name == LOCK or (entry.name.startswith(".") and entry.name.endswith(TEMPORARY_SUFFIX))


def _is_ours(entry: Path) -> bool:
    return entry.name in LAYOUT or _is_residue(entry) or read_status(entry) is not None


def _make_directories(root: Path, undo: ExitStack) -> None:
    missing = [directory for directory in (root, *root.parents) if not directory.exists()]
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        undo.callback(_remove_if_empty, directory)


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def _acquire(root: Path, undo: ExitStack) -> BinaryIO:
    """The locked run.lock of `root`, which `undo` releases, and removes if it was made here."""
    path = root / LOCK
    while True:
        try:
            lock, fresh = path.open("x+b", buffering=0), True
        except FileExistsError:
            try:
                lock, fresh = path.open("r+b", buffering=0), False
            except FileNotFoundError:
                continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = lock.read(200).decode(errors="replace").strip()
            lock.close()
            raise UserError(_is_owned(root, owner)) from None
        except OSError as error:
            lock.close()
            if fresh:
                path.unlink(missing_ok=True)
            raise OSError(error.errno, f"its file system cannot lock files ({error.strerror})") from error
        if os.fstat(lock.fileno()).st_nlink > 0:
            break
        # Its maker gave up and removed the file while we were opening it.
        lock.close()
    undo.callback(lock.close)
    if fresh:
        undo.callback(path.unlink, missing_ok=True)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def _remove_run(root: Path) -> None:
    """Remove the run in `root` except its lock and its status: a removal cut short still looks like a run."""
    with ExitStack() as children:
        _acquire_children(root, children)
        for entry in root.iterdir():
            if entry.name in (LOCK, STATUS):
                continue
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
            else:
                shutil.rmtree(entry)


def _acquire_children(root: Path, undo: ExitStack) -> None:
    for entry in root.iterdir():
        if entry.name not in LAYOUT and entry.is_dir():
            _refuse_foreign_files(entry)
            _acquire(entry, undo)
            _acquire_children(entry, undo)


def _is_owned(root: Path, owner: str) -> str:
    status = read_status(root)
    since = f", running since {status['started']}" if status and status["started"] else ""
    return (
        f"{root} is in use by {owner or 'another process'}{since}. "
        "Wait for it or stop it, or choose another directory with run.dir=…"
    )


def _holds_a_run(root: Path, status: dict[str, Any]) -> str:
    # We hold the lock, so a run that still calls itself running was killed.
    state = "interrupted (its process is gone)" if status["state"] == "running" else status["state"]
    stage = f" in stage {status['stage']}" if status["stage"] and status["state"] != "finished" else ""
    return (
        f"{root} already holds a run, {state}{stage}, started {status['started']}. "
        "Choose another directory with run.dir=…, or replace it with run.overwrite=true"
    )


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
