"""The GRPO surrogate against the papers' equations, in float64 and plain loops; and under every split."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.losses import (
    Aggregation,
    KlEstimator,
    Level,
    completion_weights,
    group_advantages,
    grpo_token_loss,
)
from align.losses.grpo import GrpoTerms

AGGREGATIONS: list[Aggregation] = ["sample_mean", "token_mean", "sequence_sum"]
LEVELS: list[Level] = ["token", "sequence", "geometric"]
ESTIMATORS: list[KlEstimator] = ["k2", "k3", "k3+", "unbiased"]
NAN, INF = float("nan"), float("inf")


class Batch:
    """Random float64 log-probabilities of N completions of 0 to T tokens; all of one kind by the seed."""

    def __init__(self, seed: int, n: int = 6, t: int = 7, spread: float = 0.3) -> None:
        g = torch.Generator().manual_seed(seed)
        self.log_probs = (-torch.rand(n, t, generator=g, dtype=torch.float64) * 3).requires_grad_()
        self.old = self.log_probs.detach() + spread * torch.randn(n, t, generator=g, dtype=torch.float64)
        self.ref = self.log_probs.detach() + spread * torch.randn(n, t, generator=g, dtype=torch.float64)
        self.advantages = torch.randn(n, generator=g, dtype=torch.float64)
        self.lengths = torch.randint(0, t + 1, (n,), generator=g)
        self.lengths[0] = t
        self.mask = torch.arange(t) < self.lengths[:, None]
        self.kept = torch.rand(n, generator=g) < 0.8
        self.kept[0] = True

    def terms(self, old: Tensor | None, ref: Tensor | None = None, **options: Any) -> GrpoTerms:
        """The surrogate of the whole batch."""
        return grpo_token_loss(self.log_probs, old, ref, self.advantages, self.mask, **options)

    def gradient(self, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, self.log_probs)
        return gradient


def plain_grpo(
    batch: Batch,
    level: Level,
    old: Tensor,
    beta: float,
    low: float,
    high: float,
    importance: Tensor | None,
    kl: KlEstimator = "k3",
    cispo_max: float | None = None,
) -> tuple[list[list[float]], list[list[bool]]]:
    """Loss and clipping of every token in the mask, 0 elsewhere, straight from the papers' equations."""
    losses, clipped = [], []
    for i, length in enumerate(batch.lengths.tolist()):
        log_ratios = (batch.log_probs[i] - old[i]).tolist()[:length]
        ref_ratios = (batch.ref[i] - batch.log_probs[i]).tolist()[:length]
        if level == "sequence":
            log_ratios, ref_ratios = [math.fsum(log_ratios)] * length, [math.fsum(ref_ratios)] * length
        in_kl = log_ratios
        if level == "geometric":
            log_ratios = [math.fsum(log_ratios) / length] * length if length else []
        advantage, row, row_clipped = batch.advantages[i].item(), [], []
        for t in range(length):
            rho = math.exp(log_ratios[t])
            surrogate = min(rho * advantage, min(max(rho, 1 - low), 1 + high) * advantage)
            row_clipped.append((advantage > 0 and rho > 1 + high) or (advantage < 0 and rho < 1 - low))
            if cispo_max is not None:
                surrogate = min(rho, cispo_max) * advantage * batch.log_probs[i, t].item()
                row_clipped[-1] = rho > cispo_max
            if importance is not None:
                surrogate *= importance[i, t].item()
            k3 = math.exp(ref_ratios[t]) - ref_ratios[t] - 1
            estimates = {"k2": ref_ratios[t] ** 2 / 2, "k3": k3, "k3+": k3, "unbiased": math.exp(in_kl[t]) * k3}
            row.append((beta * estimates[kl] - surrogate) / (length if level == "sequence" else 1))
        padding = batch.mask.shape[1] - length
        losses.append(row + [0.0] * padding)
        clipped.append(row_clipped + [False] * padding)
    return losses, clipped


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([*((level, None) for level in LEVELS), ("token", 1.1)]),
    st.booleans(),
    st.sampled_from([None, *ESTIMATORS]),
    st.booleans(),
)
def test_grpo_loss_matches_the_equations(
    seed: int, surrogate: tuple[Level, float | None], on_policy: bool, kl: KlEstimator | None, corrected: bool
) -> None:
    batch, beta, (level, cispo_max) = Batch(seed), 0.04 if kl else 0.0, surrogate
    importance = (batch.old - batch.ref).exp().clamp(max=1.5) if corrected else None
    terms = grpo_token_loss(
        batch.log_probs,
        None if on_policy else batch.old,
        batch.ref,
        batch.advantages[:, None],
        batch.mask,
        clip_low=0.1,
        clip_high=0.3,
        kl_coefficient=beta,
        level=level,
        kl=kl or "k3",
        cispo_max=cispo_max,
        importance=importance,
    )
    old = batch.log_probs.detach() if on_policy else batch.old
    losses, clipped = plain_grpo(batch, level, old, beta, 0.1, 0.3, importance, kl or "k3", cispo_max)
    expected = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(terms.loss.detach(), expected, rtol=1e-9, atol=1e-12)
    assert terms.clipped.tolist() == clipped
    assert not any(x.requires_grad for x in (terms.kl, terms.ratio, terms.clipped))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("beta", "kl"), [(0.0, "k3"), (0.1, "k3"), (0.1, "k2"), (0.1, "unbiased")])
