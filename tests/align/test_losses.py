"""The laws of `align.losses`, and each function against a second implementation: float64, plain loops."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.losses import (
    Aggregation,
    Level,
    agreement,
    completion_weights,
    group_advantages,
    grpo_token_loss,
    importance_weights,
    kl_k1,
    kl_k2,
    kl_k3,
    sequence_balance_loss,
    token_log_probs,
)

AGGREGATIONS: list[Aggregation] = ["sample_mean", "token_mean", "sequence_sum"]
LEVELS: list[Level] = ["token", "sequence"]
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

    def gradient(self, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, self.log_probs)
        return gradient


# --- token_log_probs ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_log_probs_and_entropy_are_those_of_the_tempered_softmax(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(3, 5, 11) * 4).to(dtype)
    targets = torch.randint(0, 11, (3, 5))
    log_probs, entropy = token_log_probs(logits, targets, temperature)
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
    log_probs, entropy = token_log_probs(logits, targets, 0.5)
    assert not entropy.requires_grad
    log_probs.sum().backward()
    expected = (torch.nn.functional.one_hot(targets, 5) - (logits.detach() / 0.5).softmax(-1)) / 0.5
    torch.testing.assert_close(logits.grad, expected)


def test_token_log_probs_allows_forbidden_tokens_and_refuses_temperature_zero() -> None:
    logits = torch.tensor([[[0.0, 0.0, -INF]]])
    log_probs, entropy = token_log_probs(logits, torch.tensor([[1]]))
    assert log_probs.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="temperature"):
        token_log_probs(logits, torch.tensor([[1]]), 0.0)


# --- group_advantages -----------------------------------------------------------------------------


def plain_advantages(rewards: list[float], groups: list[int], valid: list[bool], scale: str) -> list[float]:
    result = [0.0] * len(rewards)
    for group in set(groups):
        members = [i for i in range(len(rewards)) if groups[i] == group and valid[i]]
        if len(members) < 2:
            continue
        mean = math.fsum(rewards[i] for i in members) / len(members)
        std = math.sqrt(math.fsum((rewards[i] - mean) ** 2 for i in members) / (len(members) - 1))
        if std <= 1e-6:
            continue
        for i in members:
            result[i] = (rewards[i] - mean) / (std + 1e-4 if scale == "std" else 1.0)
    return result


Sample = tuple[float, int, bool]
samples = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.integers(-10000, 10000).map(lambda i: i / 1000)),
        st.integers(0, 3),
        st.sampled_from([True, True, True, False]),
    ),
    min_size=1,
    max_size=24,
)


def columns(batch: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    rewards, groups, valid = zip(*batch, strict=True)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), torch.tensor(valid)


@given(samples, st.sampled_from(["std", "none"]))
def test_advantages_match_the_plain_z_score(batch: list[Sample], scale: str) -> None:
    rewards, groups, valid = columns(batch)
    advantages, _ = group_advantages(rewards, groups, valid, scale=scale)  # type: ignore[arg-type]
    expected = plain_advantages(rewards.tolist(), groups.tolist(), valid.tolist(), scale)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(samples)
def test_advantages_of_a_group_sum_to_zero_and_their_spread_is_one(batch: list[Sample]) -> None:
    rewards, groups, valid = columns(batch)
    advantages, std = group_advantages(rewards, groups, valid)
    for group in range(len(std)):
        members = advantages[(groups == group) & valid]
        assert members.sum().item() == pytest.approx(0, abs=1e-9)
        if std[group] > 1e-6:
            assert members.std().item() == pytest.approx((std[group] / (std[group] + 1e-4)).item())


@given(samples, st.floats(-100, 100), st.floats(0.5, 100))
def test_advantages_do_not_see_the_rewards_shift_nor_but_for_epsilon_their_scale(
    batch: list[Sample], shift: float, factor: float
) -> None:
    rewards, groups, valid = columns(batch)
    advantages, std = group_advantages(rewards, groups, valid)
    shifted, _ = group_advantages(rewards + shift, groups, valid)
    torch.testing.assert_close(shifted, advantages, rtol=1e-7, atol=1e-7)
    scaled, _ = group_advantages(rewards * factor, groups, valid)
    by_epsilon = factor * (std + 1e-4) / (factor * std + 1e-4)  # 1 for a standard deviation far above 1e-4
    torch.testing.assert_close(scaled, advantages * by_epsilon[groups])


@given(samples, st.randoms())
def test_advantages_follow_a_permutation(batch: list[Sample], random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(batch)))
    random.shuffle(order)
    advantages, std = group_advantages(*columns(batch))
    permuted, permuted_std = group_advantages(*columns([batch[i] for i in order]))
    torch.testing.assert_close(permuted, advantages[order])
    torch.testing.assert_close(permuted_std, std)


@given(samples, st.sampled_from([NAN, INF, -1e30, 7.0]))
def test_invalid_samples_get_zero_and_change_nothing(batch: list[Sample], junk: float) -> None:
    rewards, groups, valid = columns(batch)
    advantages, _ = group_advantages(rewards, groups, valid)
    other, _ = group_advantages(torch.where(valid, rewards, junk), groups, valid)
    assert torch.equal(advantages, other)
    assert (advantages[~valid] == 0).all()


@given(st.floats(-1e3, 1e3), st.integers(1, 64), st.sampled_from([torch.float32, torch.float64]))
def test_equal_rewards_give_exactly_zero(reward: float, size: int, dtype: torch.dtype) -> None:
    rewards = torch.full((size,), reward, dtype=dtype)
    advantages, _ = group_advantages(rewards, torch.zeros(size, dtype=torch.long), torch.ones(size).bool())
    assert (advantages == 0).all()
    assert advantages.dtype == dtype


def test_a_valid_reward_that_is_not_a_number_is_not_hidden() -> None:
    rewards = torch.tensor([1.0, NAN, 0.0, 1.0, 5.0])
    advantages, _ = group_advantages(
        rewards, torch.tensor([0, 0, 1, 1, 0]), torch.tensor([True, True, True, True, False])
    )
    assert advantages[:2].isnan().all()
    assert advantages[2:4].isfinite().all()
    assert advantages[4] == 0


def test_no_samples_give_no_advantages() -> None:
    advantages, std = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0).bool())
    assert advantages.shape == std.shape == (0,)


# --- completion_weights ---------------------------------------------------------------------------

completions = st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=20)


@given(completions, st.sampled_from(AGGREGATIONS))
def test_weights_match_their_definition(batch: list[tuple[int, bool]], aggregation: Aggregation) -> None:
    lengths, kept = torch.tensor([x for x, _ in batch]), torch.tensor([k for _, k in batch])
    weights = completion_weights(lengths, kept, aggregation)
    trained = [length for length, keep in batch if keep and length]
    assert weights.dtype == torch.float64
    for weight, (length, keep) in zip(weights.tolist(), batch, strict=True):
        if not (keep and length):
            assert weight == 0
        elif aggregation == "sample_mean":
            assert weight == pytest.approx(1 / len(trained) / length)
        elif aggregation == "token_mean":
            assert weight == pytest.approx(1 / sum(trained))
        else:
            assert weight == pytest.approx(1 / len(trained))


@given(completions, st.sampled_from(AGGREGATIONS[:2]))
def test_weights_of_all_tokens_sum_to_one(batch: list[tuple[int, bool]], aggregation: Aggregation) -> None:
    lengths, kept = torch.tensor([x for x, _ in batch]), torch.tensor([k for _, k in batch])
    total = (completion_weights(lengths, kept, aggregation) * lengths).sum().item()
    assert total == pytest.approx(1.0 if (kept & (lengths > 0)).any() else 0.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_completion_that_is_not_kept_is_in_no_denominator(aggregation: Aggregation) -> None:
    """TRL issue 6369: truncated completions masked in the numerator only."""
    lengths, kept = torch.tensor([3, 9, 5]), torch.tensor([True, False, True])
    weights = completion_weights(lengths, kept, aggregation)
    without = completion_weights(lengths[kept], kept[kept], aggregation)
    assert torch.equal(weights[kept], without)


# --- KL -------------------------------------------------------------------------------------------

logs = st.floats(-30, 0)


@given(logs, logs)
def test_kl_estimators_match_their_definitions(log_prob: float, ref: float) -> None:
    p, r = torch.tensor(log_prob, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)
    assert kl_k1(p, r).item() == log_prob - ref
    assert kl_k2(p, r).item() == pytest.approx((log_prob - ref) ** 2 / 2)
    if ref - log_prob <= 20:
        assert kl_k3(p, r).item() == pytest.approx(math.exp(ref - log_prob) - (ref - log_prob) - 1, rel=1e-6, abs=1e-12)


@given(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32))
def test_k3_is_never_negative_and_zero_only_for_equals(log_prob: float, ref: float) -> None:
    value = kl_k3(torch.tensor(log_prob), torch.tensor(ref)).item()
    assert value >= 0
    if log_prob == ref:
        assert value == 0
    elif abs(log_prob - ref) > 1e-6:
        assert value > 0


def test_kl_estimators_have_the_mean_of_the_divergence_under_the_policy() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), exact)


def test_kl_gradients_as_losses_are_what_their_docstrings_say() -> None:
    """Expected over samples of pi: k1 nothing, k2 that of KL(pi || ref), k3 that of KL(ref || pi)."""
    torch.manual_seed(0)
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(9, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def as_loss(values: Tensor) -> Tensor:
        return gradient((policy.detach().exp() * values).sum())

    zero = torch.zeros(9, dtype=torch.float64)
    torch.testing.assert_close(as_loss(kl_k1(policy, reference)), zero)
    forward = gradient((policy.exp() * (policy - reference)).sum())
    torch.testing.assert_close(as_loss(kl_k2(policy, reference)), forward)
    reverse = gradient((reference.exp() * (reference - policy)).sum())
    torch.testing.assert_close(as_loss(kl_k3(policy, reference)), reverse)


@pytest.mark.parametrize("difference", [-1e-2, -1e-4, 1e-4, 1e-2])
def test_k3_of_a_small_difference_does_not_cancel_in_float32(difference: float) -> None:
    """`exp(d) - d - 1` in float32 is all rounding below 1e-3, and an on-policy KL lives there."""
    value = kl_k3(torch.tensor(0.0), torch.tensor(difference)).item()
    assert value == pytest.approx(difference**2 / 2 + difference**3 / 6, rel=2e-3)


@pytest.mark.parametrize("difference", [-1e4, -50.0, 19.0, 50.0, 1e4])
def test_k3_neither_overflows_nor_has_an_infinite_gradient(difference: float) -> None:
    log_prob = torch.tensor(-difference, requires_grad=True)
    value = kl_k3(log_prob, torch.tensor(0.0))
    value.backward()
    assert value.isfinite()
    assert log_prob.grad is not None
    assert log_prob.grad.isfinite()


# --- grpo_token_loss ------------------------------------------------------------------------------


def plain_grpo(
    batch: Batch, level: Level, old: Tensor, beta: float, low: float, high: float, importance: Tensor | None
) -> tuple[list[list[float]], list[list[bool]]]:
    """Loss and clipping of every token in the mask, 0 elsewhere, straight from the papers' equations."""
    losses, clipped = [], []
    for i, length in enumerate(batch.lengths.tolist()):
        log_ratios = (batch.log_probs[i] - old[i]).tolist()[:length]
        ref_ratios = (batch.ref[i] - batch.log_probs[i]).tolist()[:length]
        if level == "sequence":
            log_ratios, ref_ratios = [math.fsum(log_ratios)] * length, [math.fsum(ref_ratios)] * length
        advantage, row, row_clipped = batch.advantages[i].item(), [], []
        for t in range(length):
            rho = math.exp(log_ratios[t])
            surrogate = min(rho * advantage, min(max(rho, 1 - low), 1 + high) * advantage)
            row_clipped.append((advantage > 0 and rho > 1 + high) or (advantage < 0 and rho < 1 - low))
            if importance is not None:
                surrogate *= importance[i, t].item()
            k3 = math.exp(ref_ratios[t]) - ref_ratios[t] - 1
            row.append((beta * k3 - surrogate) / (length if level == "sequence" else 1))
        padding = batch.mask.shape[1] - length
        losses.append(row + [0.0] * padding)
        clipped.append(row_clipped + [False] * padding)
    return losses, clipped


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(LEVELS), st.booleans(), st.booleans(), st.booleans())
def test_grpo_loss_matches_the_equations(
    seed: int, level: Level, on_policy: bool, penalised: bool, corrected: bool
) -> None:
    batch, beta = Batch(seed), 0.04 if penalised else 0.0
    importance = importance_weights(batch.old, batch.ref, 1.5) if corrected else None
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
        importance=importance,
    )
    old = batch.log_probs.detach() if on_policy else batch.old
    losses, clipped = plain_grpo(batch, level, old, beta, 0.1, 0.3, importance)
    expected = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(terms.loss.detach(), expected, rtol=1e-9, atol=1e-12)
    assert terms.clipped.tolist() == clipped
    assert not any(x.requires_grad for x in (terms.kl, terms.ratio, terms.clipped))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_gradient_matches_finite_differences(level: Level, beta: float) -> None:
    batch = Batch(3, n=4, t=3)
    weights = completion_weights(batch.lengths, batch.kept)[:, None]

    def loss(log_probs: Tensor) -> Tensor:
        terms = grpo_token_loss(
            log_probs, batch.old, batch.ref, batch.advantages, batch.mask, kl_coefficient=beta, level=level
        )
        return (terms.loss * weights).sum()

    assert torch.autograd.gradcheck(loss, (batch.log_probs,))


