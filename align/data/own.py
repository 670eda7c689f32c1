"""Data of one's own, without a card: files whose columns say what is in them, read and split as a card's table would be."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonpath
from pathlib import Path
from typing import get_args

from align.data.cards import DataCard, OwnSource
from align.data.drawing import held_out_keys
from align.data.files import SUFFIXES, files_of, read_rows, stem_of, suffix_of
from align.data.forms import STAGES, Form, example_of, form_of, preference_of
from align.data.rows import Row
from align.data.types import Example, Preference, SplitName, normalised
from align.errors import UserError

_log = logging.getLogger(__name__)
SHOWN = 20
"""So many bad rows are told one by one."""
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
CURE = "Correct them, or leave them out and have them counted with data.bad_rows=leave_out"


@dataclass(frozen=True, slots=True, eq=False)
class OwnRows:
    """What is in files: their form, what each row gives, and why others cannot be used. Compared as the object that it is."""

    form: Form
    items: Sequence[Example | Preference]
    bad: Sequence[str] = ()
    """An error for each row that cannot be used."""

    @property
    def rows(self) -> int:
        return len(self.items) + len(self.bad)


def own_card(source: OwnSource) -> DataCard:
    """The card of files without one: named like the file, for the stages that its rows are for. Raises UserError as `read_source` does."""
    tables = read_source(source)
    forms = {rows.form.name: rows.form for rows in tables.values()}
    if len(forms) > 1:
        told = " and ".join(f"{split} of the form {rows.form.name}" for split, rows in tables.items())
        raise UserError(f"{source.path}: its files are of different forms: {told}")
    [form] = forms.values()
    own = f"the rows of {source.path}"
    drawn = f"{source.held_out:.3g} of the prompts of {source.path}, by a hash"
    held_out: list[SplitName] = [split for split in source.splits if split != "train"]
    return DataCard.model_validate(
        {
            "name": name_of(source.path),
            "title": source.path,
            "source": source.model_dump(),
            "licence": "not said",
            "stages": STAGES[form.kind],
            "domain": "user",
            "splits": {split: own if split in tables else drawn for split in source.splits},
            "decontamination": {"against": held_out, "why": "what a policy is evaluated on is not trained on"},
        }
    )


def name_of(path: str) -> str:
    """What data of one's own are called: like the file, or the directory; of a pattern, like what is around its first wildcard."""
    stem = Path(path).name if Path(path).is_dir() else stem_of(Path(path))
    return stem.strip("*?[]-_.") or Path(path).absolute().parent.name


def read_split(source: OwnSource, split: SplitName) -> list[Example | Preference]:
    """What the files give for a split, in their order. Warns of rows that were left out, where all splits are read together."""
    tables = read_source(source)
    if split in tables:
        rows = tables[split]
        if rows.bad:
            _log.warning(
                "%s, split %s: %d of %d rows left out. The first: %s",
                *(source.path, split, len(rows.bad), rows.rows, rows.bad[0]),
                extra={"facts": {"bad_rows": len(rows.bad), "rows": rows.rows}},
            )
    drawn = [name for name in source.splits if name not in tables]
    if split in tables and (split != "train" or not drawn):
        return list(tables[split].items)
    found = _apart(tables["train"], source.held_out, tuple(name for name in reversed(drawn) if name != "train"))
    if split not in found:
        raise UserError(
            f"{source.path} has too few different prompts to hold any out for {' and '.join(drawn)}: give three at least, or a "
            "directory with train.jsonl, validation.jsonl and test.jsonl"
        )
    return list(found[split])


@lru_cache(maxsize=8)
def _apart(
    rows: OwnRows, share: float, held_out: tuple[SplitName, ...]
) -> Mapping[SplitName, Sequence[Example | Preference]]:
    """The rows by split, those that have some; see `held_out_keys`."""
    keys = [opening_of(item) for item in rows.items]
    drawn = held_out_keys(keys, share, held_out)
    found: dict[SplitName, list[Example | Preference]] = {}
    for item, key in zip(rows.items, keys, strict=True):
        found.setdefault(drawn.get(key, "train"), []).append(item)
    return found


def opening_of(item: Example | Preference) -> str:
    """What a row is split by: what its user says first, but for case and white space, so that turns of a conversation stay together."""
    return normalised(next(message["content"] for message in item.messages if message["role"] == "user"))


