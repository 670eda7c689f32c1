"""What a stage reads of the entries of its recipe's `data`: encoded, short enough, and held apart from what is evaluated."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from align.data.cards import DataCard, GeneratorSource, OwnSource, Stage, load_card, require_stage
from align.data.drawing import BLOCK, Source, shares
from align.data.loader import NOTHING, HeldOutPrompts, held_together
from align.data.own import CURE, Rows, cure_of, name_of, own_card, refusal, stream_of
from align.data.types import Item, LoadedSplit, SplitName
from align.errors import UserError
from align.recipe import DataOptions
from align.recipe.options import EvaluationOptions

T = TypeVar("T")
TOKENISED_BEFORE = 20_000
"""A file with more rows is tokenised as its rows are needed; one with fewer, and what a card has, before the start."""
LOOKED_AT = 1000
"""So many of them, evenly taken, are tokenised before the start, to see what the template refuses and how many are too long."""
DIGESTED = 64
"""Of so many of these the token ids are part of the data's hash."""


class Notes(Protocol):
    """Where is noted what was compared and left out, such as a run; the keywords are data of the event."""

    def warn(self, text: str, **data: Any) -> None: ...

    def tell(self, kind: str, text: str, **data: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of `recipe.data`, whose card is made of its files where it names none. `mark` is what its name ends in, and its ids, where an entry before it has that name or such ids: "@2"; empty for a first one."""

    data: DataOptions
    card: DataCard
    mark: str = ""

    @property
    def name(self) -> str:
        return (self.data.card or self.card.name) + self.mark

    @property
    def called(self) -> str:
        """What messages call it."""
        return f"data card {self.name!r}" if self.data.card else self.card.called + self.mark

    @property
    def path(self) -> Path | None:
        """What is read in place of the source of its card; None where the data have no card, and are that source."""
        return self.data.path if self.data.card else None

    @property
    def in_turn(self) -> bool:
        """Whether rows are read from the files only when a step takes them. A card's split, levels or limit choose from the first rows instead."""
        chosen = self.data.card and (self.data.split != "train" or self.data.levels or self.data.limit is not None)
        return self.own is not None and self.own.stream and not chosen

    @property
    def own(self) -> OwnSource | None:
        """The files of one's own that it is read from; None where a card has another source."""
        return self.card.source if isinstance(self.card.source, OwnSource) else None


@dataclass(frozen=True, slots=True)
class Room:
    """How many tokens an example may have, and which keys say so."""

    tokens: int
    why: str


def entries_of(data: Sequence[DataOptions], stage: Stage) -> list[Entry]:
    """The entries of `recipe.data`. Those that differ in their share alone are one, of which a step takes both shares.

    Raises UserError where a card is not meant for the stage.
    """
    distinct: list[DataOptions] = []
    for one in data:
        alike = [place for place, other in enumerate(distinct) if one == other.model_copy(update={"share": one.share})]
        if alike:
            both = distinct[alike[0]].share + one.share
            distinct[alike[0]] = one.model_copy(update={"share": both})
        else:
            distinct.append(one)
    entries: list[Entry] = []
    for one in distinct:
        card = card_of(one)
        require_stage(card, stage)
        entries.append(Entry(one, card, _mark(card, entries)))
    return entries


def _mark(card: DataCard, before: Sequence[Entry]) -> str:
    """What tells an entry with this card from those before it, of which none with its name, or with ids that begin as its own, has that mark."""
    taken = {
        entry.mark for entry in before if entry.card.name == card.name or _begins_ids(entry.card) == _begins_ids(card)
    }
    marks = ("", *(f"@{number}" for number in range(2, len(before) + 2)))
    return next(mark for mark in marks if mark not in taken)


def _begins_ids(card: DataCard) -> str:
    """What the ids of a card's examples begin with: two cards of like-named files, or of one generator, have the same."""
    match card.source:
        case OwnSource(path=path):
            return name_of(path)
        case GeneratorSource(name=name, params=params):
            return f"{name}/{params.get('aspect', '')}"
    return card.name


def card_of(data: DataOptions) -> DataCard:
    """The card that an entry names, or the one of its files. Raises UserError where these cannot be read."""
    if data.card is not None:
        card = load_card(data.card)
        return card if data.path is None else _with_files(card, str(data.path))
    return own_card(
        OwnSource(
            kind="own",
            path=str(data.path),
            held_out=data.held_out,
            bad_rows=data.bad_rows,
            config=data.config,
            revision=data.revision,
            hub_split=data.hub_split,
            stream=data.stream,
        )
    )


def _with_files(card: DataCard, path: str, only: SplitName | None = None) -> DataCard:
    """A card whose files of one's own are those at `path`, all of the split `only` where that is given; one with another source as it is."""
    if not isinstance(card.source, OwnSource):
        return card
    splits = {name: text for name, text in card.splits.items() if only in (None, name)}
    source = card.source.model_copy(update={"path": path} | ({"splits": (only,)} if only else {}))
    return card.model_copy(update={"source": source, "splits": splits})


def evaluated(options: EvaluationOptions, data: Sequence[DataOptions]) -> list[Entry]:
    """What a policy that is trained on `data` is evaluated on: the cards of `evaluation.cards`, the file of `evaluation.path`, or else these data, each once.

    The entries' `path` is that of the evaluation. Raises UserError where something cannot be read.
    """
    if options.cards or any(each.card for each in data):
        named = options.cards or [each.card for each in data if each.card]
        entries = [DataOptions(card=name, path=options.path) for name in dict.fromkeys(named)]
        own = [] if options.cards else [each for each in data if not each.card]
    elif options.path is not None:
        source = OwnSource(kind="own", path=str(options.path), splits=(options.split,))
        return [Entry(DataOptions(path=options.path), own_card(source))]
    else:
        entries, own = [], list(data)
    entries += {(each.path, each.config, each.revision, each.hub_split): each for each in own}.values()
    found: list[Entry] = []
    for one in entries:
        card = card_of(one)
        if one.card and one.path is not None:
            card = _with_files(card, str(one.path), options.split)
        # Two cards of one name stay so, to be refused.
        before = [entry for entry in found if one.card is None or entry.card.name != card.name]
        found.append(Entry(one, card, _mark(card, before)))
    return found


def encoded(
    examples: Sequence[Item], encode: Callable[[Item], Sequence[T]], mark: str = ""
) -> tuple[list[T], list[str]]:
    """What `encode` gives for the examples, whose ids end in `mark`, and why it refuses others."""
    items: list[T] = []
    refused: list[str] = []
    for item in examples:
        try:
            items += encode(replace(item, id=item.id + mark))
        except UserError as error:
            refused.append(str(error))
    return items, refused


def encode_rows(
    examples: Sequence[Item], encode: Callable[[Item], Sequence[T]], entry: Entry, told: str, notes: Notes
) -> list[T]:
    """The examples of an entry, encoded. Rows of one's own files that cannot be are left out and noted, or all told together by a UserError;
    any other example raises one."""
    if entry.own is None:
        return [item for example in examples for item in encode(replace(example, id=example.id + entry.mark))]
    items, refused = encoded(examples, encode, entry.mark)
    if refused and (entry.own.bad_rows == "refuse" or not items):
        raise UserError("\n".join(refusal(told, refused, len(refused), len(examples), cure_of(entry.own))))
    if refused:
        notes.warn(
            f"{told}: {len(refused)} of {len(examples)} rows cannot be encoded, and are left out. The first: {refused[0]}",
            card=entry.name,
            bad_rows=len(refused),
        )
    return items


@dataclass(frozen=True, slots=True)
class Reader(Generic[Item, T]):
    """How a stage reads its entries.

    `load` is `load_split` or `load_preferences`; `encode` gives what the stage trains on for an example, maybe several items, of which
    `tokens` are as many as there must be room for. What was left out goes into `notes`.
    """

    load: Callable[..., LoadedSplit[Item]]
    encode: Callable[[Item], Sequence[T]]
    tokens: Callable[[T], int]
    room: Room
    seed: int
    notes: Notes

    def read(
        self, entry: Entry, split: SplitName, limit: int | None, held_out: HeldOutPrompts = NOTHING
    ) -> tuple[list[T], LoadedSplit[Item]]:
        """What there is room for of a split, encoded, and the whole split. Raises UserError for what cannot be used."""
        loaded = self._loaded(entry, split, limit, held_out)
        return self._encoded(loaded.examples, entry, f"{entry.called}, split {split}"), loaded

    def _loaded(self, entry: Entry, split: SplitName, limit: int | None, held_out: HeldOutPrompts) -> LoadedSplit[Item]:
        data = entry.data
        levels = {"levels": data.levels, "demanded": split == data.split} if data.levels else {}
        return self.load(
            entry.card,
            split,
            path=entry.path,
            limit=limit,
            seed=self.seed,
            params=data.params,
            held_out=held_out,
            **levels,
        )

    def _encoded(self, examples: Sequence[Item], entry: Entry, told: str) -> list[T]:
        """The examples as the stage trains on them, those that there is room for."""
        return self._short_enough(encode_rows(examples, self.encode, entry, told, self.notes), entry, told)

    def held_out_split(
        self, entries: Sequence[Entry], split: SplitName, limit: int, held_out: HeldOutPrompts = NOTHING
    ) -> tuple[list[T], HeldOutPrompts]:
        """A split that is not trained on, of all entries, and `held_out` with its prompts."""
        read = [self.read(entry, split, limit, held_out) for entry in entries]
        prompts = {f"{entry.name}/{split}": loaded.prompts for entry, (_, loaded) in zip(entries, read, strict=True)}
        return [item for items, _ in read for item in items], held_together(held_out, prompts)

    def sources(
        self, entries: Sequence[Entry], a_step: int, a_step_key: str, held_out: HeldOutPrompts
    ) -> list[Source[T]]:
        """What the entries train on, `a_step` items of it a step.

        `held_out`: prompts that may not be among them. Raises UserError where an entry has fewer items than a step takes of it.
        """
        sources: list[Source[T]] = []
        for entry, count in zip(entries, shares(a_step, [entry.data.share for entry in entries]), strict=True):
            told = f"{entry.called}, split {entry.data.split}"
            loaded = self._loaded(entry, entry.data.split, entry.data.limit, held_out)
            rows = loaded.examples
            is_large = isinstance(rows, Rows) and (entry.in_turn or len(rows) > TOKENISED_BEFORE)
            items = rows if is_large else self._encoded(rows, entry, told)
            self._tell_compared(entry, loaded)
            if not 1 <= count <= len(items):
                takes = f", of which {entry.called} is to give {count}," if len(entries) > 1 else ""
                raise UserError(
                    f"{a_step_key} is {a_step},{takes} but {entry.called} gives only {len(items)} examples"
                    if count
                    else f"{a_step_key} is {a_step}: the share of {entry.called} is less than one example a step"
                )
            if isinstance(rows, Rows) and is_large:
                sources.append(self._tokenised_as_needed(entry, rows, count, held_out, told))
            else:
                sources.append(Source(entry.name, items, count))
        return sources

    def _tokenised_as_needed(
        self, entry: Entry, rows: Rows, count: int, held_out: HeldOutPrompts, told: str
    ) -> Source[T]:
        """A source of rows that are too many to encode all before the start: some are, or all of them where the entry refuses long ones."""
        refuses = entry.data.too_long == "refuse"
        parts = [rows[i : i + LOOKED_AT] for i in range(0, len(rows), LOOKED_AT)]
        for part in parts if refuses else [rows[:: max(1, len(rows) // LOOKED_AT)]]:
            items = self._encoded(part, entry, f"{told}, {len(part)} rows looked at")
        digest = hashlib.sha256(f"{items[:DIGESTED]!r}".encode() + rows.places.tobytes())
        taken: Sequence[Any] = rows
        if entry.own is not None and entry.in_turn:
            digest.update(rows.prompts.tobytes())
            others = (self._loaded(entry, split, None, NOTHING) for split in entry.card.splits if split != "train")
            prompts = {str(place): loaded.prompts for place, loaded in enumerate(others)}
            taken = stream_of(entry.own, rows, frozenset[int]().union(*held_together(held_out, prompts).values()))
            how = f"it is read in its order, of each {BLOCK} rows in turn the order is shuffled, and the first {len(rows)} were checked; its"
        else:
            digest.update(rows.source.digest().encode())
            how = f"its {len(rows)}"
        self.notes.tell(
            "tokenised_as_needed",
            f"{told}: {how} rows are tokenised when a step takes them; `rows_left_out` among the metrics counts those that are too long",
            card=entry.name,
            rows=len(rows),
        )
        return Source(entry.name, taken, count, partial(self._of_row, entry), digest.hexdigest())

    def _of_row(self, entry: Entry, row: Item | UserError) -> list[T]:
        """What a row gives, without what is too long. Raises UserError for one that cannot be used, unless such are left out."""
        try:
            if isinstance(row, UserError):
                raise row
            encoded = self.encode(replace(row, id=row.id + entry.mark))
        except UserError as error:
            if entry.own is None or entry.own.bad_rows == "refuse":
                raise UserError(f"{entry.called}: {error}\n{CURE}") from error
            return []
        kept = [item for item in encoded if self.tokens(item) <= self.room.tokens]
        if len(kept) < len(encoded) and entry.data.too_long == "refuse":
            raise UserError(f"{entry.called}: {row.id} has more than {self.room.tokens} tokens ({self.room.why})")
        return kept

    def _tell_compared(self, entry: Entry, loaded: LoadedSplit[Item]) -> None:
        """Note what the training data were compared with, and how many were left out since they occur in it."""
        found = ", ".join(f"{name} ({count} found)" for name, count in loaded.compared.items())
        dropped = loaded.dropped_contaminated
        self.notes.tell(
            "held_out",
            f"{entry.called}: training prompts were compared with {found or 'nothing'}; {dropped} left out",
            card=entry.name,
            compared=dict(loaded.compared),
            left_out=dropped,
        )
        if loaded.unchecked:
            self.notes.warn(
                f"{entry.called}: data.path is one file, so it could not be checked for prompts of its splits "
                f"{', '.join(loaded.unchecked)}; give a directory with a file for each split"
            )

    def _short_enough(self, items: list[T], entry: Entry, where: str) -> list[T]:
        """The items that there is room for. Raises UserError where the entry refuses longer ones, or all are."""
        counts = [self.tokens(item) for item in items]
        kept = [item for item, count in zip(items, counts, strict=True) if count <= self.room.tokens]
        if len(kept) == len(items):
            return kept
        told = (
            f"{where}: {len(items) - len(kept)} of {len(items)} examples have more than "
            f"{self.room.tokens} tokens ({self.room.why}), the longest {max(counts)}"
        )
        if entry.data.too_long == "refuse":
            raise UserError(f"{told}; give them more room, or leave data.too_long out, and they are left out")
        if not kept:
            raise UserError(f"{told}: none is left; give them more room")
        left_out = len(items) - len(kept)
        self.notes.warn(f"{told}: they are left out", card=entry.name, too_long=left_out, examples=len(items))
        return kept
