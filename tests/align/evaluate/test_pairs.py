"""What is said of scored pairs: accuracy with its interval, calibration, and the baselines of length."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from align.evaluate.pairs import ScoredPair, evaluate_pairs, reliability_bins, rows
from align.statistics import wilson_interval


def pair(difference: float, lengths: tuple[int, int] = (5, 5), domain: str = "x") -> ScoredPair:
    return ScoredPair("p", "p", domain, (difference, 0.0), lengths)


def test_accuracy_is_the_share_of_higher_rewards_and_half_of_equal_ones() -> None:
    found = evaluate_pairs([pair(1.0), pair(0.1, domain="y"), pair(-2.0, domain="y"), pair(0.0)])
    assert found.accuracy == 2.5 / 4
    assert found.by_domain == {"x": 0.75, "y": 0.5}
    assert found.difference == pytest.approx(-0.9 / 4)
    assert found.numbers()["preference/accuracy/y"] == 0.5


def test_the_interval_counts_prompts_since_pairs_of_one_are_alike() -> None:
    twice = [replace(pair(d), prompt=str(n)) for n, d in enumerate([1.0, 1.0, 1.0, -1.0]) for _ in range(2)]
    assert evaluate_pairs(twice).interval == wilson_interval(3, 4)


def test_length_alone_is_right_where_the_longer_one_was_chosen() -> None:
    found = evaluate_pairs([pair(1, (9, 5)), pair(1, (9, 5)), pair(1, (2, 5)), pair(1, (5, 5))])
    numbers = found.numbers()
    assert (numbers["preference/longer"], numbers["preference/shorter"]) == (2.5 / 4, 1.5 / 4)


def test_calibration_error_against_numpy() -> None:
    random = np.random.default_rng(0)
    differences = random.normal(0.5, 2.0, 500)
    p = 1 / (1 + np.exp(-differences))
    confidence, right = np.maximum(p, 1 - p), differences > 0
    edges = np.linspace(0.5, 1, 11)
    expected = 0.0
    for low, high in pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            expected += inside.sum() / 500 * abs(right[inside].mean() - confidence[inside].mean())
    found = evaluate_pairs([pair(float(d)) for d in differences])
    assert found.calibration_error == pytest.approx(expected)
    assert sum(b.pairs for b in found.reliability) == 500


def test_one_who_says_how_sure_he_is_is_calibrated_and_one_who_boasts_is_not() -> None:
    log_odds = float(np.log(0.8 / 0.2))
    honest = [log_odds] * 80 + [-log_odds] * 20
    (only,) = reliability_bins(honest)
    assert (only.pairs, only.confidence, only.accuracy) == (100, pytest.approx(0.8), pytest.approx(0.8))
    assert evaluate_pairs([pair(d) for d in honest]).calibration_error == pytest.approx(0, abs=1e-9)
    assert evaluate_pairs([pair(20 * d) for d in honest]).calibration_error == pytest.approx(0.2, abs=1e-3)


def test_rows_hold_texts_and_rewards() -> None:
    (row,) = rows([pair(1.5, (3, 4))], [("q", "good", "bad")])
    assert row == {
        "id": "p",
        "domain": "x",
        "prompt": "q",
        "chosen": "good",
        "rejected": "bad",
        "chosen_reward": 1.5,
        "rejected_reward": 0.0,
        "chosen_tokens": 3,
        "rejected_tokens": 4,
    }
