"""Data of one's own, without a card: files whose columns say what is in them, read and split as a card's table would be."""

import hashlib
import logging
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from os.path import commonpath
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from align.data.cards import DataCard, OwnSource
from align.data.drawing import BLOCK, Hashes, Stream, fraction_of, held_out_places, key_hash
from align.data.files import ROWS_READ, SUFFIXES, files_of, read_rows, stem_of, suffix_of
from align.data.forms import STAGES, Form, example_of, form_of, preference_of
from align.data.hub import fetched, hub_files
from align.data.rows import Row
from align.data.stored import StoredRows, stamp
from align.data.types import Example, Preference, SplitName, normalised
from align.errors import UserError
from align.recipe.options import HUB_NAME, is_on_hub
from reward.rows import DOMAIN

_log = logging.getLogger(__name__)
SHOWN = 20
"""So many bad rows are told one by one."""
OTHER_NAMES = ("valid", "val", "dev")
"""What others call the validation split."""
CURE = "Correct them, or leave them out and have them counted: with data.bad_rows=leave_out, or in a card with bad_rows: leave_out in its source"
TAKE_OUT = "Correct them, or take them out"
"""The cure for files that are evaluated on alone."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnRows:
    """What is in files: their form, what each row gives, and why others cannot be used. Compared as the object that it is."""

    form: Form
    stored: StoredRows
    files: Sequence[Path]
    prefixes: Sequence[str]
    """What stands before the ids of the rows of each file."""
    openings: Hashes
    """The hash of what each row is split by, see `opening_of`."""
    prompts: Hashes
    """The hash of each row's `prompt_key`."""
    earlier: tuple[npt.NDArray[np.int64], Hashes]
    """The hashes of all rows' `earlier_keys`, and of which row each is."""
    domain: str
    """Of rows that name none."""
    domains: Sequence[str]
    bad: Sequence[str] = ()
    """An error for each of the first SHOWN rows that cannot be used."""
    bad_count: int = 0

    @property
    def rows(self) -> int:
        return len(self.stored) + self.bad_count

    @property
    def items(self) -> "Rows":
        return Rows(self, np.arange(len(self.stored)))

    def item(self, place: int) -> Example | Preference:
        """What the row at a place gives."""
        row, (file, number) = self.stored[place], self.stored.number(place)
        return item_of(self.form, row, identity_of(row, number, self.prefixes[file]), self.domain)

    def digest(self) -> str:
        """A hash of the files' content."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


class Rows(Sequence[Any]):
    """Some of the rows of files, each read when it is asked for."""

    def __init__(self, source: OwnRows, places: npt.NDArray[np.int64]):
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Rows(self.source, self.places[place])
        return self.source.item(int(self.places[place]))

    @property
    def prompts(self) -> Hashes:
        """The hash of each row's `prompt_key`."""
        return self.source.prompts[self.places]

    @property
    def openings(self) -> Hashes:
        """The hash of what each row is split by."""
        return self.source.openings[self.places]

    def go_on_from(self, prompts: Hashes) -> npt.NDArray[np.bool_]:
        """Whether each row goes on from one of these prompts of several turns."""
        rows, hashes = self.source.earlier
        return np.isin(self.places, rows[np.isin(hashes, prompts)])


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
            "domain": source.domain,
            "splits": {split: own if split in tables else drawn for split in source.splits},
            "decontamination": {"against": held_out, "why": "what a policy is evaluated on is not trained on"},
        }
    )


def name_of(path: str) -> str:
    """What data of one's own are called: like the file, or the directory; of a pattern, like what is around its first wildcard."""
    as_it_is = Path(path).is_dir() or HUB_NAME.fullmatch(path)
    stem = Path(path).name if as_it_is else stem_of(Path(path))
    return stem.strip("*?[]-_.") or Path(path).absolute().parent.name


def read_split(source: OwnSource, split: SplitName) -> Rows:
    """What the files give for a split, in their order. Warns of rows that were left out, where all splits are read together."""
    tables = read_source(source)
    if split in tables:
        rows = tables[split]
        if rows.bad:
            _log.warning(
                "%s, split %s: %d of %d rows left out. The first: %s",
                *(source.path, split, rows.bad_count, rows.rows, rows.bad[0]),
                extra={"facts": {"bad_rows": rows.bad_count, "rows": rows.rows}},
            )
    drawn = [name for name in source.splits if name not in tables]
    if split in tables and (split != "train" or not drawn):
        return tables[split].items
    held_out = [name for name in reversed(drawn) if name != "train"]
    train = tables["train"]
    wanted = held_out.index(split) + 1 if split in held_out else 0
    places = np.flatnonzero(held_out_places(train.openings, source.held_out, len(held_out)) == wanted)
    if not len(places):
        raise UserError(
            f"{source.path} has too few different prompts to hold any out for {' and '.join(drawn)}: give three at least, or a "
            "directory with train.jsonl, validation.jsonl and test.jsonl"
        )
    return Rows(train, places)