def test_grpo_gradient_matches_finite_differences(level: Level, beta: float, kl: KlEstimator) -> None:
    batch = Batch(3, n=4, t=3)
    weights = completion_weights(batch.lengths, batch.kept)[:, None]

    def loss(log_probs: Tensor) -> Tensor:
        terms = grpo_token_loss(
            log_probs, batch.old, batch.ref, batch.advantages, batch.mask, kl_coefficient=beta, level=level, kl=kl
        )
        return (terms.loss * weights).sum()

    assert torch.autograd.gradcheck(loss, (batch.log_probs,))


def test_sequence_level_with_sequence_sum_is_equation_32_of_the_report_in_value_and_gradient() -> None:
    batch = Batch(5)
    batch.kept[:] = True
    terms = batch.terms(batch.old, batch.ref, kl_coefficient=0.04, level="sequence")
    loss = (terms.loss * completion_weights(batch.lengths, batch.kept, "sequence_sum")[:, None]).sum()

    rows = [i for i in range(len(batch.lengths)) if batch.lengths[i] > 0]
    objective = torch.zeros((), dtype=torch.float64)
    for i in rows:
        pi = (batch.log_probs[i] * batch.mask[i]).sum()
        rho = (pi - (batch.old[i] * batch.mask[i]).sum()).exp()
        surrogate = torch.min(rho * batch.advantages[i], rho.clamp(0.8, 1.2) * batch.advantages[i])
        ref = (batch.ref[i] * batch.mask[i]).sum() - pi
        objective = objective + (surrogate - 0.04 * (ref.exp() - ref - 1)) / len(rows)

    torch.testing.assert_close(loss, -objective)
    torch.testing.assert_close(batch.gradient(loss), batch.gradient(-objective))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_gradient_of_equation_32_weighs_every_token_by_its_advantage_over_k(
    level: Level,
) -> None:
    batch = Batch(6)
    weights = completion_weights(batch.lengths, batch.kept, "sequence_sum")[:, None]
    terms = batch.terms(None, level=level)
    assert (terms.ratio == batch.mask).all()  # 1 on the mask, 0 outside
    k = (batch.kept & (batch.lengths > 0)).sum()
    expected = -batch.advantages[:, None] * batch.mask * (weights > 0) / k
    torch.testing.assert_close(batch.gradient((terms.loss * weights).sum()), expected)


def test_with_cispo_every_token_keeps_its_gradient_by_a_weight_of_at_most_the_bound() -> None:
    """Eq. 4-5 of MiniMax-M1, by tokens whose ratio is beyond a clipped surrogate's trust region too."""
    batch = Batch(8)
    terms = batch.terms(batch.old, cispo_max=1.1)
    ratio = (batch.log_probs.detach() - batch.old).exp()
    assert (ratio[batch.mask] > 1.1).any()
    expected = -ratio.clamp(max=1.1) * batch.advantages[:, None] * batch.mask
    torch.testing.assert_close(batch.gradient(terms.loss.sum()), expected)
    assert torch.equal(terms.clipped, (ratio > 1.1) & batch.mask)


def test_on_policy_is_the_same_as_old_log_probs_equal_to_the_present_ones() -> None:
    batch = Batch(7)
    a, b = batch.terms(None), batch.terms(batch.log_probs.detach())
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(batch.gradient(a.loss.sum()), batch.gradient(b.loss.sum()))


