"""Small Python functions of one number, with hidden tests: two or three steps in words, to be written as code.

Every problem is known in advance: all chains of one and of two steps, and a fixed draw of those of three.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from align.data.drawing import fraction, split_of
from align.data.types import Example, Share, SplitName

THREE_STEPS_SHARE = 0.05
"""Of all chains of three steps, which are 140,608."""
INPUTS = (-37, -8, -1, 0, 1, 6, 13, 58)
FENCE = "```"


@dataclass(frozen=True)
class Operation:
    """What a kind of step does to x with its constant k, and its code as it should be and as it is written in a hurry.

    In both codes `{x}` stands for what the step is applied to.
    """

    apply: Callable[[int, int], int]
    code: str
    hurried: str
    constants: range = range(1, 10)


OPERATIONS = {
    "add": Operation(operator.add, "{x} + {k}", "{x} + {k}"),
    "subtract": Operation(operator.sub, "{x} - {k}", "{x} - {k}"),
    "times": Operation(operator.mul, "{x} * {k}", "{x} * {k}", range(2, 10)),
    "modulo": Operation(operator.mod, "{x} % {k}", "{x} % {k}", range(2, 10)),
    "at most": Operation(min, "min({x}, {k})", "max({x}, {k})"),
    "at least": Operation(max, "max({x}, {k})", "min({x}, {k})"),
}


@dataclass(frozen=True)
class Step:
    """An operation, by its name, with its constant."""

    name: str
    constant: int

    @property
    def words(self) -> str:
        return f"{self.name} {self.constant}"

    def apply(self, x: int) -> int:
        return OPERATIONS[self.name].apply(x, self.constant)

    def code(self, x: str) -> str:
        return OPERATIONS[self.name].code.format(x=x, k=self.constant)

    def hurried(self, x: str) -> str:
        return OPERATIONS[self.name].hurried.format(x=x, k=self.constant)


def steps() -> list[Step]:
    """All steps."""
    return [Step(name, constant) for name, operation in OPERATIONS.items() for constant in operation.constants]


Chain = tuple[Step, ...]


def generate(split: SplitName, *, stepwise_share: Share = 0.45, seed: int, domain: str = "code") -> list[Example]:
    """The problems of `split`, each with one demonstration; `seed` draws which of the two kinds.

    About `stepwise_share` of the demonstrations have a statement for each step, and are right. The others were
    written in a hurry: one expression without brackets, with `min` and `max` mixed up, right only where precedence
    happens to suit. The metadata says which (`kind`), and has the hidden tests (`tests`).
    """
    return [
        _example(chain, split, stepwise_share=stepwise_share, seed=seed, domain=domain)
        for chain in chains()
        if problem_split(chain) == split
    ]


def chains() -> Iterator[Chain]:
    """All problems."""
    every = steps()
    yield from product(every)
    yield from product(every, repeat=2)
    for chain in product(every, repeat=3):
        if fraction(f"three:{question(chain)}") < THREE_STEPS_SHARE:
            yield chain


def question(chain: Chain) -> str:
    return f"Write f(x): {', '.join(step.words for step in chain)}."


def result(chain: Chain, x: int) -> int:
    for step in chain:
        x = step.apply(x)
    return x


def problem_split(chain: Chain) -> SplitName:
    """The split of a problem, drawn once and for all by a hash of its steps whatever their order."""
    return split_of(", ".join(sorted(step.words for step in chain)))


def stepwise_solution(chain: Chain) -> str:
    """A statement for each step."""
    return _program([*(f"x = {step.code('x')}" for step in chain), "return x"])


def hurried_solution(chain: Chain) -> str:
    """All steps in one expression, as they are written in a hurry and without brackets: `x + 3 * 2` for "add 3, times 2"."""
    expression = "x"
    for step in chain:
        expression = step.hurried(expression)
    return _program([f"return {expression}"])


def hidden_tests(chain: Chain) -> dict[str, Any]:
    """Tests as the reward `code_tests` reads them."""
    return {
        "kind": "function",
        "entry_point": "f",
        "cases": [{"args": [x], "expected": result(chain, x)} for x in INPUTS],
    }


def _program(body: Sequence[str]) -> str:
    lines = "".join(f"\n    {line}" for line in body)
    return f"{FENCE}python\ndef f(x):{lines}\n{FENCE}"


def _example(chain: Chain, split: SplitName, *, stepwise_share: float, seed: int, domain: str) -> Example:
    stepwise = fraction(f"{seed}:{question(chain)}") < stepwise_share
    return Example(
        id=f"nano_code/{split}/{', '.join(step.words for step in chain)}",
        messages=({"role": "user", "content": question(chain)},),
        response=stepwise_solution(chain) if stepwise else hurried_solution(chain),
        answer=None,
        domain=domain,
        level=len(chain),
        metadata={"kind": "stepwise" if stepwise else "hurried", "tests": hidden_tests(chain)},
    )