def opening_of(item: Example | Preference) -> str:
    """What a row is split by: what its user says first, but for case and white space, so that turns of a conversation stay together."""
    return normalised(next(message["content"] for message in item.messages if message["role"] == "user"))


def earlier_keys(item: Example | Preference) -> list[str]:
    """`Example.earlier_keys`; none of a preference, of which the last answers alone are learned from."""
    return item.earlier_keys if isinstance(item, Example) else []


def read_source(source: OwnSource) -> Mapping[SplitName, OwnRows]:
    """What is in the files of each split that has some; where the source has a single split, all files are that one's.

    Raises UserError where a file cannot be read, where no row can be used, and where `bad_rows` refuses one: the message then has the first
    twenty of them.
    """
    tables, name, head = tables_of(source), name_of(source.path), BLOCK if source.stream else None
    return {
        split: _read(
            f"{name}/{split}" if len(tables) > 1 else name,
            tuple(files),
            _stamps(files),
            source.bad_rows,
            cure_of(source),
            domain=source.domain,
            head=head,
        )
        for split, files in tables.items()
    }


def stream_of(source: OwnSource, head: Rows, held_out: Collection[int]) -> Stream[Any]:
    """The training rows of a source in their order, those that cannot be used as the error that says so; `head` are the first of them.

    What has a prompt of `held_out` is not among them, nor what its hash holds out. Their ids are their numbers, since those that come twice
    could not be told.
    """
    tables, own = tables_of(source), head.source
    shares = source.held_out * sum(split not in tables for split in source.splits)
    openings = set(own.openings.tolist()) - set(own.openings[head.places].tolist())

    def read() -> Iterator[Any]:
        for file, number, row in _numbered(tables["train"]):
            try:
                if isinstance(row, UserError):
                    raise row
                refuse_other_form(own.form, row)
                item = item_of(own.form, row, f"{own.prefixes[file]}/{number}", own.domain)
            except UserError as error:
                yield error
                continue
            opening = key_hash(opening_of(item))
            held = fraction_of(opening) >= 1 - shares or opening in openings
            keys = {opening, key_hash(item.prompt_key), *map(key_hash, earlier_keys(item))}
            if not held and not keys.intersection(held_out):
                yield item

    return Stream(head, read)


def tables_of(source: OwnSource) -> dict[SplitName, list[Path]]:
    """The files of each split that has files of its own."""
    if is_on_hub(source.path):
        return hub_files(source.path, source.config, source.revision, source.hub_split, source.splits, source.stream)
    directory = Path(source.path).expanduser()
    if not directory.is_dir():
        return {source.splits[0]: files_of(source.path)}
    found = {split: _files_named(directory, split) for split in source.splits}
    if not found[source.splits[0]]:
        raise UserError(
            f"{directory} is a directory without {source.splits[0]}.jsonl (or another of {', '.join(SUFFIXES)}); give a file, or a pattern such as "
            f"{directory}/*.jsonl"
        )
    other = [file for name in OTHER_NAMES for file in _files_named(directory, name)]
    if other and not found.get("validation", other):
        raise UserError(
            f"{other[0]} is not read, for a directory's splits are called {', '.join(found)}: rename it, or take it out"
        )
    return {split: files for split, files in found.items() if files}


def read_user_file(path: str | Path) -> list[Example]:
    """A user's own problems, in their order and with the ids of their rows: any file that `align.data.files` reads, of any form; of pairs their prompts.

    Raises UserError with file and line.
    """
    files = hub_files(str(path), None, None, None, ("test",))["test"] if is_on_hub(path) else files_of(path)
    rows = _read("", tuple(files), _stamps(files), "refuse", TAKE_OUT)
    return prompts_of(rows.items) if rows.form.kind == "pairs" else list(rows.items)


def prompts_of(pairs: Iterable[Preference]) -> list[Example]:
    """The prompts of pairs, each once, for a policy to answer: neither completion is known to be right."""
    found: dict[str, Example] = {}
    for pair in pairs:
        asked = Example(pair.id, pair.messages, None, pair.answer, pair.domain, metadata=pair.metadata)
        found.setdefault(pair.prompt_key, asked)
    return list(found.values())


def _files_named(directory: Path, split: str) -> list[Path]:
    files = [*directory.glob(f"{split}.*"), *directory.glob(f"{split}-*.*")]
    return sorted(file for file in files if any(suffix in SUFFIXES for suffix in file.suffixes) and suffix_of(file))


