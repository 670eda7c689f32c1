"""Which examples a stage trains on."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

from align.data.cards import DataCard, load_card, require_stage
from align.data.drawing import Source, shares
from align.data.loader import load_split
from align.data.preferences import LoadedPreferences
from align.data.types import Example, LoadedSplit, SplitName
from align.errors import UserError
from align.recipe import DataOptions, Recipe
from align.session.run import Run

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of `recipe.data`. `mark` is what the ids of a card's second entry end in, and its name: "@2"; empty for a first one."""

    data: DataOptions
    card: DataCard
    mark: str = ""

    @property
    def name(self) -> str:
        return self.data.card + self.mark


@dataclass(frozen=True, slots=True)
class Room:
    """How many tokens an example may have, and which keys say so."""

    tokens: int
    why: str


def entries_of(recipe: Recipe) -> list[Entry]:
    """The entries of `recipe.data`. Those that differ in their share alone are one, of which a step takes both shares."""
    distinct: list[DataOptions] = []
    for data in recipe.data:
        alike = [
            place for place, other in enumerate(distinct) if data == other.model_copy(update={"share": data.share})
        ]
        if alike:
            both = distinct[alike[0]].share + data.share
            distinct[alike[0]] = data.model_copy(update={"share": both})
        else:
            distinct.append(data)
    entries: list[Entry] = []
    for data in distinct:
        card = load_card(data.card)
        before = sum(entry.card.name == card.name for entry in entries)
        entries.append(Entry(data, card, f"@{before + 1}" if before else ""))
    return entries


def training_sources(
    recipe: Recipe,
    run: Run,
    *,
    a_step: int,
    a_step_key: str,
    held_out: Mapping[str, Collection[str]],
    encode: Callable[[Example], T],
    tokens: Callable[[T], int],
    room: Room,
) -> list[Source[T]]:
    """The examples that `recipe.data` names, as `encode` makes them, `a_step` of them a step; the run notes what was left out.

    `held_out`: prompts that may not be among them, by what they are of. Raises UserError where an entry has fewer examples
    than a step takes of it.
    """
    sources = []
    entries = entries_of(recipe)
    for entry, count in zip(entries, shares(a_step, [entry.data.share for entry in entries]), strict=True):
        loaded = load_examples(recipe, entry, entry.data.split, limit=entry.data.limit, held_out=held_out)
        tell_compared(run, entry, loaded)
        encoded = [encode(example) for example in loaded.examples]
        fitting = short_enough(encoded, list(map(tokens, encoded)), room, entry, entry.data.split, run)
        if not 1 <= count <= len(fitting):
            takes = f", of which data card {entry.name!r} is to give {count}," if len(entries) > 1 else ""
            raise UserError(
                f"{a_step_key} is {a_step},{takes} but data card {entry.name!r} gives only {len(fitting)} examples"
                if count
                else f"{a_step_key} is {a_step}: the share of data card {entry.name!r} is less than one example a step"
            )
        sources.append(Source(entry.name, fitting, count))
    return sources


def load_examples(
    recipe: Recipe,
    entry: Entry,
    split: SplitName,
    *,
    limit: int | None,
    held_out: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> LoadedSplit:
    """A split of an entry, its ids unlike those of other entries. Raises UserError where the card is not meant for the stage."""
    data = entry.data
    require_stage(entry.card, recipe.data_stage)
    loaded = load_split(
        entry.card,
        split,
        path=data.path,
        limit=limit,
        levels=data.levels,
        seed=recipe.seed,
        params=data.params,
        held_out=held_out,
    )
    return replace(loaded, examples=[replace(example, id=example.id + entry.mark) for example in loaded.examples])


def tell_compared(run: Run, entry: Entry, loaded: LoadedSplit | LoadedPreferences) -> None:
    """Note what the training data were compared with, and how many were left out since they occur in it."""
    found = ", ".join(f"{name} ({count} found)" for name, count in loaded.compared.items())
    dropped = loaded.dropped_contaminated
    run.tell(
        "held_out",
        f"data card {entry.name}: training prompts were compared with {found or 'nothing'}; {dropped} left out",
        card=entry.name,
        compared=dict(loaded.compared),
        left_out=dropped,
    )
    if loaded.unchecked:
        run.warn(
            f"data card {entry.name}: data.path is one file, so it could not be checked for prompts of its splits "
            f"{', '.join(loaded.unchecked)}; give a directory with a file for each split"
        )


def short_enough(
    items: Sequence[T], tokens: Sequence[int], room: Room, entry: Entry, split: SplitName, run: Run
) -> list[T]:
    """The items that there is room for; the run notes how many there are not. Raises UserError where the entry refuses them, or all are."""
    kept = [item for item, count in zip(items, tokens, strict=True) if count <= room.tokens]
    if len(kept) == len(items):
        return kept
    told = (
        f"data card {entry.name}, split {split}: {len(items) - len(kept)} of {len(items)} examples have more than {room.tokens} tokens "
        f"({room.why}), the longest {max(tokens)}"
    )
    if entry.data.too_long == "refuse":
        raise UserError(f"{told}; give them more room, or leave data.too_long out, and they are left out")
    if not kept:
        raise UserError(f"{told}: none is left; give them more room")
    run.warn(f"{told}: they were left out", card=entry.name, too_long=len(items) - len(kept), examples=len(items))
    return kept
