"""What the workers of `reward.reasoning_gym.answer` do: answers to a task, through the task's own scorer.

A job of `reward.isolation.pool`: it imports nothing of ours and runs only in those workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from reasoning_gym import get_score_answer_fn
from reasoning_gym.factory import DATASETS

_BOARDS = frozenset({"arc_agi", "rearc"})
"""Tasks that compare tuples of tuples, which travel as lists."""
_scorer = cache(get_score_answer_fn)


def warm() -> None:
    """Scores one known answer. Raises ValueError on a wrong score."""
    entry = {"answer": "5", "metadata": {}}
    if [get_score_answer_fn("chain_sum")(answer, entry) for answer in ("5", "6")] != [1.0, 0.0]:
        raise ValueError("the scorer of chain_sum does not tell 5 from 6")


def work(request: dict[str, Any], enter: Callable[[str], None]) -> dict[str, Any]:
    """`{"score": the best of the answers', "why": text}`, or `{"entry": why}` where the entry cannot be used."""
    enter("task")
    if request["task"] not in DATASETS:
        return {"entry": f"reasoning_gym has no task {request['task']!r}"}
    scorer = _scorer(request["task"])
    entry = _restored(request["task"], request["entry"])
    enter("answer")
    best, why = 0.0, ""
    for answer in request["answers"]:
        try:
            best = max(best, float(scorer(answer, entry)))
        except MemoryError:
            raise
        except Exception as error:
            why = f"its scorer raised {type(error).__name__}"
    if why and not _usable(scorer, entry):
        return {"entry": f"{why}, and for the ground truth too"}
    return {"score": best, "why": why}


def _restored(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    board = entry["metadata"].get("output") if task in _BOARDS else None
    if board is None:
        return entry
    return entry | {"metadata": entry["metadata"] | {"output": tuple(tuple(row) for row in board)}}


def _usable(scorer: Callable[[str, Mapping[str, Any]], float], entry: Mapping[str, Any]) -> bool:
    try:
        scorer(entry["answer"], entry)
    except Exception:
        return False
    return True
