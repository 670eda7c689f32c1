r"""Sums and differences of two numbers below 100, with solutions a tiny model can learn to write.

All 20,000 problems are known in advance. A problem and its mirror image (`A + B` and `B + A`, `A - B` and
`B - A`) share a split, or the answer to a held-out problem could be read off a problem trained on.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Literal

from align.data.drawing import fraction, split_of
from align.data.types import Example, Share, SplitName

Operation = Literal["+", "-"]
LARGEST = 99


def generate(
    split: SplitName,
    *,
    worked_share: Share = 0.45,
    worked_differences: Share | None = None,
    seed: int,
    domain: str = "arithmetic",
) -> list[Example]:
    """The problems of `split`, each with one demonstration; `seed` draws which of the two kinds.

    About `worked_share` of the demonstrations are worked out, the others give the answer alone; the metadata
    says which (`kind`). `worked_differences` is the share for subtractions, where it is another. Draws of one seed are
    nested: a larger share only turns direct ones into worked ones.
    """
    shares = {"+": worked_share, "-": worked_share if worked_differences is None else worked_differences}
    return [
        _example(a, operation, b, split, worked_share=shares[operation], seed=seed, domain=domain)
        for a, operation, b in problems_of(split)
    ]


def problems() -> Iterator[tuple[int, Operation, int]]:
    """All 20,000 problems."""
    operations: tuple[Operation, ...] = ("+", "-")
    for operation, a, b in product(operations, range(LARGEST + 1), range(LARGEST + 1)):
        yield a, operation, b


@cache
def problems_of(split: SplitName) -> list[tuple[int, Operation, int]]:
    """The problems of a split, in the order of `problems`."""
    return [problem for problem in problems() if problem_split(*problem) == split]


def question(a: int, operation: Operation, b: int) -> str:
    return f"What is {a} {operation} {b}?"


def result(a: int, operation: Operation, b: int) -> int:
    return a + b if operation == "+" else a - b


def problem_level(a: int, operation: Operation, b: int) -> int:
    """1: two one-digit numbers; 2: the units neither carry nor borrow; 3: they do.

    A negative difference is as hard as its mirror image, which is what a solution works out.
    """
    if a < 10 and b < 10:
        return 1
    if operation == "-" and a < b:
        a, b = b, a
    crosses = a % 10 + b % 10 >= 10 if operation == "+" else a % 10 < b % 10
    return 3 if crosses else 2


def problem_split(a: int, operation: Operation, b: int) -> SplitName:
    """The split that the problem and its mirror image belong to, drawn once and for all by a hash."""
    return split_of(f"{min(a, b)}{operation}{max(a, b)}")


def direct_solution(a: int, operation: Operation, b: int) -> str:
    r"""The answer alone: `\boxed{85}`."""
    return rf"\boxed{{{result(a, operation, b)}}}"


def worked_solution(a: int, operation: Operation, b: int) -> str:
    r"""The units, then the tens with what they carry, then the answer.

    `7+8=15, 3+4+1=8 \boxed{85}` for 37 + 48; `13-7=6, 5-2-1=2 \boxed{26}` for 53 - 27;
    `45-3: 5-3=2, 4-0=4 \boxed{-42}` for 3 - 45.
    """
    swapped = operation == "-" and a < b
    if swapped:
        a, b = b, a
    steps = _sum_steps(a, b) if operation == "+" else _difference_steps(a, b)
    head = f"{a}-{b}: " if swapped else ""
    answer = b - a if swapped else result(a, operation, b)
    return rf"{head}{steps} \boxed{{{answer}}}"


def _sum_steps(a: int, b: int) -> str:
    units = a % 10 + b % 10
    carry = units // 10
    tens = a // 10 + b // 10 + carry
    carried = "+1" if carry else ""
    return f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{carried}={tens}"


def _difference_steps(a: int, b: int) -> str:
    borrow = int(a % 10 < b % 10)
    units = a % 10 + 10 * borrow
    tens = a // 10 - b // 10 - borrow
    borrowed = "-1" if borrow else ""
    return f"{units}-{b % 10}={units - b % 10}, {a // 10}-{b // 10}{borrowed}={tens}"


def _example(
    a: int, operation: Operation, b: int, split: SplitName, *, worked_share: float, seed: int, domain: str
) -> Example:
    key = f"{a}{operation}{b}"
    worked = fraction(f"{seed}:{key}") < worked_share
    return Example(
        id=f"nano_math/{split}/{key}",
        messages=({"role": "user", "content": question(a, operation, b)},),
        response=worked_solution(a, operation, b) if worked else direct_solution(a, operation, b),
        answer=str(result(a, operation, b)),
        domain=domain,
        level=problem_level(a, operation, b),
        metadata={"kind": "worked" if worked else "direct"},
    )
