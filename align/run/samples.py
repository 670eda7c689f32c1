"""Rows on disk: Parquet for what a step sampled, JSON lines for data and evaluations."""

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.run.files import atomic_file, json_line


def write_samples(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace `path` by a Parquet table with a column for each key that any row has; absent values are null.

    Token ids go in as lists of int, log-probabilities as lists of float (kept as float64), texts as str.
    Raises pyarrow.ArrowInvalid when one column mixes types.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    with atomic_file(path) as file:
        pq.write_table(table, file)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_samples` wrote. Raises UserError when `path` is missing or no Parquet table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.read().to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a file that a run wrote into its samples/") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines (UTF-8); blank lines are skipped.

    Raises UserError with the file, and the line counted from 1, when a line is no object of JSON.
    """
    return [row for _, row in read_jsonl_lines(path)]


def read_jsonl_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of `read_jsonl`, each with its line counted from 1, one at a time."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    yield number, _parse(content, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by one line of JSON for each row; see `json_line` for the types it takes."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json_line(row).encode() + b"\n")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8. Save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg}, column {error.colno}). Each line must be one JSON object"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, where each line must be one JSON object")
    return row
