"""Files that are either whole or absent, and JSON that any reader accepts."""

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from align.errors import UserError

TEMPORARY_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it raises.

    Makes the directory of `path`. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory that takes the place of `path` when the block ends well, with all its files on the disk, else vanishes.

    Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path)
    temporary.mkdir()
    try:
        yield temporary
        for below in temporary.rglob("*"):
            if not below.is_dir():
                synced_size(below)
        for directory in [temporary, *(below for below in temporary.rglob("*") if below.is_dir())]:
            sync_directory(directory)
        if path.exists():
            remove_whole(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def remove_whole(directory: Path) -> None:
    """Remove a directory that nobody then sees in part."""
    hidden = _hidden(directory)
    directory.rename(hidden)
    shutil.rmtree(hidden)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8); a reader or a crash finds all of the old or of the new."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def synced_size(path: Path) -> int:
    """The bytes of a file, once they are on the disk; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def cut(path: Path, size: int) -> None:
    """Cut a file off behind its first `size` bytes. Raises UserError where it has fewer."""
    there = path.stat().st_size if path.exists() else 0
    if there < size:
        raise UserError(
            f"{path} has {there} bytes and had {size} when the checkpoint was written: put the file back as it was, or start "
            "the run again with run.overwrite=true"
        )
    if there > size:
        os.truncate(path, size)


def json_line(record: Mapping[str, Any]) -> str:
    """`record` as one line of JSON, without the line break.

    NaN and infinities, which JSON lacks, become the strings "nan", "inf", "-inf"; NumPy and PyTorch scalars
    become numbers and paths become strings. Raises TypeError for any other type that JSON lacks.
    """
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    match value:
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Path():
            return str(value)
    if getattr(value, "shape", None) == ():
        return _plain(value.item())
    return value


def sync_directory(directory: Path) -> None:
    """Bring a directory's names to the disk."""
    # Some network file systems cannot sync a directory; the rename itself has already succeeded.
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