def read_source(source: OwnSource) -> Mapping[SplitName, OwnRows]:
    """What is in the files of each split that has some; where the source has a single split, all files are that one's.

    Raises UserError where a file cannot be read, where no row can be used, and where `bad_rows` refuses one: the message then has the first
    twenty of them.
    """
    tables, name = tables_of(source), name_of(source.path)
    return {
        split: _read(
            f"{name}/{split}" if len(tables) > 1 else name, tuple(files), tuple(map(_stamp, files)), source.bad_rows
        )
        for split, files in tables.items()
    }


def tables_of(source: OwnSource) -> dict[SplitName, list[Path]]:
    """The files of each split that has files of its own."""
    directory = Path(source.path).expanduser()
    if not directory.is_dir():
        return {source.splits[0]: files_of(source.path)}
    found = {split: _files_named(directory, split) for split in source.splits}
    if not found[source.splits[0]]:
        raise UserError(
            f"{directory} is a directory without {source.splits[0]}.jsonl (or another of {', '.join(SUFFIXES)}); give a file, or a pattern such as "
            f"{directory}/*.jsonl"
        )
    return {split: files for split, files in found.items() if files}


def read_user_file(path: str | Path) -> list[Example]:
    """A user's own problems, in their order and with the ids of their rows: any file that `align.data.files` reads, of any form with a prompt.

    Raises UserError with file and line.
    """
    files = files_of(path)
    rows = _read("", tuple(files), tuple(map(_stamp, files)), "refuse", "Correct them, or take them out")
    examples = [item for item in rows.items if isinstance(item, Example)]
    if len(examples) < len(rows.items):
        raise UserError(
            f"{path} has pairs of completions ({rows.form.columns}), where problems with a prompt each are asked for"
        )
    return examples


def _files_named(directory: Path, split: SplitName) -> list[Path]:
    files = [*directory.glob(f"{split}.*"), *directory.glob(f"{split}-*.*")]
    return sorted(file for file in files if any(suffix in SUFFIXES for suffix in file.suffixes) and suffix_of(file))


def _stamp(file: Path) -> tuple[int, int]:
    """What tells a file from what it was before."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=8)
def _read(
    name: str, files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...], bad_rows: str, cure: str = CURE
) -> OwnRows:
    """What is in files, each time that they have changed. `name` stands before the ids of their rows."""
    form, items, bad, count = None, [], [], 0
    ids: dict[str, str] = {}
    above = commonpath([file.parent for file in files])
    for file in files:
        own = str(file.relative_to(above).parent / stem_of(file)) if len(files) > 1 else ""
        prefix = "/".join(part for part in (name, own) if part)
        for number, row in enumerate(read_rows(file), start=1):
            count += 1
            try:
                if isinstance(row, UserError):
                    raise row
                form = form or form_of(row)
                refuse_other_form(form, row)
                identity = _identity(row, number, prefix, ids)
                make: Callable[[Form, Row, str], Example | Preference] = (
                    preference_of if form.kind == "pairs" else example_of
                )
                items.append(make(form, row, identity))
            except UserError as error:
                bad.append(str(error))
    told = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
    if not count:
        raise UserError(f"{told} is empty: it has no rows")
    if bad and (bad_rows == "refuse" or form is None or not items):
        raise UserError("\n".join(refusal(told, bad, count, cure)))
    assert form is not None
    return OwnRows(form, items, bad)


def refusal(told: str, bad: Sequence[str], count: int, cure: str) -> Iterator[str]:
    """The lines of the error about rows that cannot be used, `bad` of `count`: the first of them, how many there are, and what to do."""
    if len(bad) == count == 1:
        yield bad[0]
        return
    yield f"{told}: {len(bad)} of {count} rows cannot be used{':' if len(bad) <= SHOWN else f', the first {SHOWN}:'}"
    yield from (f"  {why}" for why in bad[:SHOWN])
    yield cure


def refuse_other_form(form: Form, row: Row) -> None:
    """Raise UserError for a row of another form than those before it."""
    if not form.fits(row):
        other = form_of(row)
        raise UserError(
            f"{row.where}: it is of the form {other.name} ({other.columns}), and the rows before it are of the form {form.name} "
            f"({form.columns}): its columns are {', '.join(row.values)}"
        )


def _identity(row: Row, number: int, prefix: str, ids: dict[str, str]) -> str:
    """The row's own id (of IFEval's rows, the key), or its number, after the `prefix`. Raises UserError where another row has the same."""
    column = "id" if row.has("id") else "key" if row.has("key") and "instruction_id_list" in row.values else None
    own = str(number) if column is None else row.text(column, "id", numbers=True)
    identity = f"{prefix}/{own}" if prefix else own
    if identity in ids:
        raise UserError(f"{row.where}: the id {own!r} is already that of {ids[identity]}")
    ids[identity] = row.where
    return identity
