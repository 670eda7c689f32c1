"""Samples whose numbers are none: found, left out, told, and too many of them in a row end the run."""

from collections.abc import Mapping, MutableMapping, Sequence
from math import isfinite
from typing import Any

from align.errors import BadNumbersError
from align.evaluate.problems import Answer
from align.session.run import Run

SHOWN = 4
BAD_STEPS = "steps_with_bad_samples"


def bad_samples(answers: Sequence[Answer], advantages: Sequence[float]) -> dict[str, str]:
    """By the sample's id, prompt#index, which of its numbers is not finite; those that nobody could judge are not among them."""
    found = {}
    for answer, advantage in zip(answers, advantages, strict=True):
        numbers = {
            "log-probability": answer.completion.is_finite,
            "reward": answer.reward.value is None or isfinite(answer.reward.value),
            "advantage": isfinite(advantage),
        }
        if bad := [name for name, good in numbers.items() if not good]:
            found[answer.sample_id] = bad[0]
    return found


class BadSamples:
    """Tells of them step by step. Raises BadNumbersError when `limit` steps in a row had some.

    How many there are by now is in `state`, so that a run that goes on counts on.
    """

    def __init__(self, limit: int, run: Run, state: MutableMapping[str, Any]):
        self._limit, self._run, self._state = limit, run, state

    def observe(self, step: int, found: Mapping[str, str]) -> None:
        in_a_row = self._state[BAD_STEPS] = self._state.get(BAD_STEPS, 0) + 1 if found else 0
        if not found:
            return
        shown = ", ".join(f"{number} of {id_}" for id_, number in list(found.items())[:SHOWN])
        more = ", ..." if len(found) > SHOWN else ""
        text = f"GRPO step {step}: {len(found)} samples left out, for a number that is not finite: {shown}{more}"
        self._run.warn(text, samples=list(found))
        if in_a_row >= self._limit:
            raise BadNumbersError(
                f"{in_a_row} steps in a row had samples with numbers that are not finite, the last: {shown}{more} "
                "(learner.stop_after_bad_steps says how many there may be)"
            )