def _stamps(files: Sequence[Path]) -> tuple[Any, ...]:
    """What tells what is read of files from what was before."""
    return *(stamp(file) if file.exists() else None for file in files), ROWS_READ.get()


def _numbered(files: Sequence[Path]) -> Iterator[tuple[int, int, Row | UserError]]:
    """Every row of files, with its file counted from 0 and its number there counted from 1."""
    for place, file in enumerate(files):
        for number, row in enumerate(read_rows(fetched(file)), start=1):
            yield place, number, row


@lru_cache(maxsize=8)
def _read(
    name: str,
    files: tuple[Path, ...],
    stamps: tuple[Any, ...],
    bad_rows: str,
    cure: str,
    domain: str = DOMAIN,
    head: int | None = None,
) -> OwnRows:
    """What is in files, each time that they have changed, or their first `head` rows. `name` stands before the ids of their rows."""
    above = commonpath([file.parent for file in files])
    several = len(files) > 1
    owns = [str(file.relative_to(above).parent / stem_of(file)) if several else "" for file in files]
    prefixes = ["/".join(part for part in (name, own) if part) for own in owns]
    form, stored, bad, bad_count = None, StoredRows(files), list[str](), 0
    ids: dict[int, int] = {}
    domains: dict[str, None] = {}
    openings, prompts = array("Q"), array("Q")
    earlier, earlier_rows = array("Q"), array("q")
    for file, number, row in islice(_numbered(files), head):
        try:
            if isinstance(row, UserError):
                raise row
            form = form or form_of(row)
            refuse_other_form(form, row)
            identity = identity_of(row, number, prefixes[file])
            if (first := ids.get(hashed := key_hash(identity))) is not None:
                own = identity.removeprefix(f"{prefixes[file]}/")
                raise UserError(f"{row.where}: the id {own!r} is already that of {stored[first].where}")
            item = item_of(form, row, identity, domain)
        except UserError as error:
            bad_count += 1
            if len(bad) < SHOWN:
                bad.append(str(error))
            continue
        ids[hashed] = len(stored)
        stored.append(row, file, number)
        domains[item.domain] = None
        opening = key_hash(opening_of(item))
        openings.append(opening)
        # Of one message the two keys are the same.
        prompts.append(opening if len(item.messages) == 1 else key_hash(item.prompt_key))
        for key in earlier_keys(item):
            earlier.append(key_hash(key))
            earlier_rows.append(len(stored) - 1)
    told = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
    if not len(stored) + bad_count:
        raise UserError(f"{told} is empty: it has no rows")
    if bad and (bad_rows == "refuse" or form is None or not len(stored)):
        raise UserError("\n".join(refusal(told, bad, bad_count, len(stored) + bad_count, cure)))
    assert form is not None
    keys = np.array(openings, dtype=np.uint64), np.array(prompts, dtype=np.uint64)
    begun = np.array(earlier_rows, dtype=np.int64), np.array(earlier, dtype=np.uint64)
    return OwnRows(form, stored, files, prefixes, *keys, begun, domain, list(domains), bad, bad_count)


def item_of(form: Form, row: Row, identity: str, domain: str) -> Example | Preference:
    """What a row of a form gives, of `domain` where it names none. Raises UserError where it cannot be used."""
    read = preference_of if form.kind == "pairs" else example_of
    return read(form, row, identity, domain)


def refusal(told: str, bad: Sequence[str], bad_count: int, count: int, cure: str) -> Iterator[str]:
    """The lines of the error about rows that cannot be used, `bad_count` of `count`: the first of them, how many there are, and what to do."""
    if bad_count == count == 1:
        yield bad[0]
        return
    yield f"{told}: {bad_count} of {count} rows cannot be used{':' if bad_count <= SHOWN else f', the first {SHOWN}:'}"
    yield from (f"  {why}" for why in bad[:SHOWN])
    yield cure


def cure_of(source: OwnSource) -> str:
    """What to do about rows of a source that cannot be used."""
    return CURE if "train" in source.splits else TAKE_OUT


def refuse_other_form(form: Form, row: Row) -> None:
    """Raise UserError for a row of another form than those before it."""
    if not form.fits(row):
        other = form_of(row)
        raise UserError(
            f"{row.where}: it is of the form {other.name} ({other.columns}), and the rows before it are of the form {form.name} "
            f"({form.columns}): its columns are {', '.join(row.values)}"
        )


def identity_of(row: Row, number: int, prefix: str) -> str:
    """The row's own id (of IFEval's rows, the key), or its number, after the `prefix`."""
    column = "id" if row.has("id") else "key" if row.has("key") and "instruction_id_list" in row.values else None
    own = str(number) if column is None else row.text(column, "id", numbers=True)
    return f"{prefix}/{own}" if prefix else own
