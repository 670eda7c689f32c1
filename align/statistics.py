"""Confidence intervals of proportions, of their differences and of differences of means; and pass@k."""

from collections.abc import Callable, Sequence
from math import comb, sqrt
from statistics import NormalDist, fmean, stdev

Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)
HALVINGS = 60


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


def unpaired_interval(before: int, before_n: int, after: int, after_n: int) -> Interval:
    """The 95 % interval of after / after_n - before / before_n, from different problems.

    Method 10 (square and add of Wilson's limits) of R. G. Newcombe, Statistics in Medicine 17:873-890 (1998).
    """
    p, q = after / after_n, before / before_n
    (p_low, p_high), (q_low, q_high) = wilson_interval(after, after_n), wilson_interval(before, before_n)
    change = p - q
    return change - sqrt((p - p_low) ** 2 + (q_high - q) ** 2), change + sqrt((p_high - p) ** 2 + (q - q_low) ** 2)


def wilson_interval(right: float, n: int) -> Interval:
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


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between `low` and `high`."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2
