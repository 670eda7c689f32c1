"""What is drawn: the split that a prompt belongs to, by a hash, and the items of the training data that a step takes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, zip_longest
from random import Random
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from align.data.types import SplitName, normalised
from align.errors import UserError

T = TypeVar("T")
Hashes = npt.NDArray[np.uint64]
BLOCK = 10_000
"""Rows of a stream that are shuffled together."""


def key_hash(key: str) -> int:
    """64 bits by which keys are told apart and drawn, the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def fraction(key: str) -> float:
    """A number in [0, 1), the same for the same key on every machine, and otherwise as good as random."""
    return fraction_of(key_hash(key))


def fraction_of(hashed: Any) -> Any:
    """What `fraction` is of a key with this hash, or of several in an array."""
    # Of 48 bits, which a float holds exactly, so that it is below 1.
    return (hashed >> np.uint64(16) if isinstance(hashed, np.ndarray) else hashed >> 16) / 2**48


def split_of(key: str, *, train: float = 0.90, validation: float = 0.05) -> SplitName:
    """The split that a generated problem belongs to, drawn once and for all by a hash of its key; the rest is the test's."""
    share = fraction(key)
    if share < train:
        return "train"
    return "validation" if share < train + validation else "test"


def percentile(prompt: str) -> int:
    """Where a published prompt lies in the order of the hashes, 0 to 99. Rows of the same prompt stay together."""
    return key_hash(normalised(prompt)) % 100


def held_out_places(hashes: Hashes, share: float, splits: int) -> npt.NDArray[np.int8]:
    """For keys of these hashes [N] the number of the split that holds it out, from 1 on, or 0 [N]: `share` of the keys for each split, and at
    least one.

    The hash draws, so that a key stays where it is when others are added to the data; only the one that a split has for want of any other
    does not.
    """
    at, found = fraction_of(hashes), np.zeros(len(hashes), dtype=np.int8)
    for split in range(1, splits + 1):
        left = found == 0
        chosen = left & (at >= 1 - split * share)
        if left.any() and not chosen.any():
            chosen = left & (at == at[left].max())
        found[chosen] = split
    return found


@dataclass(slots=True)
class Source(Generic[T]):
    """What one entry of `recipe.data` gives, and how many of it a step takes. `card` is the entry's name.

    `items` are what a step takes; with `encode` they are rows, each of which gives some items when a step takes it, or none, for want of room.
    """

    card: str
    items: Sequence[Any]
    a_step: int
    encode: Callable[[Any], Sequence[T]] | None = None
    digest: str = ""
    """A hash of the rows, where there is `encode`."""
    left_out: int = 0
    """How many rows the step that was drawn last left out."""


class Stream(Sequence[T]):
    """Rows that are read in turn, in blocks of BLOCK each of which is shuffled by itself; as a sequence, the first of them.

    `read` begins again at the first row whenever it is called. A stream that ends begins again.
    """

    def __init__(self, head: Sequence[T], read: Callable[[], Iterator[T]]):
        self._head, self._read = head, read
        self._rows, self._block = read(), list[T]()
        self._number = self._first = self._first_of_epoch = 0

    def __len__(self) -> int:
        return len(self._head)

    def __getitem__(self, place: Any) -> Any:
        return self._head[place]

    def block_of(self, step: int, count: int) -> tuple[list[T], int, int]:
        """The rows of the block that a step of `count` rows is in, the block's number, and how many of its steps come before.

        Going back begins again at the first row, and reads on from there. Raises UserError where no block has enough rows for a step.
        """
        if step < self._first:
            self._rows, self._block = self._read(), []
            self._number = self._first = self._first_of_epoch = 0
        while step >= self._first + len(self._block) // count:
            self._first += len(self._block) // count
            block = list(islice(self._rows, BLOCK))
            if not block:
                if self._first == self._first_of_epoch:
                    raise UserError(
                        f"a step takes {count} rows, and the stream has fewer in each of its blocks. Cure: a smaller step, or "
                        "leave out data.stream"
                    )
                self._first_of_epoch, self._rows = self._first, self._read()
            self._block, self._number = block, self._number + 1
        return self._block, self._number, step - self._first


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
    return [item for found in _mixed(sources, seed, step, 0) for item in found]


def refill_of_step(sources: Sequence[Source[T]], *, seed: int, step: int, round: int) -> list[T | None]:
    """For each item of a step what may take its place in a round of refill, from 1 on: an item of the same source.

    None where the source has no more of them: what a step and its rounds take are different rows. A function of (seed, step, round), for sources of
    whose rows each gives one item.
    """
    return [next(iter(found), None) for found in _mixed(sources, seed, step, round)]


def _mixed(sources: Sequence[Source[T]], seed: int, step: int, round: int) -> list[Sequence[T]]:
    """What each row gives that the sources' parts of a step consist of, evenly mixed; of a later round some may be empty."""
    placed: list[tuple[float, int, Sequence[T]]] = []
    for number, source in enumerate(sources):
        rows = zip_longest(range(source.a_step), _of_step(source, seed, step, round), fillvalue=())
        placed += [
            ((place + 0.5) / source.a_step, number, found) for place, found in enumerate(found for _, found in rows)
        ]
    return [found for _, _, found in sorted(placed, key=lambda entry: entry[:2])]


def left_out(sources: Sequence[Source[Any]]) -> dict[str, int]:
    """The metric of a step that says how many rows it left out; none where all were encoded before the start."""
    counts = [source.left_out for source in sources if source.encode is not None]
    return {"rows_left_out": sum(counts)} if counts else {}


def _of_step(source: Source[T], seed: int, step: int, round: int) -> Iterator[Sequence[T]]:
    """What the rows of a step give: each row once an epoch, in an order drawn anew for each epoch, and none twice in a step. In the place of a row that gives nothing comes one of those half an epoch (of a stream, half a block) on, so that what a step takes
    depends on no other step. A later round has as many of the rows that come there next, or fewer at the end."""
    items, count = source.items, source.a_step
    if isinstance(items, Stream):
        items, epoch, place = items.block_of(step, count)
    elif count > len(items):
        raise ValueError(f"a step takes {count} examples, but there are only {len(items)}")
    else:
        epoch, place = divmod(step, len(items) // count)
    total, start = len(items), place * count
    order = permutation(total, seed, epoch)
    others = (order[(start + total // 2 + place) % total] for place in range(total))
    own = order[start : start + count]
    encode = source.encode or (lambda item: [item])
    source.left_out, taken = 0, 0
    for i in chain(own, (other for other in others if other not in own)):
        if found := encode(items[i]):
            if taken >= round * count:
                yield found
            taken += 1
        else:
            source.left_out += 1
        if taken == (round + 1) * count:
            return
    if not round:
        raise UserError(
            f"{source.card}: too few of its rows can be trained on: {taken} of {count} for step {step + 1}. Cure: a smaller step, "
            "or a longer rollout.max_length where rows have no room"
        )


@lru_cache(maxsize=8)
def permutation(total: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of 0..total-1."""
    order = list(range(total))
    Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
