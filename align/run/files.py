"""Files that are either whole or absent, and JSON that any reader accepts."""

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it raises.

    Makes the directory of `path`. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8); a reader or a crash finds all of the old or of the new."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


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


def _sync_directory(directory: Path) -> None:
    # Some network file systems cannot sync a directory; the rename itself has already succeeded.
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
