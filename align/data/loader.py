"""The examples or preferences of a split of a data card, held apart from what they will be evaluated on."""

import inspect
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from align.data.cards import DataCard, FileSource, GeneratorSource, HubSource, OwnSource, ReasoningGymSource, check
from align.data.drawing import Hashes, key_hash
from align.data.forms import Kind
from align.data.generators import GIVEN, generator, reasoning_gym_task
from align.data.own import Rows, earlier_keys, opening_of, prompts_of, read_source, read_split
from align.data.tables import read_examples, read_preferences
from align.data.types import Example, Item, LoadedSplit, Message, Preference, SplitName
from align.errors import UserError, naming

T = TypeVar("T")
HeldOutPrompts = Mapping[str, Collection[int]]
"""The hash of the `prompt_key` of prompts that may not be trained on, by what they are of, such as "math/test"."""

HELD_OUT_FROM: Mapping[SplitName, tuple[SplitName, ...]] = {
    "train": ("validation", "test"),
    "validation": ("test",),
    "test": (),
}
NOTHING: HeldOutPrompts = MappingProxyType({})


def load_split(
    card: DataCard,
    split: SplitName,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    levels: Sequence[int] | None = None,
    demanded: bool = True,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
    held_out: HeldOutPrompts = NOTHING,
) -> LoadedSplit[Example]:
    """The examples of `split`, of pairs without a card their prompts, in the order of the source, or `limit` of them after a shuffle by `seed`.

    Those whose prompt occurs in a split held out from this one, or in `held_out`, are dropped and counted, before anything
    else is chosen. `path`: local file or directory in place of the hub, see `align.data.tables.table_rows`; with one file
    alone, some splits cannot be compared, and are named. `levels`: difficulties to keep, each of which must be there if they
    are `demanded`. `seed` also draws what a generator leaves to chance. `params` go before those of the card's source. Raises UserError when nothing is left.
    """
    read = _reader(card, _examples, path, seed, params)
    loaded = _load(card, split, read, path, held_out, lambda found, where: _at_levels(found, levels, demanded, where))
    chosen = first(loaded.examples, limit, seed)
    if card.instruction is not None:
        chosen = [_instructed(example, card.instruction) for example in chosen]
    return replace(loaded, examples=chosen)


def load_preferences(
    card: DataCard,
    split: SplitName,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
    held_out: HeldOutPrompts = NOTHING,
) -> LoadedSplit[Preference]:
    """The preferences of `split`, read and held apart as `load_split` does with examples.

    Raises UserError, with file and row, for a row that cannot be used, and when nothing is left.
    """
    loaded = _load(card, split, _reader(card, _preferences, path, seed, params), path, held_out)
    return replace(loaded, examples=first(loaded.examples, limit, seed))


def first(items: Sequence[T], limit: int | None, seed: int) -> Sequence[T]:
    """`limit` of the items after a shuffle by `seed`; all of them, in their order, where there is no limit."""
    if limit is None:
        return items
    if limit < 1:
        raise UserError(f"a limit of {limit} leaves no examples; leave it out for all of them")
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return picked(items, np.array(order[:limit], dtype=np.int64))


def picked(items: Sequence[T], places: npt.NDArray[np.int64]) -> Sequence[T]:
    """The items at these places; those of files stay there until they are needed."""
    if isinstance(items, Rows):
        return Rows(items.source, items.places[places])
    return [items[place] for place in places]


def prompt_hashes(items: Sequence[Example] | Sequence[Preference]) -> Hashes:
    """The hash of the `prompt_key` of each [N]."""
    if isinstance(items, Rows):
        return items.prompts
    return np.array([key_hash(item.prompt_key) for item in items], dtype=np.uint64)


def opening_hashes(items: Sequence[Example] | Sequence[Preference]) -> Hashes:
    """The hash of what the user says first [N]: a conversation that goes on from a held-out prompt is trained on in its first turn too."""
    if isinstance(items, Rows):
        return items.openings
    return np.array([key_hash(opening_of(item)) for item in items], dtype=np.uint64)


def go_on_from(items: Sequence[Example] | Sequence[Preference], prompts: Hashes) -> npt.NDArray[np.bool_]:
    """Whether each item [N] is a conversation that goes on from one of these prompts of several turns."""
    if isinstance(items, Rows):
        return items.go_on_from(prompts)
    theirs = set(prompts.tolist())
    return np.array([not theirs.isdisjoint(map(key_hash, earlier_keys(item))) for item in items], dtype=np.bool_)


def held_together(*held_out: HeldOutPrompts) -> dict[str, set[int]]:
    """Several mappings of what is held out to its prompts as one."""
    together: dict[str, set[int]] = defaultdict(set)
    for name, prompts in (pair for each in held_out for pair in each.items()):
        together[name].update(prompts)
    return dict(together)


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


