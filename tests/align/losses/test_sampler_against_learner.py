"""What compares the sampler with the learner: importance weights and agreement."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses import (
    agreement,
    importance_weights,
)

NAN, INF = float("nan"), float("inf")

logs = st.floats(-30, 0)


@given(logs, logs, st.floats(0.5, 10))
def test_importance_weights_are_the_truncated_ratio(learner: float, sampler: float, cap: float) -> None:
    log_prob = torch.tensor([learner], dtype=torch.float64, requires_grad=True)
    weights = importance_weights(log_prob, torch.tensor([sampler], dtype=torch.float64), cap)
    assert weights.item() == pytest.approx(min(math.exp(learner - sampler), cap))
    assert not weights.requires_grad


def test_agreement_matches_plain_loops_and_ignores_padding() -> None:
    torch.manual_seed(0)
    lengths = [7, 0, 3]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    sampler = -3 * torch.rand(3, 7)
    learner = torch.where(mask, sampler + 0.3 * torch.randn(3, 7), NAN)
    differences = [
        learner[i, t].item() - sampler[i, t].item() for i, length in enumerate(lengths) for t in range(length)
    ]
    found = agreement(learner, sampler, mask)
    assert agreement(learner, torch.where(torch.arange(7) == 1, learner, sampler), mask).equal == int(mask[:, 1].sum())
    assert found.tokens == len(differences)
    assert found.mean_abs == pytest.approx(math.fsum(map(abs, differences)) / len(differences))
    assert found.max_abs == pytest.approx(max(map(abs, differences)))
    assert found.k3 == pytest.approx(math.fsum(math.exp(d) - d - 1 for d in differences) / len(differences))


@pytest.mark.parametrize("side", ["learner", "sampler"])
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_agreement_never_hides_a_value_that_is_not_finite(side: str, junk: float) -> None:
    x = {"learner": torch.full((2, 3), -1.0), "sampler": torch.full((2, 3), -1.0)}
    x[side][1, 1] = junk
    found = agreement(x["learner"], x["sampler"], torch.ones(2, 3).bool())
    for value in (found.mean_abs, found.max_abs, found.k3):
        assert not math.isfinite(value)


def test_agreement_over_no_token_is_not_agreement() -> None:
    found = agreement(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2).bool())
    assert found.tokens == 0
    assert not found.mean_abs <= 1e9
