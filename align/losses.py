"""The mathematics of SFT, GRPO and reward models as pure functions on tensors: no I/O, no distributed code, no state.

A loss here is never a mean. It is a value for every token, and the scalar is the sum of value times weight::

    loss = sum_it  weight_i * terms.loss[i, t]

The weights come from :func:`completion_weights`, computed once over the whole global batch, and already hold
its denominator. However the batch is then split over ranks, micro-batches and accumulation steps, the parts
add up to the same loss and the same gradient. (Where an engine averages gradients over ranks or accumulation
steps, its caller multiplies by their number.) For SFT the value is ``-log_probs``, the weight ``token_mean``. A reward
model has a value for every pair of completions, and the weight is one over their number.

Sources: DeepSeek-V2 report (arXiv 2405.04434), DeepSeekMath (arXiv 2402.03300), DAPO (arXiv 2503.14476),
Dr. GRPO (arXiv 2503.20783). In shapes, N is the completions of a global batch, B the rows of a micro-batch,
T their padded length; ``mask [B, T]`` is True on the tokens that are trained on. Where it is False the other
arguments may hold anything, NaN and infinities included: that reaches neither values nor gradients.
"""

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.options import Options

Aggregation = Literal["sample_mean", "token_mean", "sequence_sum"]
Level = Literal["token", "sequence"]

STD_EPSILON = 1e-4  # added to the group's standard deviation; TRL's value
ZERO_STD = 1e-6  # at or below this, a group's rewards count as all equal
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far outside any trust region, far inside float32


class LossOptions(Options):
    """What of a recipe's `grpo` decides about the loss."""

    clip_low: float = Field(0.2, ge=0, lt=1, description="importance ratios are clipped below 1 - clip_low")
    clip_high: float = Field(0.2, ge=0, description="importance ratios are clipped above 1 + clip_high")
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the k3 KL to the reference (beta)")
    level: Level = Field(
        "token",
        description="importance ratio of a token (DeepSeekMath eq. 3) or of a completion (report eq. 32)",
    )
    aggregation: Aggregation = Field(
        "sample_mean",
        description="how token losses become one loss; see completion_weights. level: sequence needs sequence_sum",
    )
    advantage_scale: Literal["std", "none"] = Field(
        "std", description="divide by the group's standard deviation, or only centre"
    )

    @model_validator(mode="after")
    def _one_mean_over_a_completion(self) -> Self:
        if self.level == "sequence" and self.aggregation != "sequence_sum":
            raise ValueError(
                f"level: sequence is one loss for each completion, of which aggregation: {self.aggregation} would divide by the length "
                "a second time: set aggregation: sequence_sum, which is their mean (report eq. 32), or level: token"
            )
        return self


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of each distribution, of ``softmax(logits / temperature)``.

    ``logits [B, T, V]`` of any floating dtype, ``targets [B, T]`` int64, already aligned: ``logits[b, t]``
    predicts ``targets[b, t]``. Both results are ``[B, T]`` float32, in nats; the entropy is detached. The
    vocabulary is reduced in float32 without keeping a log-softmax, for the entropy row by row. The
    temperature must be the one the sampler's log-probabilities are of.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    log_probs = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)
    with torch.no_grad():
        entropy = torch.empty_like(log_probs)
        for b, row in enumerate(scaled):
            entropy[b] = torch.special.entr(row.softmax(-1)).sum(-1)  # entr(0) = 0: logits of -inf are fine
    return log_probs, entropy


