"""The alarm goes off when the learned reward rises while the trusted one falls, and at nothing else."""

import math
from random import Random

import pytest

from align.recipe import GuardOptions
from align.stages.over_optimisation import OverOptimisationGuard
from reward import SampleReward, Score, Verdict

STEPS = 12


def alarms(learned_slope: float, trusted_slope: float, *, noise: float = 1.0) -> list[int]:
    """The steps at which it goes off while both rewards drift by their slopes a step."""
    guard = OverOptimisationGuard(GuardOptions(learned="model", trusted="rule", window=3), [])
    draw = Random(0)

    def score(mean: float) -> Score:
        return Score(mean + draw.gauss(0, noise), Verdict.PASS)

    found = []
    for step in range(STEPS):
        rewards = [
            SampleReward(0.0, Verdict.PASS, {"model": score(step * learned_slope), "rule": score(step * trusted_slope)})
            for _ in range(64)
        ]
        if guard.observe(rewards):
            found.append(step)
    return found


def test_it_goes_off_when_they_part_and_then_looks_anew() -> None:
    assert alarms(0.5, -0.5) == [5, 11]


@pytest.mark.parametrize("slopes", [(0.5, 0.5), (-0.5, -0.5), (-0.5, 0.5), (0.5, 0.0), (0.0, -0.5), (0.0, 0.0)])
def test_it_is_silent_when_they_do_not(slopes: tuple[float, float]) -> None:
    assert alarms(*slopes) == []


def test_what_cannot_be_compared_is_no_alarm() -> None:
    guard = OverOptimisationGuard(GuardOptions(learned="model", trusted="rule", window=2), [])
    broken = SampleReward(
        0.0, Verdict.PASS, {"model": Score(1.0, Verdict.PASS), "rule": Score(math.nan, Verdict.INFRA_ERROR)}
    )
    other_domain = SampleReward(0.0, Verdict.PASS, {"code_tests": Score(1.0, Verdict.PASS)})
    assert [guard.observe([broken, other_domain]) for _ in range(6)] == [None] * 6
