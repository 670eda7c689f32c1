"""Rows of files as people have them: JSON lines, JSON arrays, Parquet, CSV and TSV, also in .gz and .zst, several by a pattern.

A row that cannot be read is handed on as the UserError that says so, with file and line, for the caller to raise or to count; a file
that cannot be read is raised.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, time, timedelta
from decimal import Decimal
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from align.data.rows import Row
from align.errors import UserError
from align.run.files import parse_json_line
from reward.rows import DOMAINS, PROMPTS, TRUTHS

JSON, TABLES = (".jsonl", ".json", ".ndjson"), {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*JSON, ".parquet", *TABLES)
COMPRESSED = (".gz", ".zst")
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Where JSON may write half of a surrogate pair."""
NOT_IN_JSON = re.compile(r"date|time|duration|decimal|binary")
"""Parquet's types of values that JSON has no form for; a field of an object may be called so too."""
OBJECTS = {*PROMPTS, "conversations", "completion", "response", "chosen", "rejected", "tools"}
"""Columns of messages, and of tools."""
TEXTS = {*OBJECTS, *TRUTHS, *DOMAINS}
"""Columns that are read, and not only handed on to rewards."""
KNOWN = f"{', '.join(SUFFIXES)}, also with {' or '.join(COMPRESSED)} behind it"
ROWS_READ: ContextVar[int | None] = ContextVar("ROWS_READ", default=None)
"""So many rows of a file are read, the first; None for all. `first_rows` sets it."""


def files_of(pattern: str | Path) -> list[Path]:
    """The files that a path or a pattern such as `data/*.jsonl` names, in the order of their names.

    Raises UserError where there is none, and for a suffix that is not known.
    """
    path = Path(pattern).expanduser()
    files = [path] if path.is_file() else sorted(Path(found) for found in glob(str(path), recursive=True))
    files = [file for file in files if file.is_file()]
    if not files and has_magic(str(path)):
        raise UserError(f"{pattern}: no file has a name of this pattern")
    if not files:
        raise UserError(
            f"{pattern} {'is a directory' if path.is_dir() else 'does not exist'}: give a file or a pattern"
        )
    for file in files:
        suffix_of(file)
    return files


