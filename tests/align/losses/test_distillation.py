"""On-policy distillation: in expectation over what the policy samples, the gradient is that of the exact KL(policy || teacher), in float64."""

import math

import pytest
import torch
from torch import Tensor

from align.losses import distillation_loss, kl_estimate

VOCABULARY = 5


@pytest.fixture
def tables() -> list[Tensor]:
    """Logits of policy, teacher and an older policy: of a first token [1, V], and of a second after each first one [V, V]."""
    generator = torch.Generator().manual_seed(0)
    shape = 3, VOCABULARY + 1, VOCABULARY
    return list((1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).unbind())


def exact_kl(policy: Tensor, teacher: Tensor) -> Tensor:
    """KL(policy || teacher) of each row of logits [N, V]."""
    p, t = policy.log_softmax(-1), teacher.log_softmax(-1)
    return (p.exp() * (p - t)).sum(-1)


def every_sequence(logits: Tensor) -> Tensor:
    """The log-probabilities [V * V, 2] of the tokens of every sequence of two."""
    first, second = logits.log_softmax(-1).split([1, VOCABULARY])
    return torch.stack([first.repeat_interleave(VOCABULARY, 1)[0], second.flatten()], dim=1)


@pytest.mark.parametrize("moved", [False, True], ids=["on-policy", "after an update"])
def test_the_expected_gradient_is_that_of_the_exact_kl_of_each_next_token(tables: list[Tensor], moved: bool) -> None:
    policy, teacher, older = tables
    policy.requires_grad_()
    # The older policy differs in the second token alone, as a token's ratio says nothing of how likely its prefix was.
    sampled = torch.cat([policy.detach()[:1], older[1:]]) if moved else policy.detach()
    likely = every_sequence(sampled)
    terms = distillation_loss(
        every_sequence(policy), likely if moved else None, every_sequence(teacher), torch.ones_like(likely).bool()
    )
    expected_loss = (likely.sum(1, keepdim=True).exp() * terms).sum()
    prefixes = torch.cat([torch.ones(1), sampled[0].softmax(-1)])
    exact = (prefixes * exact_kl(policy, teacher)).sum()
    assert expected_loss.item() == pytest.approx(exact.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(loss, policy)[0] for loss in (expected_loss, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_it_is_not_the_direction_of_k3(tables: list[Tensor]) -> None:
    """As a loss, k3 of what the policy samples has the gradient of KL(teacher || policy)."""
    policy, teacher, _ = tables
    policy.requires_grad_()
    now, then = every_sequence(policy), every_sequence(teacher)
    likely = now.detach().sum(1, keepdim=True).exp()
    mask = torch.ones_like(now).bool()
    ours, k3 = distillation_loss(now, None, then, mask), kl_estimate(then - now, now - now.detach(), "k3")
    torch.testing.assert_close(ours, k3)
    one, other = (torch.autograd.grad((likely * terms).sum(), policy, retain_graph=True)[0] for terms in (ours, k3))
    assert (one - other).norm() > 0.1 * one.norm()


def test_each_tokens_gradient_is_how_much_likelier_it_is_than_to_the_teacher() -> None:
    """REINFORCE with log pi_teacher - log pi as the advantage; linear in it, however far both are apart, and finite in float32."""
    log_probs = torch.tensor([[-1.0, -30.0, -0.5, math.nan]], requires_grad=True)
    teacher = torch.tensor([[-60.0, -1.0, -0.5, math.inf]])
    terms = distillation_loss(log_probs, None, teacher, torch.tensor([[True, True, True, False]]))
    terms.sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[59.0, -29.0, 0.0, 0.0]]))
    assert terms.isfinite().all()
    assert terms[0, 3] == 0
