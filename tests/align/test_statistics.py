"""The intervals against independent computations: likelihoods maximised by search, enumeration, printed values."""

import itertools
import math
from math import comb, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from align.statistics import (
    RIDGE,
    length_controlled_win_rate,
    mean_interval,
    paired_interval,
    pass_at_k,
    unpaired_interval,
    wilson_interval,
)

Z = 1.959963984540054


def most_likely_losses(delta: float, gained: int, lost: int, n: int) -> float:
    """The share of losses that maximises the trinomial likelihood under a difference of `delta`, by golden section."""
    low, high = max(0.0, -delta), (1 - delta) / 2

    def likelihood(losses: float) -> float:
        shares = ((gained, losses + delta), (lost, losses), (n - gained - lost, 1 - 2 * losses - delta))
        return sum(count * log(max(share, 1e-300)) for count, share in shares if count)

    for _ in range(200):
        third = (high - low) / 3
        if likelihood(low + third) < likelihood(high - third):
            low += third
        else:
            high -= third
    return (low + high) / 2


@pytest.mark.parametrize(("gained", "lost", "n"), [(7, 1, 21), (40, 20, 160), (92, 0, 256), (3, 3, 16), (0, 5, 64)])
def test_the_paired_interval_ends_where_the_score_test_begins_to_refuse(gained: int, lost: int, n: int) -> None:
    def score(delta: float) -> float:
        variance = n * (2 * most_likely_losses(delta, gained, lost, n) + delta - delta**2)
        return (gained - lost - n * delta) / sqrt(variance)

    low, high = paired_interval(gained, lost, n)
    assert score(low) == pytest.approx(Z, rel=1e-5)
    assert score(high) == pytest.approx(-Z, rel=1e-5)
    assert all(abs(score(delta)) < Z for delta in np.linspace(low + 1e-3, high - 1e-3, 7))
    assert all(abs(score(delta)) > Z for delta in (low - 0.05, low - 1e-3, high + 1e-3, high + 0.05))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 200))
def test_the_paired_interval_agrees_with_mcnemars_test(gained: int, lost: int, alike: int) -> None:
    low, high = paired_interval(gained, lost, gained + lost + alike)
    statistic = (gained - lost) ** 2 / max(gained + lost, 1)
    if abs(statistic - Z**2) > 1e-6:
        assert (low <= 0 <= high) == (statistic < Z**2)
    assert -1 <= low <= (gained - lost) / (gained + lost + alike) <= high <= 1


def test_the_paired_interval_covers_the_truth_in_about_95_of_100_cases() -> None:
    n, gains, losses = 40, 0.3, 0.1
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            alike = n - gained - lost
            chance = comb(n, gained) * comb(n - gained, lost) * gains**gained * losses**lost
            low, high = paired_interval(gained, lost, n)
            if low <= gains - losses <= high:
                covered += chance * (1 - gains - losses) ** alike
    assert 0.935 < covered < 0.97


def test_no_change_in_any_problem_is_no_proof_that_there_is_none() -> None:
    low, high = paired_interval(0, 0, 100)
    assert low == pytest.approx(-high)
    assert high == pytest.approx(Z**2 / (100 + Z**2))


def test_every_problem_gained_or_lost() -> None:
    assert paired_interval(30, 0, 30)[1] == 1
    assert paired_interval(0, 30, 30)[0] == -1
    assert paired_interval(30, 0, 30)[0] == pytest.approx(-paired_interval(0, 30, 30)[1])


def test_the_unpaired_interval_is_the_one_that_newcombe_printed() -> None:
    # Statistics in Medicine 17:873-890 (1998), table II, method 10: 56/70 - 48/80 and 10/10 - 0/10.
    assert unpaired_interval(48, 80, 56, 70) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert unpaired_interval(0, 10, 10, 10) == pytest.approx((0.6075, 1.0), abs=5e-5)


