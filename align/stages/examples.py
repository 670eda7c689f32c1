"""Which examples a stage trains on, and which of them a step takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Generic, TypeVar

from align.config import DataOptions, Recipe
from align.data.cards import load_card, require_stage
from align.data.loader import load_split
from align.data.types import Example, LoadedSplit, SplitName
from align.errors import UserError
from align.stages.run import Run

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source(Generic[T]):
    """What one entry of `recipe.data` gives, and how many of it a step takes."""

    card: str
    items: Sequence[T]
    a_step: int


def training_sources(recipe: Recipe, run: Run, *, a_step: int, a_step_key: str) -> list[Source[Example]]:
    """The examples that `recipe.data` names, `a_step` of them a step; warns of held-out problems among them.

    Raises UserError where an entry has fewer examples than a step takes of it.
    """
    sources = []
    for data, count in zip(recipe.data, shares(a_step, [data.share for data in recipe.data]), strict=True):
        loaded = load_examples(recipe, data, data.split, limit=data.limit)
        if loaded.dropped_contaminated:
            run.warn(f"{loaded.dropped_contaminated} training examples are held-out problems too and were left out")
        if loaded.unchecked:
            run.warn(
                f"data.path is one file, so it could not be checked for problems of the held-out splits "
                f"{', '.join(loaded.unchecked)}; give a directory with a file for each split"
            )
        if not 1 <= count <= len(loaded.examples):
            takes = f", of which data card {data.card!r} is to give {count}," if len(recipe.data) > 1 else ""
            raise UserError(
                f"{a_step_key} is {a_step},{takes} but data card {data.card!r} gives only {len(loaded.examples)} examples"
                if count
                else f"{a_step_key} is {a_step}: the share of data card {data.card!r} is less than one example a step"
            )
        sources.append(Source(data.card, loaded.examples, count))
    return sources


def load_examples(recipe: Recipe, data: DataOptions, split: SplitName, *, limit: int | None) -> LoadedSplit:
    """A split of a training card. Raises UserError where the card is not meant for the stage."""
    card = load_card(data.card)
    require_stage(card, recipe.data_stage)
    return load_split(
        card, split, path=data.path, limit=limit, levels=data.levels, seed=recipe.seed, params=data.params
    )


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to `weights`, by largest remainders: whole numbers that add up to it."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def items_of_step(sources: Sequence[Source[T]], *, seed: int, step: int) -> list[T]:
    """What a step takes, the sources evenly mixed. A function of (seed, step): a resumed run goes on where it stopped."""
    placed = [
        ((place + 0.5) / source.a_step, number, item)
        for number, source in enumerate(sources)
        for place, item in enumerate(drawn(source.items, source.a_step, seed=seed, step=step))
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def drawn(items: Sequence[T], count: int, *, seed: int, step: int) -> list[T]:
    """The `count` items of a step: each once an epoch, in an order drawn anew for each epoch, none twice in a step."""
    total = len(items)
    if count > total:
        raise ValueError(f"a step takes {count} examples, but there are only {total}")
    epoch_steps = total // count
    epoch, place = divmod(step, epoch_steps)
    order = permutation(total, seed, epoch)
    return [items[i] for i in order[place * count : (place + 1) * count]]


@lru_cache(maxsize=8)
def permutation(total: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of 0..total-1."""
    order = list(range(total))
    Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