def test_sequence_level_with_sequence_sum_is_equation_32_of_the_report_in_value_and_gradient() -> None:
    batch = Batch(5)
    batch.kept[:] = True
    terms = grpo_token_loss(
        batch.log_probs,
        batch.old,
        batch.ref,
        batch.advantages,
        batch.mask,
        kl_coefficient=0.04,
        level="sequence",
    )
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


@pytest.mark.parametrize("level", LEVELS)
def test_on_policy_the_gradient_of_equation_32_weighs_every_token_by_its_advantage_over_k(
    level: Level,
) -> None:
    batch = Batch(6)
    weights = completion_weights(batch.lengths, batch.kept, "sequence_sum")[:, None]
    terms = grpo_token_loss(batch.log_probs, None, None, batch.advantages, batch.mask, level=level)
    assert (terms.ratio == batch.mask).all()  # 1 on the mask, 0 outside
    k = (batch.kept & (batch.lengths > 0)).sum()
    expected = -batch.advantages[:, None] * batch.mask * (weights > 0) / k
    torch.testing.assert_close(batch.gradient((terms.loss * weights).sum()), expected)


def test_on_policy_is_the_same_as_old_log_probs_equal_to_the_present_ones() -> None:
    batch = Batch(7)
    a = grpo_token_loss(batch.log_probs, None, None, batch.advantages, batch.mask)
    b = grpo_token_loss(batch.log_probs, batch.log_probs.detach(), None, batch.advantages, batch.mask)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(batch.gradient(a.loss.sum()), batch.gradient(b.loss.sum()))


