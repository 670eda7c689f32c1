"""Examples from rows that somebody else wrote: on the Hugging Face hub or in local files."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.data.cards import DataCard, Fields, FileSource, HubSource
from align.data.types import Example, SplitName
from align.errors import UserError
from align.run.samples import read_jsonl_lines

Row = Mapping[str, Any]


def read_table(card: DataCard, source: HubSource | FileSource, split: SplitName, path: Path | None) -> list[Example]:
    """The rows of a split, in the order of the table and numbered as there, from 0.

    `path` is read in place of the source: one file, or a directory that has for each table `train.jsonl`,
    `train.parquet` or `train-*.parquet`. Raises UserError with the row where a column is missing or empty.
    """
    part = source.splits[split]
    if path is not None:
        rows = _local_rows(_replacement(path, part.table))
    elif isinstance(source, FileSource):
        rows = _local_rows([Path(part.table)])
    else:
        rows = _hub_rows(source, part.table)
    table = Path(part.table).stem
    examples = []
    for index, (where, row) in enumerate(rows):
        prompt = _text(row, source.fields.prompt, "prompt", where)
        if part.percent[0] <= _percentile(prompt) < part.percent[1]:
            examples.append(_example(card, source.fields, f"{card.name}/{table}/{index}", prompt, row, where))
    return examples


def comparable(source: HubSource | FileSource, split: SplitName, other: SplitName, path: Path | None) -> bool:
    """Whether `other` can be read too, where `path` was given for `split`."""
    return path is None or path.is_dir() or source.splits[split].table == source.splits[other].table


def normalised(prompt: str) -> str:
    """The prompt but for case and white space."""
    return " ".join(prompt.casefold().split())


def _example(card: DataCard, fields: Fields, identity: str, prompt: str, row: Row, where: str) -> Example:
    return Example(
        id=identity,
        messages=({"role": "user", "content": prompt},),
        response=_text(row, fields.response, "response", where) if fields.response else None,
        answer=_answer(row, fields, where) if fields.answer else None,
        domain=card.domain,
    )


def _answer(row: Row, fields: Fields, where: str) -> str:
    assert fields.answer is not None
    text = _text(row, fields.answer, "answer", where)
    if fields.answer_after is None:
        return text
    _, mark, answer = text.rpartition(fields.answer_after)
    if not mark or not answer.strip():
        raise UserError(f"{where}: no answer after {fields.answer_after!r} in column {fields.answer!r}")
    return answer.strip()


def _text(row: Row, column: str, role: str, where: str) -> str:
    if column not in row:
        raise UserError(f"{where}: no column {column!r} for the {role}; there are {', '.join(row) or 'none'}")
    value = row[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "":
        raise UserError(f"{where}: the {role} is missing (column {column!r} is empty)")
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} holds a {type(value).__name__}, where the {role} is text")
    return check_unicode(value, f"{where}: column {column!r}")


def check_unicode(text: str, where: str) -> str:
    """`text`. Raises UserError where it has half a character, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start + 1} is half of a surrogate pair") from None
    return text


def _percentile(prompt: str) -> int:
    # Of the prompt, not of the row, so that repeated prompts stay together.
    return int.from_bytes(hashlib.sha256(normalised(prompt).encode()).digest()[:8], "big") % 100


def _replacement(path: Path, table: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    stem = Path(table).stem
    for pattern in (f"{stem}.jsonl", f"{stem}.parquet", f"{stem}-*.parquet"):
        if found := sorted(path.glob(pattern)):
            return found
    raise UserError(f"{path} has none of {stem}.jsonl, {stem}.parquet, {stem}-*.parquet")


def _local_rows(paths: list[Path]) -> Iterator[tuple[str, Row]]:
    for path in paths:
        if path.suffix == ".jsonl":
            for line, row in read_jsonl_lines(path):
                yield f"{path}, line {line}", row
        elif path.suffix == ".parquet":
            for index, row in enumerate(_parquet_rows(path), start=1):
                yield f"{path}, row {index}", row
        else:
            raise UserError(f"{path}: give JSON lines (.jsonl) or Parquet (.parquet)")


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.read().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _hub_rows(source: HubSource, table: str) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.path, source.config, data_files=source.files, revision=source.revision, split=table
        )
    except Exception as error:  # the hub's client raises its own, the HTTP library's and built-in ones
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(
            f"cannot load {source.path} (split {table}) from the Hugging Face hub: {cause}. "
            "Where the hub cannot be reached, give local files as the data's `path`: a .jsonl or .parquet "
            f"file with the published columns, or a directory with {table}.jsonl and the other splits"
        ) from error
    for index, row in enumerate(rows, start=1):
        yield f"{source.path}, {table}, row {index}", row
