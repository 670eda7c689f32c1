"""The intervals against independent computations: likelihoods maximised by search, enumeration, printed values."""

import itertools
import math
from math import comb, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.statistics import mean_interval, paired_interval, pass_at_k, unpaired_interval, wilson_interval

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