def suffix_of(path: Path) -> str:
    """The suffix that says how a file is read, without that of its compression. Raises UserError where it is not known."""
    suffix = (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: the name says nothing of what is in it: it must end in one of {KNOWN}")
    return suffix


def stem_of(path: Path) -> str:
    """The name of a file without its suffixes, such as "chat" of "chat.jsonl.gz"."""
    path = path.with_suffix("") if path.suffix in COMPRESSED else path
    return path.with_suffix("").name


@contextmanager
def first_rows(count: int | None) -> Iterator[None]:
    """Inside, files end after `count` rows each, to look at data without reading all of them; None for all."""
    token = ROWS_READ.set(count)
    try:
        yield
    finally:
        ROWS_READ.reset(token)


def read_rows(path: Path) -> Iterator[Row | UserError]:
    """The rows of a file, in their order. Raises UserError where the file cannot be read."""
    return islice(_rows(path), ROWS_READ.get())


def _rows(path: Path) -> Iterator[Row | UserError]:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    with _opened(path) as file:
        yield from _json(file, path) if suffix in JSON else _table(file, path, TABLES[suffix])


def readable(path: Path) -> Iterator[Row]:
    """The rows of a file. Raises UserError for the first that cannot be read."""
    for row in read_rows(path):
        if isinstance(row, UserError):
            raise row
        yield row


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    try:
        if path.suffix in COMPRESSED and path.stat().st_size == 0:
            raise UserError(f"{path} is empty: it has no bytes")
        with _unpacked(path) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is cut off or damaged ({error}): copy or download it again") from None
    except OSError as error:
        if path.suffix in COMPRESSED and error.errno is None:
            raise UserError(f"{path} is cut off or damaged ({error}): copy or download it again") from None
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _unpacked(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _json(file: BinaryIO, path: Path) -> Iterator[Row | UserError]:
    """Rows of JSON lines, or of one list of objects where that is what the file begins with."""
    first, end, packed = True, 0, path.suffix in COMPRESSED
    for number, line in enumerate(file, start=1):
        start, end = end, end + len(line)
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not content.strip():
            continue
        if first and content.lstrip().startswith(b"["):
            yield from _array(content + file.read(), path, number)
            return
        if first and path.suffixes[:1] != [".jsonl"] and content.strip() == b"{":
            raise UserError(
                f"{path} is one JSON object over several lines: give a list of objects, or one object a line"
            )
        first = False
        where = f"{path}, line {number}"
        try:
            values = parse_json_line(content, where)
            if HALF.search(content):
                refuse_half_characters(values, where)
            yield Row(values, where, None if packed else (start, len(line), number))
        except UserError as error:
            yield error


def refuse_half_characters(values: dict[str, Any], where: str) -> None:
    """Raise UserError for a column with half of a surrogate pair, which JSON can write and no file of ours holds."""
    for name, value in values.items():
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            character = f"character {error.start + 1}" if isinstance(value, str) else "a character in it"
            raise UserError(f"{where}: column {name!r}: {character} is half of a surrogate pair") from None


def _array(content: bytes, path: Path, first_line: int) -> Iterator[Row | UserError]:
    try:
        rows = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}). Save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise UserError(
            f"{path}, line {line}: not JSON ({error.msg}, column {error.colno}). A file that begins with [ must be one list of objects"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: JSON that cannot be read: {error}") from None
    has_halves = HALF.search(content) is not None
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        try:
            if not isinstance(row, dict):
                raise UserError(f"{where}: a JSON {type(row).__name__}, where each row must be an object")
            if has_halves:
                refuse_half_characters(row, where)
            yield Row(row, where)
        except UserError as error:
            yield error


def _table(file: BinaryIO, path: Path, delimiter: str) -> Iterator[Row | UserError]:
    """Rows of a table of text, whose first line has the names of the columns; every value is text."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    before = 0
    try:
        header = next((row for row in reader if row), [])
        if len(set(header)) < len(header) or not all(header):
            raise UserError(
                f"{path}, line {reader.line_num}: each column must have a name of its own: {', '.join(header)}"
            )
        before = reader.line_num
        for cells in reader:
            where, before = f"{path}, line {before + 1}", reader.line_num
            if not cells:
                continue
            if len(cells) == len(header):
                yield Row(dict(zip(header, cells, strict=True)), where)
            else:
                yield UserError(f"{where}: {len(cells)} cells, where the first line names {len(header)} columns")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}). Save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {before + 1}: {error}") from None


def without_fill(value: Any) -> Any:
    """A value without the nulls in its objects, by which Arrow gives all rows' objects the same keys."""
    if isinstance(value, dict):
        return {key: without_fill(item) for key, item in value.items() if item is not None}
    return [without_fill(item) for item in value] if isinstance(value, list) else value


def as_json(value: Any) -> Any:
    """A value as files of JSON have it: a decimal as a number, or as text where no float is the same; a date or a time as its text;
    bytes in base64."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # a map of Parquet is a list of pairs
        return [as_json(item) for item in value]
    if isinstance(value, Decimal):
        number = int(value) if value == value.to_integral_value() else float(value)
        return number if Decimal(repr(number)) == value else format(value, "f")
    if isinstance(value, bytes):
        return b64encode(value).decode()
    return str(value) if isinstance(value, date | time | timedelta) else value


def without_fill_in_calls(tests: Any) -> Any:
    """Tests of a program, whose calls have no keyword arguments but their own. A null elsewhere may be meant."""
    if not isinstance(tests, dict) or not isinstance(tests.get("cases"), list):
        return tests
    cleaned = [
        case | {"kwargs": without_fill(case["kwargs"])} if isinstance(case, dict) and "kwargs" in case else case
        for case in tests["cases"]
    ]
    return tests | {"cases": cleaned}


def _parquet(path: Path) -> Iterator[Row | UserError]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            others = [field.name for field in file.schema_arrow if NOT_IN_JSON.search(str(field.type))]
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for values in _values_of(batch, f"{path}, rows {number + 1} to {number + len(batch)}"):
                    number += 1
                    filled = {name: without_fill(values[name]) for name in OBJECTS.intersection(values)}
                    if "tests" in values:
                        filled["tests"] = without_fill_in_calls(values["tests"])
                    where = f"{path}, row {number}"
                    if odd := [name for name in TEXTS.intersection(others) if isinstance(values[name], bytes)]:
                        yield UserError(
                            f"{where}: column {min(odd)!r} has bytes, where text must stand: write it as text (STRING)"
                        )
                        continue
                    filled |= {name: as_json(filled.get(name, values[name])) for name in others}
                    yield Row(values | filled, where)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


def _values_of(batch: Any, where: str) -> list[dict[str, Any]]:
    """The rows of a batch of Parquet. Raises UserError for what Python has no value for: dates beyond the year 9999, unknown time zones, text that is not
    UTF-8."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError, LookupError) as error:
        raise UserError(
            f"{where}: a value cannot be read ({error}). Write the column as text, or leave it out"
        ) from None
    return rows
