"""What a run writes: files that are whole or absent, rows of JSON and Parquet that any reader accepts, and no secrets."""

import codecs
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from align.errors import UserError

TEMPORARY_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends without an exception; otherwise `path` stays as it was.

    The parent directory is created if needed. Raises OSError as the file system does.
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
    """A directory that replaces `path`, with all its files synced to disk, when the block ends without an exception.

    Otherwise it is removed and `path` stays as it was. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, earlier = _hidden(path), _hidden(path)
    temporary.mkdir()
    try:
        yield temporary
        for below in temporary.rglob("*"):
            if not below.is_dir():
                synced_size(below)
        for directory in [temporary, *(below for below in temporary.rglob("*") if below.is_dir())]:
            sync_directory(directory)
        # Moved away and not yet removed, so that there is never none of the two for longer than between two renames.
        with suppress(FileNotFoundError):
            path.rename(earlier)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if earlier.exists() and not path.exists():
            earlier.rename(path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
    sync_directory(path.parent)


def refuse_existing(out: Path) -> None:
    """Raise UserError where what a command is to write is there already, or cannot be written."""
    if out.exists():
        raise UserError(f"{out} exists already; name another one, or take it away")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Raise UserError where a file or directory of this path cannot be made, or not be replaced as a whole."""
    if out.is_mount():
        raise UserError(f"{out} is where a file system is mounted, and cannot be replaced: name a directory inside it")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{out} cannot be written: {place} is not a directory that you may write to; name another one")


def remove_whole(directory: Path) -> None:
    """Remove a directory atomically: no reader ever sees part of it."""
    hidden = _hidden(directory)
    directory.rename(hidden)
    shutil.rmtree(hidden)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8); readers see either the old content or the new, also after a crash."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def synced_size(path: Path) -> int:
    """Sync a file to disk and return its size in bytes; 0 if it does not exist."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def cut(path: Path, size: int) -> None:
    """Truncate a file to its first `size` bytes. Raises UserError if it has fewer."""
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
    """Sync the names in a directory to disk."""
    # Some network file systems cannot sync a directory; the rename itself has already succeeded.
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_samples(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace `path` by a Parquet table with a column for each key that any row has; absent values are null, and so are objects without a key in any row.

    Token ids go in as lists of int, log-probabilities as lists of float (kept as float64), texts as str.
    Raises pyarrow.ArrowInvalid when one column mixes types.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    # Parquet has no structs without fields.
    table = pa.table(
        {n: pa.nulls(len(c)) if pa.types.is_struct(c.type) and not len(c.type) else c for n, c in columns.items()}
    )
    with atomic_file(path) as file:
        pq.write_table(table, file)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_samples` wrote. Raises UserError when `path` is missing or no Parquet table."""
    rows: list[dict[str, Any]] = read_parquet(path, cure=": give a file that a run wrote into its samples/").to_pylist()
    return rows


def read_parquet(path: Path, columns: Iterable[str] | None = None, cure: str = "") -> Any:
    """The pyarrow table of a Parquet file, of those of `columns` that it has, in their order; of all where none are given.

    Raises UserError, which ends with `cure`, when `path` is missing or no Parquet table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            return file.read(columns=None if columns is None else [name for name in columns if name in names])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist{cure}") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}{cure}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines (UTF-8); blank lines are skipped.

    Raises UserError with the file, and the line counted from 1, when a line is no object of JSON.
    """
    return [row for _, row in read_jsonl_lines(path)]


def read_jsonl_lines(path: Path, cut_off: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of `read_jsonl`, each with its line counted from 1, one at a time.

    With a list `cut_off`, a last line that was cut off while it was written is skipped, and the list gets a remark on it.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not content.strip():
                    continue
                try:
                    row = parse_json_line(content, f"{path}, line {number}")
                except UserError:
                    if cut_off is None or line.endswith(b"\n"):
                        raise
                    cut_off.append(f"{path.name}, line {number}: cut off while it was written, and skipped here")
                    return
                yield number, row
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by one line of JSON for each row; see `json_line` for the types it takes."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json_line(row).encode() + b"\n")


def parse_json_line(line: bytes, where: str) -> dict[str, Any]:
    """The object of a line of JSON in UTF-8. Raises UserError, which begins with `where`, for anything else."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8. Save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg}, column {error.colno}). Each line must be one JSON object"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists in lists in lists
        raise UserError(f"{where}: JSON that cannot be read: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, where each line must be one JSON object")
    return row


SECRET_NAME = re.compile(r"(^|[._-])(token|secret|password|passwd|credentials?|api[_-]?key|access[_-]?key)$", re.I)
SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY)$", re.I)
SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)\w{8,}|(?<=://)[^/@\s]+@")
SHORTEST = 8
"""A shorter value of a variable is no secret, or it would blot out words."""


def redacted(text: str) -> str:
    """`text` with *** for well-known forms of tokens and for the values of environment variables named like a secret."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return SECRET_VALUE.sub("***", text)


def without_secrets_in(value: Any) -> Any:
    """`value`, made of mappings and lists, with *** for the texts of keys named like a secret and for what `redacted` finds in texts."""
    match value:
        case Mapping():
            return {
                key: "***"
                if item and isinstance(item, str) and SECRET_NAME.search(str(key))
                else without_secrets_in(item)
                for key, item in value.items()
            }
        case list() | tuple():
            return [without_secrets_in(item) for item in value]
        case str():
            return redacted(value)
    return value


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """`arguments` with *** for the values of keys named like a secret and for well-known forms of tokens."""
    shown = []
    hide_next = False
    for argument in arguments:
        key, equals, value = argument.partition("=")
        secret = SECRET_NAME.search(key) is not None
        if hide_next and not argument.startswith("-"):
            shown.append("***")
        elif secret and equals and value:
            shown.append(f"{key}=***")
        else:
            shown.append(SECRET_VALUE.sub("***", argument))
        hide_next = secret and not equals and argument.startswith("-")
    return shown
