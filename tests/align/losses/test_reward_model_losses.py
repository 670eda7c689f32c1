"""The reward models' losses against their formulas, their gradients, and what they do not depend on."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from align.losses import pairwise_loss, pointwise_loss

ROWS = (torch.rand(3, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20 - 10).unbind()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pairwise_is_the_negative_log_of_bradley_and_terrys_probability() -> None:
    chosen, rejected, margins = ROWS
    triples = list(zip(*(values.tolist() for values in ROWS), strict=True))
    assert pairwise_loss(chosen, rejected).tolist() == pytest.approx([-math.log(sigmoid(c - r)) for c, r, _ in triples])
    expected = [-math.log(sigmoid(c - r - m)) for c, r, m in triples]
    assert pairwise_loss(chosen, rejected, margins).tolist() == pytest.approx(expected)


def test_pointwise_is_the_mean_binary_cross_entropy_of_both() -> None:
    chosen, rejected, _ = ROWS
    expected = [
        -(math.log(sigmoid(c)) + math.log(1 - sigmoid(r))) / 2
        for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    assert pointwise_loss(chosen, rejected).tolist() == pytest.approx(expected)
    labels = torch.cat([torch.ones_like(chosen), torch.zeros_like(rejected)])
    mean = binary_cross_entropy_with_logits(torch.cat([chosen, rejected]), labels)
    assert pointwise_loss(chosen, rejected).mean() == pytest.approx(mean.item())


def test_a_constant_added_to_all_rewards_changes_the_pointwise_loss_alone() -> None:
    chosen, rejected, _ = ROWS
    assert torch.allclose(pairwise_loss(chosen + 7, rejected + 7), pairwise_loss(chosen, rejected))
    assert not torch.allclose(pointwise_loss(chosen + 7, rejected + 7), pointwise_loss(chosen, rejected))


def test_gradients_are_those_of_the_formulas() -> None:
    chosen = torch.tensor([0.3, -4.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([1.1, 2.0], dtype=torch.float64, requires_grad=True)
    margins = torch.tensor([0.5, 0.0], dtype=torch.float64)
    pairwise_loss(chosen, rejected, margins).sum().backward()
    expected = -torch.sigmoid(-(chosen - rejected - margins).detach())
    assert torch.allclose(chosen.grad, expected)
    assert torch.allclose(rejected.grad, -expected)
    chosen.grad = rejected.grad = None
    pointwise_loss(chosen, rejected).sum().backward()
    assert torch.allclose(chosen.grad, -torch.sigmoid(-chosen.detach()) / 2)
    assert torch.allclose(rejected.grad, torch.sigmoid(rejected.detach()) / 2)


def test_rewards_far_apart_stay_finite() -> None:
    far = torch.tensor([500.0, -500.0])
    assert pairwise_loss(far, -far).tolist() == [0.0, 1000.0]
    assert pointwise_loss(far, -far).tolist() == [0.0, 500.0]
