"""The balance losses against the report, the released model's formula, and what they are of even and of collapsed routing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from align.losses import Routing, balance_losses, routing_sums

NAN = float("nan")


def losses_of(logits: Tensor, ids: Tensor, mask: Tensor, devices: int = 1, devices_a_token: int = 1) -> Tensor:
    return balance_losses(routing_sums(logits, ids, mask, devices), ids.shape[-1], devices_a_token)


def test_they_match_the_report_and_exclude_padding() -> None:
    torch.manual_seed(0)
    b, t, e, k, d, m = 3, 6, 8, 3, 4, 2
    logits = torch.randn(b, t, e, dtype=torch.float64)
    probs, ids = logits.softmax(-1), logits.topk(k).indices
    lengths = [6, 4, 0]
    mask = torch.arange(t) < torch.tensor(lengths)[:, None]
    found = losses_of(torch.where(mask[..., None], logits, NAN), torch.where(mask[..., None], ids, -1), mask, d, m)
    for row, length in enumerate(lengths):
        chosen = [sum(j in ids[row, i].tolist() for i in range(length)) for j in range(e)]
        sent = [sum(bool({2 * g, 2 * g + 1} & set(ids[row, i].tolist())) for i in range(length)) for g in range(d)]
        f = [e / (k * max(length, 1)) * n for n in chosen]
        p = [probs[row, :length, j].sum().item() / max(length, 1) for j in range(e)]
        expert = sum(f[j] * p[j] for j in range(e))
        device = sum((f[2 * g] + f[2 * g + 1]) / 2 * (p[2 * g] + p[2 * g + 1]) for g in range(d))
        communication = sum(d / (m * max(length, 1)) * sent[g] * (p[2 * g] + p[2 * g + 1]) for g in range(d))
        assert found[row].tolist() == pytest.approx([expert, device, communication])


def test_that_of_experts_equals_the_released_models_formula() -> None:
    """`MoEGate` of the remote code, seq_aux: count / (T K / E) times the mean score, summed; no alpha."""
    torch.manual_seed(0)
    b, t, e, k = 2, 8, 4, 2
    logits = torch.randn(b, t, e, dtype=torch.float64)
    scores, ids = logits.softmax(-1), logits.topk(k).indices
    ce = torch.zeros(b, e, dtype=torch.float64)
    ce.scatter_add_(1, ids.view(b, -1), torch.ones(b, t * k, dtype=torch.float64)).div_(t * k / e)
    released = (ce * scores.mean(dim=1)).sum(dim=1)
    torch.testing.assert_close(losses_of(logits, ids, torch.ones(b, t).bool())[:, 0], released)


def test_they_are_1_for_even_routing_and_as_many_times_as_much_at_collapse() -> None:
    mask, even = torch.ones(1, 4).bool(), torch.arange(4).view(1, 4, 1)
    assert losses_of(torch.zeros(1, 4, 4), even, mask, 2).tolist() == [pytest.approx([1, 1, 1])]
    one = torch.tensor([100.0, 0, 0, 0]).expand(1, 4, 4)
    # Four experts on two devices.
    assert losses_of(one, torch.zeros_like(even), mask, 2).tolist() == [pytest.approx([4, 2, 2])]


def test_the_sums_of_the_parts_of_a_sequence_are_its_own() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 7, 4)
    ids, mask = logits.topk(2).indices, torch.ones(1, 7).bool()
    parts = [routing_sums(logits[:, at], ids[:, at], mask[:, at], 2) for at in (slice(3), slice(3, 7))]
    whole: Any = Routing(*(a + b for a, b in zip(*parts, strict=True)))
    torch.testing.assert_close(balance_losses(whole, 2, 1), losses_of(logits, ids, mask, 2))


def test_they_push_probability_away_from_the_crowded_expert() -> None:
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    losses_of(logits, torch.tensor([[[0], [0], [0], [1]]]), torch.ones(1, 4).bool())[:, 0].sum().backward()
    assert logits.grad is not None
    assert (logits.grad[..., 0] > 0).all()
    assert (logits.grad[..., 2] < 0).all()
