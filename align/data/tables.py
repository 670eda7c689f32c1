"""Examples from rows that somebody else wrote: on the Hugging Face hub or in local files."""

import hashlib
import logging
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from align.data.cards import DataCard, Fields, FileSource, HubSource
from align.data.code_rows import NothingToJudgeBy, Row, code_task
from align.data.types import Example, SplitName
from align.errors import UserError
from align.run.files import read_jsonl_lines
from reward import boxed_answers, normalise

_log = logging.getLogger(__name__)


def read_table(card: DataCard, source: HubSource | FileSource, split: SplitName, path: Path | None) -> list[Example]:
    """The rows of a split, in the order of the table and numbered as there, from 0.

    `path` is read in place of the source: one file, or a directory that has for each table `train.jsonl`,
    `train.parquet` or `train-*.parquet`. Raises UserError with the row where a column is missing or empty. Rows that
    are published without anything to judge an answer by are left out, and a warning counts them.
    """
    part = source.splits[split]
    table = Path(part.table).stem
    examples, left_out = [], []
    for index, (where, row) in enumerate(table_rows(source, part.table, path)):
        prompt = _text(row, source.fields.prompt, "prompt", where)
        if part.percent[0] <= percentile(prompt) < part.percent[1]:
            try:
                examples.append(_example(card, source.fields, f"{card.name}/{table}/{index}", prompt, row, where))
            except NothingToJudgeBy as reason:
                left_out.append(f"{where}: {reason}")
    if left_out and not examples:
        raise UserError(f"data card {card.name}, split {split}: no row can be judged. The first: {left_out[0]}")
    if left_out:
        _log.warning(
            "data card %s, split %s: %d of %d rows left out. The first: %s",
            *(card.name, split, len(left_out), len(left_out) + len(examples), left_out[0]),
        )
    return examples


def table_rows(source: HubSource | FileSource, table: str, path: Path | None) -> Iterator[tuple[str, Row]]:
    """The rows of a table, each with where it is, for messages; `path` as in `read_table`."""
    if path is not None:
        return _local_rows(_replacement(path, table))
    return _local_rows([Path(table)]) if isinstance(source, FileSource) else _hub_rows(source, table)


def comparable(source: HubSource | FileSource, split: SplitName, other: SplitName, path: Path | None) -> bool:
    """Whether `other` can be read too, where `path` was given for `split`."""
    return path is None or path.is_dir() or source.splits[split].table == source.splits[other].table


def refuse_one_file(card: DataCard, path: Path | None, splits: Collection[SplitName]) -> None:
    """Raise UserError where one file would be read as several of the card's splits, which have tables of their own."""
    if path is None or path.is_dir() or not isinstance(card.source, HubSource | FileSource):
        return
    tables = dict.fromkeys(card.source.splits[split].table for split in splits if split in card.source.splits)
    if len(tables) > 1:
        raise UserError(
            f"{path} is one file, and data card {card.name} has the splits {', '.join(splits)} in several: give a directory with "
            f"{', '.join(Path(table).stem + '.jsonl' for table in tables)}"
        )


def normalised(prompt: str) -> str:
    """The prompt but for case and white space."""
    return " ".join(prompt.casefold().split())


def _example(card: DataCard, fields: Fields, identity: str, prompt: str, row: Row, where: str) -> Example:
    metadata = {}
    if fields.tests is not None:
        prompt, metadata["tests"] = code_task(fields.tests, row, prompt, where)
        check_unicode(prompt, f"{where}: the prompt with its tests")
    return Example(
        id=identity,
        messages=({"role": "user", "content": prompt},),
        response=_text(row, fields.response, "response", where) if fields.response else None,
        answer=_answer(row, fields, where) if fields.answer else None,
        domain=card.domain,
        level=_level(row, fields.level, where) if fields.level else None,
        metadata=metadata,
    )


def _answer(row: Row, fields: Fields, where: str) -> str:
    assert fields.answer is not None
    published = row.get(fields.answer)
    if isinstance(published, list) and published and all(isinstance(one, str) for one in published):
        row = {**row, fields.answer: ", ".join(published)}  # the parts of one answer
    text = _text(row, fields.answer, "answer", where)
    if fields.answer_boxed:
        return _last_box(text, f"{where}: column {fields.answer!r}")
    if fields.answer_after is None:
        return text
    _, mark, answer = text.rpartition(fields.answer_after)
    if not mark or not answer.strip():
        raise UserError(f"{where}: no answer after {fields.answer_after!r} in column {fields.answer!r}")
    return answer.strip()


def _last_box(text: str, where: str) -> str:
    answers = boxed_answers(text)
    if not answers:
        raise UserError(rf"{where} has no \boxed{{}} with the answer")
    if not normalise(answers[-1]):
        raise NothingToJudgeBy(r"the last \boxed{} is blank")
    return answers[-1]


def _level(row: Row, column: str, where: str) -> int | None:
    """The number that a level ends in; None for a level that is published as unknown, such as "Level ?"."""
    text = _text(row, column, "level", where)
    if text.endswith("?"):
        return None
    number = re.search(r"[0-9]{1,9}$", text)
    if number is None:
        raise UserError(f"{where}: the level in column {column!r} must end in a whole number, unlike {text[:40]!r}")
    return int(number.group())


def _text(row: Row, column: str, role: str, where: str) -> str:
    if column not in row:
        raise UserError(f"{where}: no column {column!r} for the {role}; there are {', '.join(row) or 'none'}")
    value = row[column]
    if isinstance(value, float) and not math.isfinite(value):
        value = None  # how tables of numbers write a missing one
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


def percentile(prompt: str) -> int:
    """Where the prompt is in the order of the hashes, 0 to 99."""
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
        if source.files is None:
            rows = datasets.load_dataset(source.path, source.config, revision=source.revision, split=table)
        else:
            files = f"hf://datasets/{source.path}@{source.revision}/{source.files[table]}"
            reader = "parquet" if files.endswith(".parquet") else "json"
            rows = datasets.load_dataset(reader, data_files={table: files}, split=table)
    except Exception as error:  # the hub's client raises its own, the HTTP library's and built-in ones
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(
            f"cannot load {source.path} (split {table}) from the Hugging Face hub: {cause}. "
            "Where the hub cannot be reached, give local files as the data's `path`: a .jsonl or .parquet "
            f"file with the published columns, or a directory with {table}.jsonl and the other splits"
        ) from error
    for index, row in enumerate(rows, start=1):
        yield f"{source.path}, {table}, row {index}", row
