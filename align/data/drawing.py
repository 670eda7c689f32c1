"""What is drawn: the split that a prompt belongs to, by a hash, and the items of the training data that a step takes."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Generic, TypeVar

from align.data.types import SplitName, normalised

T = TypeVar("T")


def fraction(key: str) -> float:
    """A number in [0, 1), the same for the same key on every machine, and otherwise as good as random."""
    # Of six bytes, which a float holds exactly, so that it is below 1.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def split_of(key: str, *, train: float = 0.90, validation: float = 0.05) -> SplitName:
    """The split that a generated problem belongs to, drawn once and for all by a hash of its key; the rest is the test's."""
    share = fraction(key)
    if share < train:
        return "train"
    return "validation" if share < train + validation else "test"


def percentile(prompt: str) -> int:
    """Where a published prompt lies in the order of the hashes, 0 to 99. Rows of the same prompt stay together."""
    return int.from_bytes(hashlib.sha256(normalised(prompt).encode()).digest()[:8], "big") % 100


def held_out_keys(keys: Iterable[str], share: float, splits: Sequence[SplitName]) -> dict[str, SplitName]:
    """The split of each key that is held out: `share` of them for each of `splits`, and at least one.

    A hash of the key draws, so that a key stays where it is when others are added to the data; only the one that a split has for want
    of any other does not.
    """
    left = {key: fraction(key) for key in keys}
    drawn_for: dict[str, SplitName] = {}
    for place, split in enumerate(splits, start=1):
        last = [max(left, key=lambda key: (left[key], key))] if left else []
        chosen = [key for key, at in left.items() if at >= 1 - place * share] or last
        drawn_for |= dict.fromkeys(chosen, split)
        left = {key: at for key, at in left.items() if key not in drawn_for}
    return drawn_for


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
