"""Log-probabilities and the KL estimators, against their definitions and on what float32 cannot hold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.losses import KlEstimator, kl_estimate, token_entropies, token_log_probs

INF = float("inf")


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_log_probs_and_entropy_are_those_of_the_tempered_softmax(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(3, 5, 11) * 4).to(dtype)
    targets = torch.randint(0, 11, (3, 5))
    log_probs, entropy = token_log_probs(logits, targets, temperature), token_entropies(logits, temperature)
    assert log_probs.dtype == entropy.dtype == torch.float32
    for b in range(3):
        for t in range(5):
            scores = [x / temperature for x in logits[b, t].double().tolist()]
            norm = math.log(sum(math.exp(x) for x in scores))
            assert log_probs[b, t].item() == pytest.approx(scores[targets[b, t]] - norm, abs=3e-6)
            assert entropy[b, t].item() == pytest.approx(
                -sum(math.exp(x - norm) * (x - norm) for x in scores), abs=3e-6
            )


def test_token_log_probs_gradient_is_one_hot_minus_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    targets = torch.randint(0, 5, (2, 3))
    assert not token_entropies(logits, 0.5).requires_grad
    token_log_probs(logits, targets, 0.5).sum().backward()
    expected = (torch.nn.functional.one_hot(targets, 5) - (logits.detach() / 0.5).softmax(-1)) / 0.5
    torch.testing.assert_close(logits.grad, expected)


def test_token_log_probs_allows_forbidden_tokens_and_refuses_temperature_zero() -> None:
    logits = torch.tensor([[[0.0, 0.0, -INF]]])
    assert token_log_probs(logits, torch.tensor([[1]])).item() == pytest.approx(-math.log(2))
    assert token_entropies(logits).item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="temperature"):
        token_log_probs(logits, torch.tensor([[1]]), 0.0)


logs = st.floats(-30, 0)


def kl(log_prob: Tensor, ref: Tensor, estimator: KlEstimator = "k3", old: Tensor | None = None) -> Tensor:
    return kl_estimate(ref - log_prob, log_prob - (log_prob.detach() if old is None else old), estimator)


@given(logs, logs, logs)
def test_kl_estimators_match_their_definitions(log_prob: float, ref: float, old: float) -> None:
    p, r, o = (torch.tensor(x, dtype=torch.float64) for x in (log_prob, ref, old))
    assert kl(p, r, "k2", o).item() == pytest.approx((log_prob - ref) ** 2 / 2)
    if ref - log_prob <= 20:
        k3 = math.exp(ref - log_prob) - (ref - log_prob) - 1
        assert kl(p, r, "k3", o).item() == kl(p, r, "k3+", o).item() == pytest.approx(k3, rel=1e-6, abs=1e-12)
        if log_prob - old <= 20:
            # The k3 of this test has the error of its subtractions, which the ratio multiplies.
            ratio = math.exp(log_prob - old)
            assert kl(p, r, "unbiased", o).item() == pytest.approx(ratio * k3, rel=1e-6, abs=1e-12 * max(1.0, ratio))


@given(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32))
def test_k3_is_never_negative_and_zero_only_for_equals(log_prob: float, ref: float) -> None:
    value = kl(torch.tensor(log_prob), torch.tensor(ref)).item()
    assert value >= 0
    if log_prob == ref:
        assert value == 0
    elif abs(log_prob - ref) > 1e-6:
        assert value > 0


def test_kl_estimators_have_the_mean_of_the_divergence_under_the_policy() -> None:
    torch.manual_seed(0)
    policy, reference, old = torch.randn(3, 9, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k3", "k3+", "unbiased"):
        torch.testing.assert_close((policy.exp() * kl(policy, reference, estimator)).sum(), exact)  # type: ignore[arg-type]
    torch.testing.assert_close((old.exp() * kl(policy, reference, "unbiased", old)).sum(), exact)


def test_kl_gradients_as_losses_are_what_their_docstring_says() -> None:
    """Expected over samples of pi: k2, k3+ and unbiased that of KL(pi || ref), k3 that of KL(ref || pi). Of pi_old: unbiased the same."""
    torch.manual_seed(0)
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    reference, old = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def as_loss(values: Tensor, sampler: Tensor) -> Tensor:
        return gradient((sampler.detach().exp() * values).sum())

    forward = gradient((policy.exp() * (policy - reference)).sum())
    for estimator in ("k2", "k3+", "unbiased"):
        torch.testing.assert_close(as_loss(kl(policy, reference, estimator), policy), forward)  # type: ignore[arg-type]
    torch.testing.assert_close(as_loss(kl(policy, reference, "unbiased", old), old), forward)
    reverse = gradient((reference.exp() * (reference - policy)).sum())
    torch.testing.assert_close(as_loss(kl(policy, reference), policy), reverse)


@pytest.mark.parametrize("difference", [-1e-2, -1e-4, 1e-4, 1e-2])
def test_k3_of_a_small_difference_does_not_cancel_in_float32(difference: float) -> None:
    """`exp(d) - d - 1` in float32 is all rounding below 1e-3, and an on-policy KL lives there."""
    value = kl(torch.tensor(0.0), torch.tensor(difference)).item()
    assert value == pytest.approx(difference**2 / 2 + difference**3 / 6, rel=2e-3)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+", "unbiased"])
@pytest.mark.parametrize("difference", [-1e4, -50.0, 19.0, 50.0, 1e4])
def test_kl_neither_overflows_nor_has_an_infinite_gradient(difference: float, estimator: KlEstimator) -> None:
    log_prob = torch.tensor(-difference, requires_grad=True)
    value = kl(log_prob, torch.tensor(0.0), estimator, torch.tensor(0.0))
    value.backward()
    assert value.isfinite()
    assert log_prob.grad is not None
    assert log_prob.grad.isfinite()