def test_a_clipped_token_has_no_policy_gradient_and_every_other_has_one() -> None:
    batch = Batch(8)
    terms = grpo_token_loss(batch.log_probs, batch.old, None, batch.advantages, batch.mask)
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
    with pytest.raises(ValueError, match="aggregation"):
        completion_weights(torch.ones(1), torch.ones(1).bool(), "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale"):
        group_advantages(a, torch.zeros(1, dtype=torch.long), a.bool(), scale="batch")  # type: ignore[arg-type]


# --- sampler against learner ----------------------------------------------------------------------


@given(logs, logs, st.floats(0.5, 10))
def test_importance_weights_are_the_truncated_ratio(learner: float, sampler: float, cap: float) -> None:
    log_prob = torch.tensor([learner], dtype=torch.float64, requires_grad=True)
    weights = importance_weights(log_prob, torch.tensor([sampler], dtype=torch.float64), cap)
    assert weights.item() == pytest.approx(min(math.exp(learner - sampler), cap))
    assert not weights.requires_grad


def test_agreement_matches_plain_loops_and_ignores_padding() -> None:
    batch = Batch(10)
    learner, sampler = batch.log_probs.detach().float(), batch.old.float()
    learner[~batch.mask] = NAN
    differences = [
        learner[i, t].item() - sampler[i, t].item() for i in range(len(batch.lengths)) for t in range(batch.lengths[i])
    ]
    found = agreement(learner, sampler, batch.mask)
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


# --- sequence_balance_loss ------------------------------------------------------------------------


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
