"""Which examples a step takes: a function of (seed, step), so that a resumed run goes on where it stopped."""

from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import TypeVar

T = TypeVar("T")


def examples_of_step(examples: Sequence[T], count: int, *, seed: int, step: int) -> list[T]:
    """The `count` examples of a step: every example once an epoch, in an order drawn anew for each epoch.

    Within a step no example comes twice; so `count` may not be more than there are.
    """
    total = len(examples)
    if count > total:
        raise ValueError(f"a step takes {count} examples, but there are only {total}")
    epoch_steps = total // count
    epoch, place = divmod(step, epoch_steps)
    order = permutation(total, seed, epoch)
    return [examples[i] for i in order[place * count : (place + 1) * count]]


@lru_cache(maxsize=4)
def permutation(total: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of 0..total-1."""
    order = list(range(total))
    Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
