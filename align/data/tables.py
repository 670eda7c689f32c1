"""Examples and preferences from rows that somebody else wrote: on the Hugging Face hub or in local files."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from align.data.cards import DataCard, Fields, FileSource, HubSource
from align.data.code_rows import code_task
from align.data.drawing import percentile
from align.data.files import readable
from align.data.rows import NothingToJudgeBy, Row, asked, level_of
from align.data.types import Example, Item, Message, Preference, SplitName
from align.errors import UserError
from reward import normalise
from reward.math.text import gold_answer
from reward.rows import metadata_of

_log = logging.getLogger(__name__)
Conversation = tuple[Message, ...]
TableSource = HubSource | FileSource


def read_examples(card: DataCard, source: TableSource, split: SplitName, path: Path | None) -> list[Example]:
    """The examples of a split, in the order of the table and numbered as there, from 0; `path` as in `table_rows`.

    Raises UserError with the row where a column is missing or empty. Rows that are published without anything to judge
    an answer by are left out, and a warning counts them.
    """
    fields = source.fields
    return _read(
        card,
        table_rows(source, split, path),
        lambda row: asked(row.text(fields.prompt, "prompt", numbers=True)),
        lambda identity, messages, row: _example(card, fields, identity, messages, row),
        split,
        source,
    )


def read_preferences(card: DataCard, source: TableSource, split: SplitName, path: Path | None) -> list[Preference]:
    """The preferences of a split, like `read_examples`.

    Published rows that prefer nothing are left out, and a warning counts them; in a file of one's own they are an error.
    """
    form = source.fields.preference
    if form is None:
        raise UserError(f"data card {card.name} has no preferences to train a reward model on")

    def preference(identity: str, messages: Conversation, row: Row) -> Preference:
        pair = form.pair(row)
        if pair.chosen == pair.rejected:
            raise NothingToJudgeBy("the chosen completion is the rejected one too")
        return Preference(identity, messages, pair.chosen, pair.rejected, pair.domain or card.domain, pair.margin)

    rows = table_rows(source, split, path)
    strict = isinstance(source, FileSource)
    return _read(card, rows, lambda row: form.prompt(row, source.fields.prompt), preference, split, source, strict)


def table_rows(source: TableSource, split: SplitName, path: Path | None) -> Iterator[Row]:
    """The rows of the table that a split is of.

    `path` is read in place of the source: one file, or a directory that has for each table `train.jsonl`,
    `train.parquet` or `train-*.parquet`.
    """
    table = source.splits[split].table
    if path is None and isinstance(source, HubSource):
        yield from _hub_rows(source, table)
        return
    for file in _replacement(path, table) if path is not None else [Path(table)]:
        yield from readable(file)


def _read(
    card: DataCard,
    rows: Iterator[Row],
    prompt: Callable[[Row], Conversation],
    make: Callable[[str, Conversation, Row], Item],
    split: SplitName,
    source: TableSource,
    strict: bool = False,
) -> list[Item]:
    """What `make` gives for the rows of the split. Where it gives nothing to judge by, `strict` makes an error of it."""
    part = source.splits[split]
    made, left_out = [], []
    for index, row in enumerate(rows):
        try:
            messages = prompt(row)
            # Of how the conversation begins, so that its turns stay in one split.
            opening = next(message["content"] for message in messages if message["role"] == "user")
            if part.percent[0] <= percentile(opening) < part.percent[1]:
                made.append(make(f"{card.name}/{Path(part.table).stem}/{index}", messages, row))
        except NothingToJudgeBy as reason:
            if strict:
                raise UserError(f"{row.where}: {reason}") from None
            left_out.append(f"{row.where}: {reason}")
    if left_out and not made:
        raise UserError(f"data card {card.name}, split {split}: no row can be judged. The first: {left_out[0]}")
    if left_out:
        _log.warning(
            "data card %s, split %s: %d of %d rows left out. The first: %s",
            *(card.name, split, len(left_out), len(left_out) + len(made), left_out[0]),
        )
    return made


def _example(card: DataCard, fields: Fields, identity: str, messages: Conversation, row: Row) -> Example:
    if fields.tests is None:
        metadata = metadata_of(row.values, {fields.prompt})
    else:
        prompt, tests = code_task(fields.tests, row, messages[-1]["content"])
        messages, metadata = asked(prompt), {"tests": tests}
    return Example(
        id=identity,
        messages=messages,
        response=row.text(fields.response, "response", numbers=True) if fields.response else None,
        answer=_answer(row, fields, fields.answer) if fields.answer else None,
        domain=card.domain,
        level=_level(row, fields.level) if fields.level else None,
        metadata=metadata,
    )


def _answer(row: Row, fields: Fields, column: str) -> str:
    published = row.values.get(column)
    if isinstance(published, list) and published and all(isinstance(one, str) for one in published):
        row = Row({**row.values, column: ", ".join(published)}, row.where)  # the parts of one answer
    text = row.text(column, "answer", numbers=True)
    if fields.answer_boxed:
        return _last_box(text, row, column)
    if fields.answer_after is None:
        return text
    _, mark, answer = text.rpartition(fields.answer_after)
    if not mark or not answer.strip():
        raise UserError(f"{row.where}: no answer after {fields.answer_after!r} in column {column!r}")
    return answer.strip()


def _last_box(text: str, row: Row, column: str) -> str:
    answer = gold_answer(text)
    if answer is None:
        raise row.error(column, r"has no \boxed{} with the answer")
    if not normalise(answer):
        raise NothingToJudgeBy(r"the last \boxed{} is blank")
    return answer


def _level(row: Row, column: str) -> int | None:
    """The number that a level ends in; None for a level that is published as unknown, such as "Level ?"."""
    text = row.text(column, "level", numbers=True)
    if text.endswith("?"):
        return None
    level = level_of(text)
    if level is None:
        raise row.error(column, f"must end in a whole number, the level, unlike {text[:40]!r}")
    return level


def _replacement(path: Path, table: str) -> Sequence[Path]:
    """The files to read in place of a table."""
    if not path.is_dir():
        return [path]
    stem = Path(table).stem
    for pattern in (f"{stem}.jsonl", f"{stem}.parquet", f"{stem}-*.parquet"):
        if found := sorted(path.glob(pattern)):
            return found
    raise UserError(f"{path} has none of {stem}.jsonl, {stem}.parquet, {stem}-*.parquet")


def _hub_rows(source: HubSource, table: str) -> Iterator[Row]:
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
    for index, values in enumerate(rows, start=1):
        yield Row(values, f"{source.path}, {table}, row {index}")
