"""Which items of the training data a step takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source(Generic[T]):
    """What one entry of `recipe.data` gives, and how many of it a step takes. `card` is the entry's name."""

    card: str
    items: Sequence[T]
    a_step: int


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