def group_advantages(
    rewards: Tensor, groups: Tensor, valid: Tensor, *, scale: Literal["std", "none"] = "std"
) -> tuple[Tensor, Tensor]:
    """Group-relative advantages, and the standard deviation of each group's rewards.

    ``A_i = (r_i - mean(r)) / (std(r) + 1e-4)`` over the valid samples of i's group (DeepSeek-V2 report eq.
    34), or ``A_i = r_i - mean(r)`` with ``scale="none"`` (Dr. GRPO). Neither paper on GRPO says which
    standard deviation or epsilon: these are the *sample* standard deviation (n - 1) and 1e-4, TRL's, so
    that runs compare.

    ``rewards [N]`` floating, ``groups [N]`` int64 in ``0..G-1``, ``valid [N]`` bool (a verdict was reached;
    the rewards of the others are not read). Returns ``advantages [N]`` in the dtype of ``rewards`` and
    ``group_std [G]`` float64, 0 for a group with fewer than two valid samples. Computed in float64, so that
    equal rewards leave no residue. Exactly 0: invalid samples, groups with fewer than two valid samples,
    groups with ``std <= 1e-6``. A valid reward that is not finite makes its whole group NaN rather than be
    hidden.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"unknown scale: {scale!r}")
    num_groups = int(groups.max()) + 1 if groups.numel() else 0

    def group_sum(values: Tensor) -> Tensor:
        return values.new_zeros(num_groups).index_add_(0, groups, values)

    reward = torch.where(valid, rewards.double(), 0.0)
    count = group_sum(valid.double())
    mean = group_sum(reward) / count.clamp(min=1)
    centred = torch.where(valid, reward - mean[groups], 0.0)
    std = (group_sum(centred.square()) / (count - 1).clamp(min=1)).sqrt()
    advantages = centred / (std[groups] + STD_EPSILON) if scale == "std" else centred
    return torch.where(valid & ~(std[groups] <= ZERO_STD), advantages, 0.0).to(rewards.dtype), std


def completion_weights(lengths: Tensor, kept: Tensor, aggregation: Aggregation = "sample_mean") -> Tensor:
    """The weight of every token of each completion, ``[N]`` float64, over the whole global batch.

    With K completions trained on, of ``|o_i|`` tokens each:

    - ``sample_mean``: ``1 / (K |o_i|)``, mean over completions of the mean over tokens (DeepSeekMath eq. 3).
    - ``token_mean``: ``1 / sum_j |o_j|``, mean over all tokens of the batch (DAPO).
    - ``sequence_sum``: ``1 / K``, mean over completions of the sum over tokens, for the DeepSeek-V2 report's
      eq. 32 (see :func:`grpo_token_loss`).

    ``lengths [N]`` int, counted by the same mask as the loss; ``kept [N]`` bool. A completion that is not
    kept, or has no token, has weight 0 and is in no denominator. With none left all weights are 0.
    """
    trained = kept & (lengths > 0)
    length = torch.where(trained, lengths, 1).double()
    samples = trained.sum().clamp(min=1).double()
    if aggregation == "sample_mean":
        weights = 1 / (samples * length)
    elif aggregation == "token_mean":
        weights = 1 / (length * trained).sum().clamp(min=1)
    elif aggregation == "sequence_sum":
        weights = 1 / samples
    else:
        raise ValueError(f"unknown aggregation: {aggregation!r}")
    return torch.where(trained, weights, 0.0)


def kl_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """``log pi - log pi_ref``: unbiased for KL(pi || ref) on samples of pi, of high variance and any sign.

    Schulman 2020, "Approximating KL divergence", k1. A number to report: as a loss its expected gradient is
    zero, whatever the reference.
    """
    return log_probs - ref_log_probs


def kl_k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """``(log pi - log pi_ref)^2 / 2``: biased for KL(pi || ref), of low variance (Schulman 2020, k2).

    As a loss on samples of pi its expected gradient is exactly that of KL(pi || ref).
    """
    return (log_probs - ref_log_probs).square() / 2


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """``pi_ref/pi - log(pi_ref/pi) - 1 >= 0``: unbiased for KL(pi || ref) on samples of pi, of low variance.

    Schulman 2020, k3; DeepSeekMath eq. 4; DeepSeek-V2 report eq. 33. As a loss on samples of pi its expected
    gradient is that of KL(ref || pi), the other direction.

    The log-ratio ``log pi_ref / pi`` is cut off at +20, beyond which the value is constant and the gradient
    0: neither overflows. Towards minus infinity k3 grows only linearly and is not cut. ``expm1`` keeps
    small divergences from cancelling.
    """
    return _k3(ref_log_probs - log_probs)


def _k3(log_ratio: Tensor) -> Tensor:
    log_ratio = log_ratio.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


class GrpoTerms(NamedTuple):
    """What :func:`grpo_token_loss` returns, each ``[B, T]`` and 0 (or False) outside the mask."""

    loss: Tensor
    """To be minimised, times weight and summed. The only one with a gradient."""
    kl: Tensor
    """k3 to the reference, before the coefficient; weighted like the loss. 0 without a reference."""
    ratio: Tensor
    """rho; at the sequence level the same number on every token of the sequence."""
    clipped: Tensor
    """bool: clipping changed the surrogate, so this term has no policy gradient."""


def grpo_token_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
    level: Level = "token",
    importance: Tensor | None = None,
) -> GrpoTerms:
    """GRPO's clipped surrogate with the KL penalty in the loss, for every token, still without its weight.

    ``level="token"`` (DeepSeekMath eq. 3-4)::

        loss_it = -(min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i) - beta k3_it)
        rho_it  = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)

    ``level="sequence"`` (DeepSeek-V2 report eq. 32-33 as printed): the same with ratios of whole sequences,
    ``rho_i = pi(o_i|q) / pi_old(o_i|q) = exp(sum_t log rho_it)``, and k3 of ``pi_ref(o_i|q) / pi(o_i|q)``.
    Each token carries ``loss_i / |o_i|``, so that with the weights ``sequence_sum``, 1/K, the sum over
    tokens is ``1/K sum_i loss_i``: eq. 32 in value and gradient, on-policy and off. A row must hold the
    whole sequence. (GSPO is another thing: its ratio is the geometric mean over tokens.)

    At ``pi = pi_old`` the surrogate of eq. 32 has the gradient ``-1/K sum_i A_i sum_t grad log pi(o_it)``. So
    has ``level="token"`` with ``sequence_sum``: strictly on-policy the two differ in the KL term alone.

    Args:
        log_probs: ``[B, T]`` floating, with gradient.
        old_log_probs: ``[B, T]``, of the policy the trust region is around. None: strictly on-policy, the
            ratio is 1 and its gradient that of ``log_probs``.
        ref_log_probs: ``[B, T]`` of the reference, or None.
        advantages: ``[B]`` or ``[B, 1]``.
        mask: ``[B, T]`` bool.
        clip_low, clip_high: the trust region, ``[1 - clip_low, 1 + clip_high]``.
        kl_coefficient: beta; at 0 the KL is measured and not in the loss.
        importance: weights that multiply the surrogate and not the KL (:func:`importance_weights`), ``[B,
            T]`` or ``[B, 1]``.

    Log-ratios are cut off at +20, beyond which there is no gradient.

    Raises ValueError for a KL coefficient without a reference, and for an unknown level.
    """
    if kl_coefficient and ref_log_probs is None:
        raise ValueError("a KL coefficient needs the reference's log-probabilities")
    if level not in ("token", "sequence"):
        raise ValueError(f"unknown level: {level!r}")
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    reference = log_probs.detach() if ref_log_probs is None else ref_log_probs
    log_ratio = torch.where(mask, log_probs - old, 0.0)
    ref_log_ratio = torch.where(mask, reference - log_probs, 0.0)
    share = torch.ones_like(log_ratio)
    if level == "sequence":
        log_ratio, ref_log_ratio = log_ratio.sum(1, keepdim=True), ref_log_ratio.sum(1, keepdim=True)
        share = share / mask.sum(1, keepdim=True).clamp(min=1)

    advantage = advantages.reshape(-1, 1).to(log_ratio.dtype)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    unclipped = ratio * advantage
    surrogate = torch.minimum(unclipped, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    clipped = surrogate < unclipped
    if importance is not None:
        surrogate = surrogate * torch.where(mask, importance, 1.0)
    kl = _k3(ref_log_ratio)
    loss = kl_coefficient * kl - surrogate if kl_coefficient else -surrogate
    return GrpoTerms(
        loss=torch.where(mask, share * loss, 0.0),
        kl=torch.where(mask, share * kl.detach(), 0.0),
        ratio=torch.where(mask, ratio.detach(), 0.0),
        clipped=clipped & mask,
    )


def importance_weights(learner_old_log_probs: Tensor, sampler_log_probs: Tensor, cap: float) -> Tensor:
    """``min(pi_old / pi_sampler, cap)``, detached: for samples of a sampler that is not quite the learner.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"). Elementwise, any shape: a weight for each token; or for each sequence, from
    log-probabilities summed over its mask, ``[B, 1]``.
    """
    return (learner_old_log_probs - sampler_log_probs).detach().exp().clamp(max=cap)


class Agreement(NamedTuple):
    """How far the learner's log-probabilities are from the sampler's."""

    mean_abs: float
    """Mean ``|log pi_learner - log pi_sampler|`` over the tokens, in nats."""
    max_abs: float
    k3: float
    """Mean k3 estimate of KL(sampler || learner), not cut off."""
    tokens: int
    """How many tokens that is, to weight the means of several shards by."""
    equal: int
    """Of how many of them both are the same to the last bit."""


def agreement(learner_log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor) -> Agreement:
    """How far two log-probabilities of the same sampled tokens are apart, all ``[B, T]``, in float64.

    A NaN or an infinity on either side, under the mask, comes out as NaN or infinity. Without any token every
    number is NaN, as nothing was measured. So a gate asks ``not (mean_abs <= limit)``.
    """
    difference = (learner_log_probs.detach().double() - sampler_log_probs.detach().double())[mask]
    if difference.numel() == 0:
        return Agreement(mean_abs=float("nan"), max_abs=float("nan"), k3=float("nan"), tokens=0, equal=0)
    return Agreement(
        mean_abs=difference.abs().mean().item(),
        max_abs=difference.abs().max().item(),
        k3=(torch.expm1(difference) - difference).mean().item(),
        tokens=difference.numel(),
        equal=int((difference == 0).sum()),
    )


def sequence_balance_loss(router_probs: Tensor, expert_ids: Tensor, mask: Tensor) -> Tensor:
    """The expert-level balance loss of one MoE layer, for each sequence, ``[B]``, before its factor alpha_1.

    DeepSeek-V2 report eq. 23-25, for each sequence apart as in the released model (``seq_aux``), over its T
    tokens under the mask::

        L = sum_e f_e P_e     f_e = E / (K T) sum_t 1[token t chose expert e]     P_e = 1/T sum_t s_te

    ``router_probs [B, T, E]`` are the affinities s: the *full* softmax, before the top-k or the device
    limit sets any to 0. ``expert_ids [B, T, K]`` int64 are the experts chosen. ``mask [B, T]`` is True on
    every token that is not padding, the prompt's included. Even routing gives 1, a sequence without tokens
    0. The gradient flows through P alone. The caller multiplies by alpha_1 over the number of sequences in
    the global batch.
    """
    num_experts, top_k = router_probs.shape[-1], expert_ids.shape[-1]
    real = mask.unsqueeze(-1)
    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    chosen = torch.where(real, expert_ids, 0).flatten(1)
    ones = real.expand_as(expert_ids).flatten(1).to(router_probs.dtype)
    counts = router_probs.new_zeros(len(mask), num_experts).scatter_add_(1, chosen, ones)
    fractions = counts * num_experts / (top_k * tokens)
    mean_affinities = torch.where(real, router_probs, 0.0).sum(1) / tokens
    return (fractions * mean_affinities).sum(1)


def pairwise_loss(chosen: Tensor, rejected: Tensor, margins: Tensor | None = None) -> Tensor:
    """``-log sigmoid(r_chosen - r_rejected - margin)`` of each pair, ``[B]``, without its weight.

    The negative log-likelihood of the preferences under Bradley and Terry's model (Ouyang et al. 2022,
    arXiv:2203.02155, eq. 1), with the margin of Llama 2 (arXiv:2307.09288, eq. 2). The DeepSeek-V2 report trains its
    reward models "with either a point-wise or a pair-wise loss" (section 4.2) and prints neither. ``chosen``,
    ``rejected`` and ``margins`` are ``[B]``. Only differences count: a constant added to all rewards changes nothing.
    """
    difference = chosen - rejected
    return -logsigmoid(difference if margins is None else difference - margins)


def pointwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-(log sigmoid(r_chosen) + log(1 - sigmoid(r_rejected))) / 2`` of each pair, ``[B]``, without its weight.

    The binary cross-entropy of both completions, each judged alone: label 1 for the chosen, 0 for the rejected one, as
    the outcome reward models of Cobbe et al. 2021 (arXiv:2110.14168) and Math-Shepherd (arXiv:2312.08935) are trained.
    ``sigmoid(r)`` is then the probability that a completion is right, and r > 0 says that it more likely is.
    """
    return -(logsigmoid(chosen) + logsigmoid(-rejected)) / 2
