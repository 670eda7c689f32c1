"""The alarm for a policy that learns to please its reward model (Gao et al. 2022, arXiv 2210.10760)."""

from collections.abc import Sequence
from math import isfinite, sqrt
from statistics import fmean, variance

from align.recipe import GuardOptions
from reward import SampleReward

SURE = 2.0
"""Standard errors of a difference of means that count as a change."""


class OverOptimisationGuard:
    """Compares the last `window` steps with as many before them.

    It says so when the learned reward went up and the trusted one down, each by more than two standard errors, and then
    starts anew. `steps`, the rewards of the steps that it compares, is kept up to date for whoever goes on.
    """

    def __init__(self, options: GuardOptions, steps: list[tuple[list[float], list[float]]]):
        self._options, self._steps = options, steps

    def observe(self, rewards: Sequence[SampleReward]) -> str | None:
        """Take the rewards of a step; an alarm where the two rewards have parted."""
        learned, trusted = self._options.learned, self._options.trusted
        pairs = [
            (reward.components[learned].value, reward.components[trusted].value)
            for reward in rewards
            if {learned, trusted} <= reward.components.keys()
        ]
        judged = [pair for pair in pairs if all(map(isfinite, pair))]
        self._steps.append(([of_learned for of_learned, _ in judged], [of_trusted for _, of_trusted in judged]))
        del self._steps[: -2 * self._options.window]
        if len(self._steps) < 2 * self._options.window:
            return None
        up, down = (self._change(place) for place in (0, 1))
        if up <= SURE or down >= -SURE:
            return None
        self._steps.clear()
        return (
            f"over {self._options.window} steps the learned reward {learned!r} rose while {trusted!r} fell "
            f"({up:+.1f} and {down:+.1f} standard errors): the policy may be exploiting the reward model"
        )

    def _change(self, place: int) -> float:
        """The later half's mean less the earlier's, in standard errors; 0 where it cannot be told."""
        steps = [step[place] for step in self._steps]
        half = self._options.window
        before, after = ([value for step in part for value in step] for part in (steps[:half], steps[half:]))
        if min(len(before), len(after)) < 2:
            return 0.0
        error = sqrt(variance(before) / len(before) + variance(after) / len(after))
        return (fmean(after) - fmean(before)) / error if error else 0.0