@pytest.mark.parametrize(
    ("right", "n", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (29, 29, (0.8830, 1.0))],
)
def test_wilsons_interval_as_newcombe_printed_it(right: int, n: int, expected: tuple[float, float]) -> None:
    """R. G. Newcombe, Statistics in Medicine 17:857-872 (1998), table I, method 3."""
    assert wilson_interval(right, n) == pytest.approx(expected, abs=6e-5)


def test_wilson_s_interval_covers_about_95_percent() -> None:
    n, share = 40, 0.3
    covered = sum(
        comb(n, right) * share**right * (1 - share) ** (n - right)
        for right in range(n + 1)
        if wilson_interval(right, n)[0] <= share <= wilson_interval(right, n)[1]
    )
    assert 0.93 < covered < 0.97


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilsons_limits_are_where_the_score_test_turns(right: int, wrong: int) -> None:
    n = right + wrong
    for limit in wilson_interval(right, n):
        if 1e-9 < limit < 1 - 1e-9:
            assert abs(right / n - limit) == pytest.approx(Z * sqrt(limit * (1 - limit) / n), rel=1e-6)


def test_the_interval_of_a_mean_is_that_of_numpy() -> None:
    differences = [0.25, 0.0, 1.0, -0.5, 0.0, 0.75]
    half = Z * np.std(differences, ddof=1) / math.sqrt(len(differences))
    assert mean_interval(differences) == pytest.approx((np.mean(differences) - half, np.mean(differences) + half))
    assert mean_interval([1.0]) is None
    assert mean_interval([0.5, 0.5]) is None


@pytest.mark.parametrize(("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_sample(n: int, right: int, k: int) -> None:
    choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def by_search(wins: np.ndarray, longer_by: np.ndarray, difficulties: np.ndarray | None) -> float:
    """The same estimate by a general minimiser."""
    columns = [np.ones_like(longer_by), np.tanh(longer_by / longer_by.std(ddof=1))]
    features = np.stack(columns if difficulties is None else [*columns, difficulties], 1)

    def loss(weights: np.ndarray) -> float:
        logits = features @ weights
        return float(np.mean(np.logaddexp(0, logits) - wins * logits) + RIDGE / 2 * weights @ weights)

    weights = minimize(loss, np.zeros(features.shape[1]), options={"gtol": 1e-8}).x
    features[:, 1] = 0
    return float(np.mean(1 / (1 + np.exp(-features @ weights))))


@pytest.mark.parametrize("with_difficulties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_length_controlled_win_rate_is_that_of_another_optimiser(seed: int, with_difficulties: bool) -> None:
    draw = np.random.default_rng(seed)
    longer_by, difficulties = draw.normal(300, 600, 200).round(), draw.normal(0, 2, 200)
    chance = 1 / (1 + np.exp(-(-0.5 + 1.5 * np.tanh(longer_by / longer_by.std()) + 0.4 * difficulties)))
    wins = draw.binomial(2, chance) / 2
    given = difficulties if with_difficulties else None
    assert length_controlled_win_rate(wins, longer_by, given) == pytest.approx(
        by_search(wins, longer_by, given), abs=1e-6
    )


def test_a_judge_who_looks_at_length_alone_gives_no_advantage_to_long_answers() -> None:
    """The policy is as good as the reference and writes more: it wins most, and half when length is controlled for."""
    draw = np.random.default_rng(0)
    longer_by = draw.normal(500, 500, 4000)
    wins = draw.random(4000) < 1 / (1 + np.exp(-2 * np.tanh(longer_by / longer_by.std())))
    assert wins.mean() > 0.7
    assert length_controlled_win_rate(wins, longer_by) == pytest.approx(0.5, abs=0.04)


def test_where_length_says_nothing_the_controlled_rate_is_the_plain_one() -> None:
    wins = [1.0, 0.0, 0.75, 0.5, 1.0]
    assert length_controlled_win_rate(wins, [7] * 5) == pytest.approx(np.mean(wins), abs=1e-3)
    assert 0.9 < length_controlled_win_rate([1.0] * 9, range(9)) < 1
    assert math.isfinite(length_controlled_win_rate([1.0], [12]))
