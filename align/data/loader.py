"""The examples of a split of a data card, held apart from what they will be evaluated on."""

import inspect
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from align.data.cards import DataCard, GeneratorSource, ReasoningGymSource, check
from align.data.generators import GIVEN, generator, reasoning_gym_task
from align.data.tables import comparable, normalised, read_table
from align.data.types import Example, LoadedSplit, SplitName
from align.errors import UserError, naming

T = TypeVar("T")

HELD_OUT_FROM: Mapping[SplitName, tuple[SplitName, ...]] = {
    "train": ("validation", "test"),
    "validation": ("test",),
    "test": (),
}


def load_split(
    card: DataCard,
    split: SplitName,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    levels: Sequence[int] | None = None,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
    held_out: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> LoadedSplit:
    """The examples of `split`, in the order of the source, or `limit` of them after a shuffle by `seed`.

    Those whose prompt occurs in a split held out from this one, or in one of `held_out` (what it is called, and its prompts
    as `LoadedSplit.prompts` has them), are dropped and counted, before anything else is chosen. `path`: local file or
    directory in place of the hub, see `read_table`; with one file alone, some splits cannot be compared, and are named.
    `levels`: difficulties to keep. `seed` also draws what a generator leaves to chance. `params` go before those of the
    card's source. Raises UserError when nothing is left.
    """
    local = Path(path) if path is not None else None
    overrides = dict(params or {})
    others, unchecked = own_held_out(
        card, split, local, lambda name: [e.prompt_text for e in _read(card, name, local, seed, overrides)]
    )
    examples = _read(card, split, local, seed, overrides)
    clean, compared = without(examples, [normalised(e.prompt_text) for e in examples], held_together(others, held_out))
    dropped = len(examples) - len(clean)
    where = f"data card {card.name}, split {split}"
    chosen = _at_levels(clean, levels, where) if clean else []
    if not chosen:
        raise UserError(nothing_left(where, "examples", dropped, compared))
    return LoadedSplit(
        examples=[_instructed(example, card.instruction) for example in first(chosen, limit, seed)],
        dropped_contaminated=dropped,
        unchecked=unchecked,
        compared=compared,
        prompts=frozenset(normalised(example.prompt_text) for example in examples),
    )


def first(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """`limit` of the items after a shuffle by `seed`; all of them, in their order, where there is no limit."""
    chosen = list(items)
    if limit is not None:
        if limit < 1:
            raise UserError(f"a limit of {limit} leaves no examples; leave it out for all of them")
        random.Random(seed).shuffle(chosen)
        del chosen[limit:]
    return chosen


def held_out_splits(card: DataCard, split: SplitName) -> list[SplitName]:
    """The splits whose prompts may not occur in `split`. Raises UserError where the card has no such split."""
    if split not in card.splits:
        raise UserError(f"data card {card.name} has no split {split!r}, only {', '.join(sorted(card.splits))}")
    return [name for name in HELD_OUT_FROM[split] if name in card.splits and name in card.decontamination.against]


def own_held_out(
    card: DataCard, split: SplitName, path: Path | None, prompts: Callable[[SplitName], Iterable[str]]
) -> tuple[dict[str, set[str]], tuple[SplitName, ...]]:
    """The prompts that the card itself holds out from `split`, by "CARD/SPLIT", and the splits that `path` does not give."""
    held_out = held_out_splits(card, split)
    unchecked = tuple(name for name in held_out if not _comparable(card, split, name, path))
    found = {f"{card.name}/{n}": {normalised(p) for p in prompts(n)} for n in held_out if n not in unchecked}
    return found, unchecked


def held_together(*held_out: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """Several mappings of what is held out to its prompts as one."""
    together: dict[str, set[str]] = defaultdict(set)
    for name, prompts in (pair for each in held_out for pair in each.items()):
        together[name].update(prompts)
    return dict(together)


def without(
    items: Sequence[T], prompts: Sequence[str], held_out: Mapping[str, Collection[str]]
) -> tuple[list[T], dict[str, int]]:
    """The items whose prompt (at the same place in `prompts`) is in nothing held out, and how many are, by what it is."""
    compared = {name: sum(prompt in its_prompts for prompt in prompts) for name, its_prompts in held_out.items()}
    forbidden = set[str]().union(*held_out.values())
    return [item for item, prompt in zip(items, prompts, strict=True) if prompt not in forbidden], compared


def nothing_left(where: str, what: str, dropped: int, compared: Mapping[str, int]) -> str:
    """What to tell where a split has nothing that could be used."""
    found = ", ".join(f"{count} in {name}" for name, count in compared.items() if count)
    return f"{where}: no {what} ({dropped} dropped{', which are held out: ' + found if found else ''})"


def _read(card: DataCard, split: SplitName, path: Path | None, seed: int, params: dict[str, Any]) -> list[Example]:
    source = card.source
    if isinstance(source, GeneratorSource):
        return generated(card, source, generator(source.name).generate, split, path, seed, params)
    if isinstance(source, ReasoningGymSource):
        refuse_path(card, path)
        return reasoning_gym_task().generate_task(card, source, split, params)
    if params:
        raise UserError(f"data card {card.name} is not generated: it takes no params ({', '.join(params)})")
    return read_table(card, source, split, path)


def generated(
    card: DataCard,
    source: GeneratorSource,
    function: Callable[..., list[T]],
    split: SplitName,
    path: Path | None,
    seed: int,
    params: dict[str, Any],
) -> list[T]:
    """What a function of the card's generator makes; `params` go before those of the card, and it is given those that it takes."""
    refuse_path(card, path)
    merged = check(generator(source.name).params, source.params | params, where=f"params of data card {card.name}")
    taken = inspect.signature(function).parameters.keys() - set(GIVEN)
    with naming(f"data card {card.name}"):
        return function(split, **merged.model_dump(include=taken), seed=seed, domain=card.domain)


def refuse_path(card: DataCard, path: Path | None) -> None:
    """Raise UserError where a path is given for a card whose source has no files."""
    if path is not None:
        raise UserError(f"data card {card.name} is generated: it takes no path, and {path} would be ignored")


def _comparable(card: DataCard, split: SplitName, other: SplitName, path: Path | None) -> bool:
    if isinstance(card.source, GeneratorSource | ReasoningGymSource):
        return True
    return comparable(card.source, split, other, path)


def _at_levels(examples: list[Example], levels: Sequence[int] | None, where: str) -> list[Example]:
    if levels is None:
        return examples
    known = sorted({example.level for example in examples if example.level is not None})
    if unknown := sorted(set(levels) - set(known)):
        has = f"only {', '.join(map(str, known))}" if known else "none at all"
        raise UserError(f"{where}: no level {', '.join(map(str, unknown))}; there are {has}")
    return [example for example in examples if example.level in levels]


def _instructed(example: Example, instruction: str | None) -> Example:
    if instruction is None:
        return example
    *earlier, last = example.messages
    return replace(example, messages=(*earlier, {"role": last["role"], "content": f"{last['content']}\n{instruction}"}))
