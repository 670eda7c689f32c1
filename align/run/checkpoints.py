"""Training checkpoints on disk: each is complete or absent, and is verified against its SHA-256 before it is read.

A checkpoint is a directory `step_00050` whose manifest holds the size and the SHA-256 of every other file in it, and its own SHA-256.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from align.run.files import TEMPORARY_SUFFIX, remove_whole, whole_directory

FORMAT = 1
MANIFEST = "manifest.json"
PREFIX = "step_"
DAMAGED_SUFFIX = ".damaged"

Entry = dict[str, Any]
"""What the manifest records of a file: its size as `bytes` and its `sha256`."""


class DamagedCheckpointError(Exception):
    """A checkpoint differs from what was written; the message says where."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint; `facts` is what its writer recorded beside the files."""

    path: Path
    step: int
    facts: Mapping[str, Any]


class CheckpointDirectory:
    """The checkpoints of a run: the newest `keep` are kept, and the best one. Only one process writes them."""

    def __init__(self, path: Path, *, keep: int = 2) -> None:
        self._path, self._keep = path, keep

    def write(
        self,
        step: int,
        facts: Mapping[str, Any],
        fill: Callable[[Path], Mapping[str, Entry]],
        *,
        best: int | None = None,
    ) -> Path:
        """Write a checkpoint: `fill` writes its files into the directory that it is given and returns their entries.

        Once it is complete, older checkpoints are removed except that of step `best`. Raises what `fill` raises, and OSError; no partial
        checkpoint is left then.
        """
        final = self._path / f"{PREFIX}{step:05d}"
        with whole_directory(final) as temporary:
            files = dict(fill(temporary))
            record = {"format": FORMAT, "step": step, "facts": dict(facts), "files": files}
            text = json.dumps(record | {"sha256": _digest(record)}, indent=1, ensure_ascii=False)
            (temporary / MANIFEST).write_text(text, encoding="utf-8")
        steps = self._steps()
        for old in sorted(steps, reverse=True)[self._keep :]:
            if old != best:
                remove_whole(steps[old])
        return final

    def newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None if there are no checkpoints at all.

        A damaged one is passed to `report` and renamed. Raises DamagedCheckpointError if all are damaged.
        """
        found = self._steps()
        for step in sorted(found, reverse=True):
            try:
                return verify(found[step])
            except DamagedCheckpointError as error:
                report(f"checkpoint {found[step]} is damaged: {error}")
                found[step].rename(_free(found[step].with_name(found[step].name + DAMAGED_SUFFIX)))
        if found or any(self._path.glob(f"*{DAMAGED_SUFFIX}*")):
            raise DamagedCheckpointError(f"no checkpoint in {self._path} is whole")
        return None

    @property
    def last_step(self) -> int:
        """The step of the last checkpoint, whole or not; 0 where there is none."""
        return max(self._steps(), default=0)

    def sweep(self) -> None:
        """Remove partly written or partly removed checkpoints that a killed process left behind."""
        for rest in self._path.glob(f".*{TEMPORARY_SUFFIX}"):
            shutil.rmtree(rest)

    def clear(self) -> None:
        """Remove all checkpoints, for a run that starts from the beginning."""
        if self._path.exists():
            remove_whole(self._path)

    def _steps(self) -> dict[int, Path]:
        names = [(path.name.removeprefix(PREFIX), path) for path in self._path.glob(f"{PREFIX}*")]
        return {int(number): path for number, path in names if number.isdecimal()}


def verify(path: Path) -> Checkpoint:
    """Verify the checkpoint in `path` without loading it. Raises DamagedCheckpointError if any bit differs from what was written."""
    try:
        record = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        said = record.pop("sha256")
        files, step = record["files"], record["step"]
        if record["format"] != FORMAT:
            raise DamagedCheckpointError(f"it has format {record['format']}, and this version reads {FORMAT}")
        if said != _digest(record):
            raise DamagedCheckpointError(f"{MANIFEST} was changed")
        if path.name != f"{PREFIX}{step:05d}":
            raise DamagedCheckpointError(f"it is of step {step}")
        _compare(path, files)
    except OSError as error:
        raise DamagedCheckpointError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamagedCheckpointError(f"{MANIFEST} is not a manifest") from None
    return Checkpoint(path, step, record["facts"])


@contextmanager
def hashed_file(path: Path) -> Iterator[tuple[BinaryIO, Entry]]:
    """A new file and its manifest entry. When the block ends, the file is synced to disk and the entry is filled in."""
    entry: Entry = {}
    with path.open("xb") as file:
        writer = _Hashing(file)
        try:
            yield writer, entry  # type: ignore[misc]
        except RuntimeError:
            # What PyTorch makes of an exception in the file that it writes to.
            raise writer.error or RuntimeError(f"{path} could not be written") from None
        file.flush()
        os.fsync(file.fileno())
    entry |= {"bytes": writer.bytes, "sha256": writer.hash.hexdigest()}


def hash_files(directory: Path, below: str) -> dict[str, Entry]:
    """The manifest entries of the files in `directory / below`, keyed by their path relative to `directory`."""
    files = [directory / below / name for name in sorted(_files(directory / below))]
    return {str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": _hash(file)} for file in files}


class _Hashing:
    """A file opened for sequential writing that computes the SHA-256 of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash, self.bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        self._file.flush()


def _free(path: Path) -> Path:
    """`path`, or a similar name that is not taken yet."""
    return path if not path.exists() else path.with_name(f"{path.name}-{secrets.token_hex(4)}")


def _compare(path: Path, files: Mapping[str, Entry]) -> None:
    there = _files(path)
    if missing := sorted(files.keys() - there.keys()):
        raise DamagedCheckpointError(f"{missing[0]} is missing")
    if extra := sorted(there.keys() - files.keys() - {MANIFEST}):
        raise DamagedCheckpointError(f"{extra[0]} was added")
    for name, entry in files.items():
        if there[name].is_symlink() or there[name].stat().st_size != entry["bytes"]:
            raise DamagedCheckpointError(f"{name} does not have its {entry['bytes']} bytes")
    with ThreadPoolExecutor(max_workers=8) as pool:
        for name, found in zip(files, pool.map(_hash, (there[name] for name in files)), strict=True):
            if found != files[name]["sha256"]:
                raise DamagedCheckpointError(f"{name} was changed")


def _files(directory: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(directory)): path
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
