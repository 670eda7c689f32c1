r"""Answers to reasoning_gym tasks, by the task's own scorer, in the worker processes of `reward.isolation.pool`.

The scorers, as read in reasoning_gym 0.1.25, are made for evaluation, not for an optimiser that looks for holes:

- some hand the model's text to `eval`, or to sympy's parser, which is `eval` too. Limits on time and memory do not
  make that safe: `REFUSED_TASKS` names them;
- some give full marks too easily. That of gsm_symbolic takes the first number it finds and overlooks its sign:
  "-288" and "288 or 5" are right for 288. The Decimal comparison of chain_sum reads digits of every script. That
  of game_of_life_halting takes any text for "True", and that of letter_jumble overlooks further words. Where the
  ground truth is the only right answer (`EXACT_TASKS`), an answer therefore has to be `equal` to it besides, but
  for capitals;
- all give partial credit, some to an answer that merely contains the right one, and a few more than 1. Here a score
  of exactly 1 passes, and anything else is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reward.isolation.pool import FAULTS, End, Outcome, WorkerLimits, WorkerPool
from reward.math.final_answer import equal, normalise, only_answer, sole_answer, verdict_detail, without_thought
from reward.registry import register
from reward.types import Sample, Score, UnusableAnswer, Verdict

_EVAL = "its scorer hands the answer to eval"
_SYMPY = "its scorer hands the answer to sympy's parser, which evaluates it"
REFUSED_TASKS: Mapping[str, str] = MappingProxyType(
    {
        "binary_matrix": _EVAL,
        "n_queens": _EVAL,
        "spiral_matrix": _EVAL,
        "string_insertion": _EVAL,
        "countdown": _SYMPY,
        "intermediate_integration": _SYMPY,
        "polynomial_multiplication": _SYMPY,
        "puzzle24": _SYMPY,
        "simple_integration": _SYMPY,
        "composite": "it is a mixture of tasks: name the task itself",
    }
)
"""Tasks that no sample may have, and why."""

EXACT_TASKS = frozenset(
    {
        "basic_arithmetic",
        "chain_sum",
        "count_bits",
        "count_primes",
        "decimal_chain_sum",
        "game_of_life_halting",
        "gcd",
        "gsm_symbolic",
        "lcm",
        "leg_counting",
        "letter_jumble",
        "letter_counting",
        "number_sequence",
        "products",
        "simple_equations",
    }
)
"""Tasks whose ground truth is the only right answer, and a number or words."""

_EVALUATED_DATA = {
    "bitwise_arithmetic": ("problem", re.compile(r"[0-9a-fA-Fx()+\-*<>&|^~ ]{0,2000}")),
    "number_sorting": ("answer", re.compile(r"[0-9.,'\[\] eE+\-]{0,20000}")),
}
"""Scorers that evaluate a field of the row: it has to be of the characters that the task generates."""

LONGEST_ANSWER = 20_000
"""Characters."""
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

workers = WorkerPool(Path(__file__).with_name("job.py"), limits=WorkerLimits(phase_cpu_s={"task": 20.0}), workers=2)
"""Where the scorers run; started by the first answer that needs them."""


@register("reasoning_gym")
def reasoning_gym_answer(sample: Sample) -> Score:
    r"""Whether the last `\boxed{}` solves the reasoning_gym task in the metadata: 1 or 0.

    `sample.metadata["reasoning_gym"]` is `{"task": name, "entry": row}`, the row as the task generated it. Where
    the completion has no `\boxed`, the `<answer>` tags that reasoning_gym's own prompts ask for will do. Several
    different answers are wrong. Raises UnusableAnswer where the metadata is missing or the task is refused.
    """
    task, entry = _task_and_entry(sample)
    answer = _committed(sample)
    if isinstance(answer, Score):
        return answer
    gold = entry["answer"]
    if len(answer) > LONGEST_ANSWER:
        return Score(0.0, Verdict.WRONG, f"{len(answer)} characters, {LONGEST_ANSWER} are read")
    if task in EXACT_TASKS and not equal(answer.casefold(), gold.casefold()):
        return Score(0.0, Verdict.WRONG, verdict_detail(answer, gold))
    answers = list(dict.fromkeys([answer, normalise(answer)]))
    outcome = workers.run([{"task": task, "entry": entry, "answers": answers}])[0]
    return _score(sample, answer, gold if isinstance(gold, str) else f"a solution of {task}", outcome)


def _score(sample: Sample, answer: str, gold: str, outcome: Outcome) -> Score:
    if outcome.end is End.INFRA:
        return Score(0.0, Verdict.INFRA_ERROR, outcome.detail, outcome.seconds)
    if outcome.end is not End.DONE:
        if outcome.phase != "answer":
            raise UnusableAnswer(sample.id, f"its task could not be set up: {outcome.detail}")
        return Score(0.0, FAULTS[outcome.end], outcome.detail, outcome.seconds)
    if "entry" in outcome.reply:
        raise UnusableAnswer(sample.id, str(outcome.reply["entry"])[:200])
    if outcome.reply.get("score") == 1.0:
        return Score(1.0, Verdict.PASS, seconds=outcome.seconds)
    why = str(outcome.reply.get("why") or f"score {outcome.reply.get('score')}")[:200]
    return Score(0.0, Verdict.WRONG, f"{verdict_detail(answer, gold)}: {why}", outcome.seconds)


def _task_and_entry(sample: Sample) -> tuple[str, Mapping[str, Any]]:
    match sample.metadata.get("reasoning_gym"):
        case {"task": str(task), "entry": {"answer": gold, "metadata": Mapping()} as entry}:
            pass
        case {"task": str(task), "entry": {"answer": gold} as entry}:
            entry = {**entry, "metadata": {}}
        case _:
            needed = '{"reasoning_gym": {"task": name, "entry": {"answer": text}}}'
            raise UnusableAnswer(sample.id, f"its metadata needs {needed}")
    if task in REFUSED_TASKS:
        raise UnusableAnswer(sample.id, f"task {task!r} is refused: {REFUSED_TASKS[task]}")
    if task in EXACT_TASKS and not (isinstance(gold, str) and normalise(gold)):
        raise UnusableAnswer(sample.id, f"no ground truth of task {task!r} to compare with")
    if task in _EVALUATED_DATA:
        name, plain = _EVALUATED_DATA[task]
        field = gold if name == "answer" else entry["metadata"].get(name)
        if not isinstance(field, str) or not plain.fullmatch(field):
            raise UnusableAnswer(sample.id, f"the {name} of task {task!r} is not of the kind that it generates")
    return task, entry


def _committed(sample: Sample) -> str | Score:
    """The answer that the completion commits itself to, or the score it gets for none or for several."""
    said = without_thought(sample.completion)
    if r"\boxed" in said:
        return sole_answer(sample, wrong=0.0)
    return only_answer([answer.strip() for answer in _TAGGED.findall(said)], wrong=0.0)
