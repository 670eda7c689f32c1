"""The test of two shares: what it is where textbooks have it, and what prompts do to it."""

from math import log, sqrt

import numpy as np
import pytest

from align.habits.score import PRIOR, change_interval, log_odds, score
from align.statistics import unpaired_interval


def sets(before: list[float], after: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([*before, *after])[:, None], np.repeat([False, True], [len(before), len(after)])


def test_of_single_answers_to_different_prompts_it_is_the_pooled_test_of_two_proportions() -> None:
    column, later = sets([1.0] * 20 + [0.0] * 80, [1.0] * 45 + [0.0] * 55)
    change, statistic = score(column, later, np.arange(200))
    assert change[0] == pytest.approx(0.25)
    assert statistic[0] == pytest.approx(0.25 / sqrt(0.325 * 0.675 * 2 / 100))


def test_of_the_same_prompts_it_is_the_test_of_mcnemar() -> None:
    column, later = sets([1.0] * 5 + [0.0] * 95, [1.0] * 3 + [0.0] * 2 + [1.0] * 14 + [0.0] * 81)
    change, statistic = score(column, later, np.tile(np.arange(100), 2))
    assert change[0] == pytest.approx(0.12)
    assert statistic[0] == pytest.approx((14 - 2) / sqrt(14 + 2))


def test_copies_of_an_answer_to_the_same_prompt_add_nothing() -> None:
    column, later = sets([1.0] * 10 + [0.0] * 40, [1.0] * 30 + [0.0] * 20)
    _, alone = score(column, later, np.arange(100))
    _, copied = score(column.repeat(8, axis=0), later.repeat(8), np.arange(100).repeat(8))
    assert copied[0] == pytest.approx(alone[0])


def test_a_set_of_few_prompts_is_not_believed_because_none_of_them_has_it() -> None:
    """Twelve prompts that have not what three in ten have: one case in seventy."""
    column, later = sets([1.0] * 60 + [0.0] * 140, [0.0] * 96)
    _, statistic = score(column, later, np.array([*range(200), *np.arange(200, 212).repeat(8)]))
    assert abs(statistic[0]) < 2.6


def test_an_empty_side_says_nothing() -> None:
    column, later = sets([1.0, 0.0], [])
    assert [value.tolist() for value in score(column, later, np.arange(2))] == [[0.0], [0.0]]


def test_the_log_odds_are_those_of_the_counts_with_the_prior_added() -> None:
    column, later = sets([1.0] * 20 + [0.0] * 80, [1.0] * 45 + [0.0] * 55)
    ratio, low, high = log_odds(column, later, np.arange(200))
    a, b = PRIOR * 0.325, PRIOR * 0.675
    assert ratio == pytest.approx(log((45 + a) / (55 + b)) - log((20 + a) / (80 + b)))
    half = 1.959964 * sqrt(1 / (45 + a) + 1 / (55 + b) + 1 / (20 + a) + 1 / (80 + b))
    assert (low, high) == pytest.approx((ratio - half, ratio + half), rel=1e-5)


def test_the_interval_of_a_change_is_that_of_newcombe_of_independent_answers() -> None:
    column, later = sets([1.0] * 20 + [0.0] * 80, [1.0] * 45 + [0.0] * 55)
    assert change_interval(column, later, np.arange(200)) == pytest.approx(unpaired_interval(20, 100, 45, 100))
    # Each answer four times: the same interval.
    column, later = sets(([1.0] * 20 + [0.0] * 80) * 4, ([1.0] * 45 + [0.0] * 55) * 4)
    prompts = np.concatenate([np.tile(np.arange(100), 4), np.tile(np.arange(100, 200), 4)])
    assert change_interval(column, later, prompts) == pytest.approx(unpaired_interval(20, 100, 45, 100))
    # All alike: as many as there are prompts.
    column, later = sets([0.0] * 24, [1.0] * 24)
    assert change_interval(column, later, np.tile(np.arange(12), 4)) == pytest.approx(unpaired_interval(0, 12, 12, 12))
