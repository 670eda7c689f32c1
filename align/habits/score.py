"""The test of two shares, and the size of their difference, where several answers may be to one prompt.

The statistic is a score statistic: D, the difference of the shares, over the root of the sum over prompts of u^2, where u sums what the answers to a prompt add to D,
with the common share taken away. Answers to one prompt are alike, so that prompts are what is counted. Where both sets answer the same prompts, their
differences cancel (of one answer each, this is McNemar's statistic), and the tails are below 2 exp(-z^2 / 2) however few prompts there are (B. Efron, JASA 64:1278-1302, 1969).
Prompts of one set alone count at least as much as the common share and the likeness of answers to a prompt let expect: the design effect 1 + (n - 1) rho of
L. Kish, Survey Sampling, 1965.
"""

from math import log, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from align.statistics import Interval, Z, unpaired_interval

FEW_GROUPS = 8
"""Groups of answers to one prompt that the correlation 1 counts for beside those that there are."""
PRIOR = 10.0
"""Answers that the prior of the log-odds is worth, with the share that the feature has in both sets."""

Matrix = npt.NDArray[np.floating[Any]]
Flags = npt.NDArray[np.bool_]


def score(
    columns: Matrix, later: Flags, prompt: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The mean of each column [N, F] in the `later` answers less that in the others, [F], and its score statistic, [F].

    `prompt` [N] says which answers are to one prompt. Both are 0 where one of the two sets is empty.
    """
    values = columns.astype(np.float64)
    if later.all() or not later.any():
        return np.zeros(values.shape[1]), np.zeros(values.shape[1])
    own = np.where(later[:, None], values[later].mean(axis=0), values[~later].mean(axis=0))
    change, common = values[later].mean(axis=0) - values[~later].mean(axis=0), values.mean(axis=0)
    # By prompt and side: how many answers there are, and what their sums weigh in the difference.
    group = 2 * prompt + later
    groups, size = np.unique(group, return_counts=True)
    weight = np.where(groups % 2 == 1, 1 / later.sum(), -1 / (~later).sum())
    parts = weight[:, None] * (sum_by(group, values) - size[:, None] * common)
    seen = sum_by(groups // 2, parts) ** 2
    effect = 1 + (size[:, None] - 1) * likeness(group, values - own)
    expected = (weight**2 * size)[:, None] * effect * values.var(axis=0)
    # A prompt is in both sets where it weighs about as much in one as in the other.
    weighs = np.bincount(groups // 2, weight * size)
    lone = (np.abs(weighs) > np.bincount(groups // 2, np.abs(weight * size)) / 3)[groups // 2]
    paired = seen[~lone[np.flatnonzero(np.diff(groups // 2, prepend=-1))]].sum(axis=0)
    error = np.sqrt(np.maximum(seen.sum(axis=0), paired + expected[lone].sum(axis=0)))
    return change, np.divide(change, error, out=np.zeros_like(change), where=error > 1e-9)


def likeness(group: npt.NDArray[np.int64], residuals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The correlation [F] of the residuals [N, F] of answers of one group, taken for 1 as far as there are few groups."""
    several = (np.bincount(group) > 1)[group]
    group, residuals = group[several], residuals[several]
    sizes = np.unique(group, return_counts=True)[1]
    if not len(sizes):
        return np.ones(residuals.shape[1])
    squares = (residuals**2).sum(axis=0)
    together = ((sum_by(group, residuals) ** 2).sum(axis=0) - squares) / (sizes * (sizes - 1)).sum()
    alike = np.divide(together * len(group), squares, out=np.ones_like(squares), where=squares > 1e-9)
    return np.asarray((np.clip(alike, 0.0, 1.0) * len(sizes) + FEW_GROUPS) / (len(sizes) + FEW_GROUPS))


def change_interval(column: Matrix, later: Flags, prompt: npt.NDArray[np.int64]) -> Interval:
    """The 95 % interval of the change of one column [N, 1] of 0 and 1.

    That of `align.statistics.unpaired_interval`, of so many independent answers as have the variance that there is over prompts; of no more than there
    are answers, and where all are alike of as many as there are prompts.
    """
    values = column[:, 0].astype(np.float64)
    means, counts = [values[side].mean() for side in (~later, later)], [side.sum() for side in (~later, later)]
    parts = np.where(later, 1 / counts[1], -1 / counts[0]) * (values - np.where(later, means[1], means[0]))
    simple = sum(mean * (1 - mean) / count for mean, count in zip(means, counts, strict=True))
    effect = max(1.0, float((sum_by(prompt, parts[:, None]) ** 2).sum() / simple)) if simple else 0.0
    sides = zip((~later, later), counts, strict=True)
    before_n, after_n = (float(n / effect) if effect else len(np.unique(prompt[side])) for side, n in sides)
    return unpaired_interval(means[0] * before_n, before_n, means[1] * after_n, after_n)


def log_odds(column: Matrix, later: Flags, prompt: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """The log-odds ratio of a feature [N, 1] of 0 and 1, with an informative prior, and its 95 % interval.

    The estimate and its variance are those of Monroe, Colaresi & Quinn, "Fightin' Words", Political Analysis 16:372-403 (2008), of the counts of answers with and without the
    feature; the variance is multiplied by the design effect that `score` found.
    """
    values = column[:, 0].astype(np.float64)
    common = min(max(float(values.mean()), 1e-6), 1 - 1e-6)
    logits, variance, simple = [], 0.0, 0.0
    for side in (values[~later], values[later]):
        with_it, without = side.sum() + PRIOR * common, (1 - side).sum() + PRIOR * (1 - common)
        logits.append(log(with_it / without))
        variance += 1 / with_it + 1 / without
        simple += common * (1 - common) / len(side)
    change, statistic = score(column, later, prompt)
    effect = (change[0] / statistic[0]) ** 2 / simple if statistic[0] else 1.0
    ratio, half = logits[1] - logits[0], Z * sqrt(variance * effect)
    return ratio, ratio - half, ratio + half


def sum_by(group: npt.NDArray[np.int64], values: Matrix) -> Matrix:
    """The sums of rows [N, F] by group, [G, F], in the order of the groups' numbers."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sums: Matrix = np.add.reduceat(values[order], starts, axis=0)
    return sums
