"""Confidence intervals of proportions, of their differences and of differences of means; pass@k; win rates."""

from collections.abc import Callable, Sequence
from math import comb, sqrt
from statistics import NormalDist, fmean, stdev

import numpy as np

Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)
HALVINGS = 60
RIDGE = 1e-3
"""Weight of half the squared coefficients beside the mean loss: it keeps them finite where one side always wins."""


def paired_interval(gained: int, lost: int, n: int) -> Interval:
    """The 95 % interval of (gained - lost) / n, where the same `n` problems were answered before and after.

    `gained` of them were wrong and became right, `lost` went the other way. The asymptotic score interval of
    T. Tango, Statistics in Medicine 17:891-908 (1998): it holds 0 exactly where McNemar's test finds no difference.
    """
    change = (gained - lost) / n

    def score(delta: float) -> float:
        a = 2 * n
        b = (2 * n - gained + lost) * delta - gained - lost
        c = -lost * delta * (1 - delta)
        # The share of losses that is most likely, given that the share of gains is larger by delta.
        losses = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * losses + delta * (1 - delta))
        return (gained - lost - n * delta) / sqrt(max(variance, 1e-300))

    lower = -1.0 if change == -1 else _root(lambda delta: score(delta) - Z, -1.0, change)
    upper = 1.0 if change == 1 else _root(lambda delta: score(delta) + Z, change, 1.0)
    return lower, upper


def unpaired_interval(before: float, before_n: float, after: float, after_n: float) -> Interval:
    """The 95 % interval of after / after_n - before / before_n, from different problems.

    Method 10 (square and add of Wilson's limits) of R. G. Newcombe, Statistics in Medicine 17:873-890 (1998).
    """
    p, q = after / after_n, before / before_n
    (p_low, p_high), (q_low, q_high) = wilson_interval(after, after_n), wilson_interval(before, before_n)
    change = p - q
    return change - sqrt((p - p_low) ** 2 + (q_high - q) ** 2), change + sqrt((p_high - p) ** 2 + (q - q_low) ** 2)


def wilson_interval(right: float, n: float) -> Interval:
    """The 95 % score interval of the proportion right / n (Wilson, JASA 22:209-212, 1927)."""
    centre = (right + Z * Z / 2) / (n + Z * Z)
    half = Z / (n + Z * Z) * sqrt(right * (n - right) / n + Z * Z / 4)
    # Where all or none are right, the interval ends there but for the last digit.
    return max(0.0, min(centre - half, right / n)), min(1.0, max(centre + half, right / n))


def mean_interval(differences: Sequence[float]) -> Interval | None:
    """The 95 % interval of the mean of paired differences, by the central limit theorem.

    None for fewer than two and where all are alike, of which the theorem says nothing.
    The paired analysis of E. Miller, "Adding Error Bars to Evals", arXiv 2411.00640.
    """
    if len(set(differences)) < 2:
        return None
    half = Z * stdev(differences) / sqrt(len(differences))
    return fmean(differences) - half, fmean(differences) + half


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of `n` samples, `right` of them right, hold a right one (Chen et al. 2021, eq. 1)."""
    return 1.0 - comb(n - right, k) / comb(n, k)


def length_controlled_win_rate(
    preferences: Sequence[float], longer_by: Sequence[float], difficulties: Sequence[float] | None = None
) -> float:
    """The mean preference, in [0, 1], that a logistic regression predicts for answers as long as the reference's
    (Dubois et al. 2024, arXiv:2404.04475, section 3).

    preferences [N] in [0, 1] are the judge's for the policy, 1 where the policy won; longer_by [N] is how many
    characters the policy's answer is longer; difficulties [N] are those of the instructions, where they are known.
    The regression is the published one,

        logit P(policy wins on x) = theta + phi * tanh(longer_by(x) / std(longer_by)) + psi * difficulty(x)

    and the result its mean prediction with the second term left out.

    It departs from the published estimator in three ways. The difficulty of an instruction was fitted there over a
    leaderboard of models and cannot be had from one; without it, psi is left out. The authors add judgements of a
    baseline that was told to be terse or verbose, with weight 0.2, as a regularisation; that is left out. And
    they choose an L1 penalty by cross-validation, where this has a small fixed L2 penalty.
    """
    wins, lengths = np.asarray(preferences, np.float64), np.asarray(longer_by, np.float64)
    spread = lengths.std(ddof=1) if len(lengths) > 1 else 0.0
    columns = [np.ones_like(wins), np.tanh(lengths / spread) if spread > 0 else np.zeros_like(wins)]
    if difficulties is not None:
        columns.append(np.asarray(difficulties, np.float64))
    features = np.stack(columns, axis=1)
    weights = _fit(features, wins)
    features[:, 1] = 0.0
    return float(_sigmoid(features @ weights).mean())


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between `low` and `high`."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def _fit(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The coefficients of least mean cross-entropy and RIDGE, by Newton's method with the step halved as needed."""
    weights = np.zeros(features.shape[1])
    for _ in range(100):
        predicted = _sigmoid(features @ weights)
        gradient = features.T @ (predicted - targets) / len(targets) + RIDGE * weights
        if np.abs(gradient).max() < 1e-10:
            break
        curvature = (features.T * (predicted * (1 - predicted))) @ features / len(targets)
        step = np.linalg.solve(curvature + RIDGE * np.eye(len(weights)), gradient)
        share = 1.0
        while _loss(features, targets, weights - share * step) > _loss(features, targets, weights) and share > 1e-8:
            share /= 2
        weights -= share * step
    return weights


def _loss(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    logits = features @ weights
    return float((np.logaddexp(0, logits) - targets * logits).mean() + RIDGE / 2 * weights @ weights)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
