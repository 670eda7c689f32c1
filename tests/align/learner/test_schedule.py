"""The learning rate, step by step, against its definition."""

import math

import pytest

from align.learner.objective import learning_rate
from align.recipe import OptimizerOptions

TOP = 2e-3


def rates(steps: int, **options: object) -> list[float]:
    chosen = OptimizerOptions(learning_rate=TOP, **options)  # type: ignore[arg-type]
    return [learning_rate(step, steps, chosen) for step in range(steps)]


def test_the_warm_up_rises_by_equal_parts_to_the_whole_rate() -> None:
    assert rates(8, warmup_steps=4, schedule="constant") == pytest.approx(
        [TOP * x for x in (0.25, 0.5, 0.75, *[1] * 5)]
    )


def test_the_cosine_falls_from_the_whole_rate_to_the_final_share_of_it() -> None:
    found = rates(13, warmup_steps=2, final_ratio=0.1)[2:]
    expected = [TOP * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 10)) / 2) for k in range(11)]
    assert found == pytest.approx(expected)
    assert (found[0], found[-1]) == pytest.approx((TOP, 0.1 * TOP))


def test_without_a_schedule_it_stays() -> None:
    assert rates(5, schedule="constant") == [TOP] * 5


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_ends_in_its_warm_up_has_rates_all_the_same(steps: int) -> None:
    assert rates(steps, warmup_steps=3) == pytest.approx([TOP * (k + 1) / 3 for k in range(steps)])
