"""The length-controlled win rate: against another optimiser, and what it must say where the truth is known."""

import math

import numpy as np
import pytest
import torch

from align.evaluate.length_control import RIDGE, length_controlled_win_rate


def by_torch(wins: np.ndarray, longer_by: np.ndarray, difficulties: np.ndarray | None) -> float:
    """The same estimate by L-BFGS."""
    lengths = torch.tensor(longer_by, dtype=torch.float64)
    columns = [torch.ones_like(lengths), torch.tanh(lengths / lengths.std())]
    columns += [] if difficulties is None else [torch.tensor(difficulties, dtype=torch.float64)]
    weights = torch.zeros(len(columns), dtype=torch.float64, requires_grad=True)
    features, targets = torch.stack(columns, 1), torch.tensor(wins, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=1000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(features @ weights, targets)
        value = value + RIDGE / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    features[:, 1] = 0
    return float(torch.sigmoid(features @ weights).mean().detach())


@pytest.mark.parametrize("with_difficulties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_length_controlled_win_rate_is_that_of_another_optimiser(seed: int, with_difficulties: bool) -> None:
    draw = np.random.default_rng(seed)
    longer_by, difficulties = draw.normal(300, 600, 200).round(), draw.normal(0, 2, 200)
    chance = 1 / (1 + np.exp(-(-0.5 + 1.5 * np.tanh(longer_by / longer_by.std()) + 0.4 * difficulties)))
    wins = draw.binomial(2, chance) / 2
    given = difficulties if with_difficulties else None
    assert length_controlled_win_rate(wins, longer_by, given) == pytest.approx(
        by_torch(wins, longer_by, given), abs=1e-6
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
