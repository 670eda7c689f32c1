"""The win rate that two answers of equal length would have had (Dubois et al. 2024, arXiv:2404.04475, section 3)."""

from collections.abc import Sequence

import numpy as np

RIDGE = 1e-3
"""Weight of half the squared coefficients beside the mean loss: it keeps them finite where one side always wins."""


def length_controlled_win_rate(
    preferences: Sequence[float], longer_by: Sequence[float], difficulties: Sequence[float] | None = None
) -> float:
    """The mean preference, in [0, 1], that a logistic regression predicts for answers as long as the reference's.

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