def _load(
    card: DataCard,
    split: SplitName,
    read: Callable[[SplitName], Sequence[Item]],
    path: str | Path | None,
    held_out: HeldOutPrompts,
    choose: Callable[[Sequence[Item], str], Sequence[Item]] = lambda found, where: found,
) -> LoadedSplit[Item]:
    """The split without what is held out from it, of which `choose` leaves something."""
    if split not in card.splits:
        raise UserError(f"{card.called} has no split {split!r}, only {', '.join(sorted(card.splits))}")
    own = [name for name in HELD_OUT_FROM[split] if name in card.splits and name in card.decontamination.against]
    unchecked = tuple(name for name in own if not _comparable(card, split, name, path))
    others = {f"{card.name}/{name}": prompt_hashes(read(name)).tolist() for name in own if name not in unchecked}
    found = read(split)
    keys, openings = prompt_hashes(found), opening_hashes(found)
    occurs: dict[str, npt.NDArray[np.bool_]] = {
        name: np.isin(keys, theirs := np.fromiter(prompts, dtype=np.uint64))
        | np.isin(openings, theirs)
        | go_on_from(found, theirs)
        for name, prompts in held_together(others, held_out).items()
    }
    compared = {name: int(places.sum()) for name, places in occurs.items()}
    clean = picked(found, np.flatnonzero(~np.any([*occurs.values(), np.zeros(len(keys), dtype=bool)], axis=0)))
    dropped = len(found) - len(clean)
    where = f"{card.called}, split {split}"
    chosen = choose(clean, where) if clean else []
    if not chosen:
        held = ", ".join(f"{count} in {name}" for name, count in compared.items() if count)
        raise UserError(f"{where}: no examples ({dropped} dropped{', which are held out: ' + held if held else ''})")
    return LoadedSplit(chosen, dropped, unchecked, compared, keys)


def _reader(
    card: DataCard,
    read: Callable[[DataCard, SplitName, Path | None, int, dict[str, Any]], Sequence[T]],
    path: str | Path | None,
    seed: int,
    params: Mapping[str, Any] | None,
) -> Callable[[SplitName], Sequence[T]]:
    """`read` as a function of the split. Raises UserError for a path or params that the card has no use for."""
    generated = isinstance(card.source, GeneratorSource | ReasoningGymSource)
    if generated and path is not None:
        raise UserError(f"{card.called} is generated: it takes no path, and {path} would be ignored")
    if params and not generated:
        raise UserError(f"{card.called} is not generated: it takes no params ({', '.join(params)})")
    local = Path(path) if path is not None else None
    return lambda split: read(card, split, local, seed, dict(params or {}))


def _examples(
    card: DataCard, split: SplitName, path: Path | None, seed: int, params: dict[str, Any]
) -> Sequence[Example]:
    match card.source:
        case GeneratorSource() as source:
            return _generated(card, source, generator(source.name).generate, split, seed, params)
        case ReasoningGymSource() as source:
            made: list[Example] = reasoning_gym_task().generate_task(card, source, split, params)
            return made
        case OwnSource() as source:
            rows = read_split(source, split)
            return prompts_of(_of_kind(rows, {"pairs"})) or _of_kind(rows, {"conversations", "problems"})
        case source:
            return read_examples(card, source, split, path)


def _preferences(
    card: DataCard, split: SplitName, path: Path | None, seed: int, params: dict[str, Any]
) -> Sequence[Preference]:
    source = card.source
    if isinstance(source, HubSource | FileSource):
        return read_preferences(card, source, split, path)
    if isinstance(source, GeneratorSource) and (preferences := generator(source.name).preferences):
        return _generated(card, source, preferences, split, seed, params)
    if isinstance(source, OwnSource):
        return _of_kind(read_split(source, split), {"pairs"})
    raise UserError(f"{card.called} has no preferences to train a reward model on")


def _of_kind(rows: Rows, kinds: Collection[Kind]) -> Sequence[Any]:
    return rows if rows.source.form.kind in kinds else ()


def _generated(
    card: DataCard,
    source: GeneratorSource,
    function: Callable[..., list[T]],
    split: SplitName,
    seed: int,
    params: dict[str, Any],
) -> list[T]:
    """What a function of the card's generator makes, given those of the params that it takes."""
    merged = check(generator(source.name).params, source.params | params, where=f"params of data card {card.name}")
    taken = inspect.signature(function).parameters.keys() - set(GIVEN)
    with naming(f"data card {card.name}"):
        return function(split, **merged.model_dump(include=taken), seed=seed, domain=card.domain)


def domains_of(card: DataCard) -> list[str]:
    """The domains of a card's examples: its own, or those that the rows of data without a card say."""
    if not isinstance(card.source, OwnSource):
        return [card.domain]
    return list(dict.fromkeys(domain for rows in read_source(card.source).values() for domain in rows.domains))


def _comparable(card: DataCard, split: SplitName, other: SplitName, path: str | Path | None) -> bool:
    """Whether `other` can be read too, where `path` was given for `split`."""
    if path is None or Path(path).is_dir() or not isinstance(card.source, HubSource | FileSource):
        return True
    return card.source.splits[split].table == card.source.splits[other].table


def _at_levels(
    examples: Sequence[Example], levels: Sequence[int] | None, demanded: bool, where: str
) -> Sequence[Example]:
    if levels is None:
        return examples
    found = [example.level for example in examples]
    known = sorted({level for level in found if level is not None})
    unknown = sorted(set(levels) - set(known))
    if unknown and (demanded or len(unknown) == len(set(levels))):
        has = f"only {', '.join(map(str, known))}" if known else "none at all"
        raise UserError(f"{where}: no level {', '.join(map(str, unknown))}; there are {has}")
    return picked(examples, np.array([place for place, level in enumerate(found) if level in levels], dtype=np.int64))


def _instructed(example: Example, instruction: str) -> Example:
    def told(turns: tuple[Message, ...]) -> tuple[Message, ...]:
        last: list[Message] = [{**turn, "content": f"{turn['content']}\n{instruction}"} for turn in turns[-1:]]
        return (*turns[:-1], *last)

    conversation = (*told(example.conversation[:-1]), *example.conversation[-1:])
    return replace(example, messages=told(example.messages), conversation=conversation)
