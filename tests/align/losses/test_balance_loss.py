"""The expert-level balance loss against the report and the released model's formula."""

import pytest
import torch

from align.losses import (
    sequence_balance_loss,
)

NAN = float("nan")


def test_balance_loss_matches_the_report_and_excludes_padding() -> None:
    torch.manual_seed(0)
    b, t, e, k = 3, 6, 5, 2
    probs = torch.randn(b, t, e, dtype=torch.float64).softmax(-1)
    ids = probs.topk(k).indices
    lengths = [6, 4, 0]
    mask = torch.arange(t) < torch.tensor(lengths)[:, None]
    losses = sequence_balance_loss(
        torch.where(mask[..., None], probs, NAN), torch.where(mask[..., None], ids, -1), mask
    )
    for row, length in enumerate(lengths):
        total = 0.0
        for expert in range(e):
            chosen = sum(expert in ids[row, i].tolist() for i in range(length))
            affinity = sum(probs[row, i, expert].item() for i in range(length))
            total += (e / (k * length) * chosen) * (affinity / length) if length else 0.0
        assert losses[row].item() == pytest.approx(total)


def test_balance_loss_equals_the_released_models_formula() -> None:
    """`MoEGate` of the remote code, seq_aux: count / (T K / E) times the mean score, summed; no alpha."""
    torch.manual_seed(0)
    b, t, e, k = 2, 8, 4, 2
    scores = torch.randn(b, t, e, dtype=torch.float64).softmax(-1)
    ids = scores.topk(k).indices
    ce = torch.zeros(b, e, dtype=torch.float64)
    ce.scatter_add_(1, ids.view(b, -1), torch.ones(b, t * k, dtype=torch.float64)).div_(t * k / e)
    released = (ce * scores.mean(dim=1)).sum(dim=1)
    torch.testing.assert_close(sequence_balance_loss(scores, ids, torch.ones(b, t).bool()), released)


def test_balance_loss_is_one_for_even_routing_and_e_over_k_at_collapse() -> None:
    mask = torch.ones(1, 4).bool()
    even = torch.full((1, 4, 4), 0.25)
    assert sequence_balance_loss(even, torch.arange(4).view(1, 4, 1), mask).item() == pytest.approx(1)
    collapsed = torch.tensor([1.0, 0, 0, 0]).expand(1, 4, 4)
    assert sequence_balance_loss(collapsed, torch.zeros(1, 4, 1).long(), mask).item() == pytest.approx(4)


def test_balance_loss_pushes_probability_away_from_the_crowded_expert() -> None:
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    ids = torch.tensor([[[0], [0], [0], [1]]])
    sequence_balance_loss(logits.softmax(-1), ids, torch.ones(1, 4).bool()).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[..., 0] > 0).all()
    assert (logits.grad[..., 2] < 0).all()