def test_a_clipped_token_has_no_policy_gradient_and_every_other_has_one() -> None:
    batch = Batch(8)
    terms = batch.terms(batch.old)
    gradient = batch.gradient(terms.loss.sum())
    assert terms.clipped.any()
    assert torch.equal(gradient == 0, terms.clipped | ~batch.mask)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(LEVELS),
    st.sampled_from(AGGREGATIONS),
    st.lists(st.integers(1, 5), min_size=0, max_size=5),
    st.randoms(use_true_random=False),
)
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(  # type: ignore[no-untyped-def]
    seed: int, level: Level, aggregation: Aggregation, cuts: list[int], random
) -> None:
    batch = Batch(seed)
    weights = completion_weights(batch.lengths, batch.kept, aggregation)
    order = list(range(6))
    random.shuffle(order)

    def loss(rows: list[int]) -> Tensor:
        width = int(batch.lengths[rows].max())  # each micro-batch is padded to its own longest row
        terms = grpo_token_loss(
            batch.log_probs[rows, :width],
            batch.old[rows, :width],
            batch.ref[rows, :width],
            batch.advantages[rows],
            batch.mask[rows, :width],
            kl_coefficient=0.04,
            level=level,
        )
        return (terms.loss * weights[rows, None]).sum()

    edges = [0, *sorted(set(cuts)), 6]
    parts = [loss(order[a:b]) for a, b in pairwise(edges)]
    whole = loss(list(range(6)))
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    accumulated = torch.stack([batch.gradient(part) for part in parts]).sum(0)
    torch.testing.assert_close(accumulated, batch.gradient(whole))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_padding_reaches_neither_values_nor_gradients(level: Level, junk: float) -> None:
    batch = Batch(9)

    def run(fill: float) -> tuple[Tensor, Tensor]:
        def padded(x: Tensor) -> Tensor:
            return torch.where(batch.mask, x.detach(), fill)

        log_probs = padded(batch.log_probs).requires_grad_()
        terms = grpo_token_loss(
            log_probs,
            padded(batch.old),
            padded(batch.ref),
            batch.advantages,
            batch.mask,
            kl_coefficient=0.04,
            level=level,
            importance=padded(torch.full_like(batch.old, 0.9)),
        )
        (gradient,) = torch.autograd.grad(terms.loss.sum(), log_probs)
        return torch.stack([terms.loss, terms.kl, terms.ratio, terms.clipped.double()]), gradient

    for found, expected in zip(run(junk), run(0.0), strict=True):
        assert torch.equal(found, expected)
        assert (found[..., ~batch.mask] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shift", [-1e4, -30.0, 30.0, 1e4])
def test_far_policies_give_finite_losses_and_gradients(level: Level, shift: float) -> None:
    log_probs = torch.full((2, 3), -1.0, requires_grad=True)
    far = torch.full((2, 3), -1.0 + shift)
    mask, advantages = torch.ones(2, 3).bool(), torch.tensor([1.0, -1.0])
    terms = grpo_token_loss(log_probs, far, far, advantages, mask, kl_coefficient=0.1, level=level)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), log_probs)
    assert terms.loss.isfinite().all()
    assert gradient.isfinite().all()


def test_what_would_silently_do_nothing_is_refused() -> None:
    x, a, mask = torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2).bool()
    with pytest.raises(ValueError, match="reference"):
        grpo_token_loss(x, None, None, a, mask, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="level"):
        grpo_token_loss(x, None, None, a, mask, level="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="CISPO"):
        grpo_token_loss(x, None, None, a, mask, level="sequence", cispo_max=5.0)
    with pytest.raises(ValueError, match="estimator"):
        grpo_token_loss(x, None, x, a, mask, kl_coefficient=0.1, kl="k1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="longest"):
        completion_weights(torch.ones(1), torch.ones(1).bool(), "constant_length")
    with pytest.raises(ValueError, match="aggregation"):
        completion_weights(torch.ones(1), torch.ones(1).bool(), "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale"):
        group_advantages(a, torch.zeros(1, dtype=torch.long), a.bool(), scale="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="baseline"):
        group_advantages(a, torch.zeros(1, dtype=torch.long), a.bool(), baseline="step")  # type: ignore[arg-type]
