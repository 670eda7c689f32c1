"""Answers to reasoning_gym tasks, judged by the task's own verifier and held to exact equality besides.

The verifiers, as read in reasoning_gym 0.1.25, are made for evaluation, not for an optimiser that looks for
holes. That of gsm_symbolic takes the first number it finds and overlooks its sign: "-288" and "288 or 5" get
full marks for 288. The Decimal comparison of chain_sum reads digits of every script. The default gives "15"
half the marks for 5, because it contains it. Others give the answer to sympy or to eval. Hence three
restrictions:

- only tasks in `PLAIN_TASKS`, whose ground truth is one decimal number and whose verifier compares strings,
  Decimals or floats and neither evaluates the answer nor raises on it;
- a full mark passes and anything less is wrong: there is no partial credit;
- an answer passes only if it also is `equal` to the ground truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from reward.final_answer import equal, normalise, sole_answer, verdict_detail
from reward.registry import register
from reward.types import Sample, Score, UnusableAnswer, Verdict

PLAIN_TASKS = frozenset(
    {
        # compute_decimal_reward, or its own comparison of Decimals
        "chain_sum",
        "decimal_chain_sum",
        "products",
        # a regular expression, then floats
        "gsm_symbolic",
        # the default of ProceduralDataset: comparison of strings
        "basic_arithmetic",
        "count_bits",
        "count_primes",
        "gcd",
        "lcm",
        "leg_counting",
        "letter_counting",
        "number_sequence",
        "simple_equations",
    }
)


@register("reasoning_gym")
def reasoning_gym_answer(sample: Sample) -> Score:
    r"""Whether the last `\boxed{}` solves the reasoning_gym task in the metadata: 1 or 0.

    `sample.metadata["reasoning_gym"]` is `{"task": name, "entry": row}`, the row as the task generated it.
    Several different boxed answers are wrong. Raises UnusableAnswer where that is missing or the task is not
    in `PLAIN_TASKS`.
    """
    task, entry = _task_and_entry(sample)
    answer = sole_answer(sample, wrong=0.0)
    if isinstance(answer, Score):
        return answer
    gold = entry["answer"]
    if equal(answer, gold) and _verifier(task)(normalise(answer), entry) >= 1.0:
        return Score(1.0, Verdict.PASS)
    return Score(0.0, Verdict.WRONG, verdict_detail(answer, gold))


def _task_and_entry(sample: Sample) -> tuple[str, Mapping[str, Any]]:
    match sample.metadata.get("reasoning_gym"):
        case {"task": str(task), "entry": {"answer": str(gold)} as entry} if normalise(gold):
            if task in PLAIN_TASKS:
                return task, entry
            plain = ", ".join(sorted(PLAIN_TASKS))
            raise UnusableAnswer(sample.id, f"the verifier of task {task!r} is not a plain one: {plain}")
    needed = '{"reasoning_gym": {"task": name, "entry": {"answer": text}}}'
    raise UnusableAnswer(sample.id, f"its metadata needs {needed}")


@cache
def _verifier(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    # Its import takes seconds: only runs that use it should pay.
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)
