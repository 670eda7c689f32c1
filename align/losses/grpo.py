"""Log-probabilities, advantages, the weights of completions, the surrogate with its KL and its correction, and the agreement with the sampler."""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from align.losses.options import AdvantageScale, Aggregation, Baseline, CorrectionOptions, KlEstimator, Level

STD_EPSILON = 1e-4  # added to the group's standard deviation; TRL's value
ZERO_STD = 1e-6  # at or below this, a group's rewards count as all equal
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far outside any trust region, far inside float32


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target of ``softmax(logits / temperature)``: ``[B, T]`` float32, in nats.

    ``logits [B, T, V]`` of any floating dtype, ``targets [B, T]`` int64, already aligned: ``logits[b, t]``
    predicts ``targets[b, t]``. The vocabulary is reduced in float32 without keeping a log-softmax. The
    temperature must be the one the sampler's log-probabilities are of.
    """
    scaled = _scaled(logits, temperature)
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


@torch.no_grad()
def token_entropies(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each distribution ``softmax(logits / temperature)``: ``[B, T]`` float32, in nats, without a gradient.

    ``logits`` is ``[B, T, V]`` of any floating dtype; its rows are reduced in float32, one after the other.
    """
    scaled = _scaled(logits, temperature)
    # entr(0) = 0: logits of -inf are fine
    return torch.stack([torch.special.entr(row.softmax(-1)).sum(-1) for row in scaled])


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    valid: Tensor,
    *,
    scale: AdvantageScale = "std",
    baseline: Baseline = "group",
) -> tuple[Tensor, Tensor]:
    """Group-relative advantages, and the standard deviation of each group's rewards.

    ``A_i = (r_i - mean(r)) / (std(r) + 1e-4)`` over the valid samples of i's group (DeepSeek-V2 report eq.
    34), or ``A_i = r_i - mean(r)`` with ``scale="none"`` (Dr. GRPO). Neither paper on GRPO says which
    standard deviation or epsilon: these are the *sample* standard deviation (n - 1) and 1e-4, TRL's, so
    that runs compare. ``scale="batch"`` divides by that of all advantages, plus 1e-4 (REINFORCE++).

    ``baseline="leave_one_out"`` subtracts the mean of the *other* samples of the group (RLOO), ``"batch"`` that of
    all samples (REINFORCE++ without groups), with which a group of equal rewards has advantages too.

    ``rewards [N]`` floating, ``groups [N]`` int64 in ``0..G-1``, ``valid [N]`` bool (a verdict was reached;
    the rewards of the others are not read). Returns ``advantages [N]`` in the dtype of ``rewards`` and
    ``group_std [G]`` float64, 0 for a group with fewer than two valid samples. Computed in float64, so that
    equal rewards leave no residue. Exactly 0: invalid samples; and but for ``baseline="batch"`` groups with
    fewer than two valid samples, and groups with ``std <= 1e-6``; with it all, where the standard deviation of all is
    no more. A valid reward that is not finite makes all that it is compared with NaN rather than be hidden.
    """
    if scale not in get_args(AdvantageScale):
        raise ValueError(f"unknown scale: {scale!r}")
    if baseline not in get_args(Baseline):
        raise ValueError(f"unknown baseline: {baseline!r}")
    num_groups = int(groups.max()) + 1 if groups.numel() else 0

    def group_sum(values: Tensor) -> Tensor:
        return values.new_zeros(num_groups).index_add_(0, groups, values)

    reward = torch.where(valid, rewards.double(), 0.0)
    count = group_sum(valid.double())
    mean = group_sum(reward) / count.clamp(min=1)
    centred = torch.where(valid, reward - mean[groups], 0.0)
    std = (group_sum(centred.square()) / (count - 1).clamp(min=1)).sqrt()
    compared = valid & (count[groups] > 1)
    if baseline == "leave_one_out":
        centred = centred * (count / (count - 1).clamp(min=1))[groups]
    elif baseline == "batch":
        centred = torch.where(valid, reward - reward.sum() / valid.sum().clamp(min=1), 0.0)
        compared = valid
    of_all = (centred.square().sum() / (compared.sum() - 1).clamp(min=1)).sqrt()
    spread = of_all if baseline == "batch" else std[groups]
    advantages = centred
    if scale != "none":
        advantages = centred / ((std[groups] if scale == "std" else of_all) + STD_EPSILON)
    return torch.where(valid & ~(spread <= ZERO_STD), advantages, 0.0).to(rewards.dtype), std


def completion_weights(
    lengths: Tensor, kept: Tensor, aggregation: Aggregation = "sample_mean", longest: int | None = None
) -> Tensor:
    """The weight of every token of each completion, ``[N]`` float64, over the whole global batch.

    With K completions trained on, of ``|o_i|`` tokens each:

    - ``sample_mean``: ``1 / (K |o_i|)``, mean over completions of the mean over tokens (DeepSeekMath eq. 3).
    - ``token_mean``: ``1 / sum_j |o_j|``, mean over all tokens of the batch (DAPO).
    - ``sequence_sum``: ``1 / K``, mean over completions of the sum over tokens, for the DeepSeek-V2 report's
      eq. 32 (see :func:`grpo_token_loss`).
    - ``constant_length``: ``1 / (K longest)``, as if every completion had the length that it may have at most
      (Dr. GRPO): a token of a long wrong answer weighs as much as one of a short one.

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
    elif aggregation == "constant_length":
        if longest is None:
            raise ValueError("constant_length needs the longest length that a completion may have")
        weights = 1 / (samples * longest)
    else:
        raise ValueError(f"unknown aggregation: {aggregation!r}")
    return torch.where(trained, weights, 0.0)


def kl_estimate(ref_log_ratio: Tensor, log_ratio: Tensor, kl: KlEstimator = "k3") -> Tensor:
    """KL(pi || pi_ref) on samples of pi_old, elementwise, from ``log(pi_ref / pi)`` and ``log(pi / pi_old)``.

    Of what is sampled from pi itself (Schulman 2020, "Approximating KL divergence"):

    - ``k2``: ``log(pi_ref / pi)^2 / 2``, biased; as a loss its expected gradient is exactly that of KL(pi || ref).
    - ``k3``: ``pi_ref/pi - log(pi_ref/pi) - 1 >= 0``, unbiased (DeepSeekMath eq. 4; DeepSeek-V2 report eq. 33); as a loss
      its expected gradient is that of KL(ref || pi), the other direction.
    - ``k3+``: the value of k3, the gradient of k2 (as verl calls it).
    - ``unbiased``: ``pi/pi_old`` times k3 (DeepSeek-V3.2, section 3.1), whose ratio has a gradient too: unbiased for
      KL(pi || ref) in value and gradient, on samples of pi and of pi_old alike.

    Both log-ratios are cut off at +20 where they are exponents, beyond which there is no gradient: nothing overflows.
    Towards minus infinity k3 grows only linearly and is not cut. ``expm1`` keeps small divergences from cancelling.
    """
    k2 = ref_log_ratio.square() / 2
    if kl == "k2":
        return k2
    limited = ref_log_ratio.clamp(max=MAX_LOG_RATIO)
    k3 = torch.expm1(limited) - limited
    if kl == "k3":
        return k3
    if kl == "k3+":
        return k3.detach() + (k2 - k2.detach())
    if kl == "unbiased":
        return log_ratio.clamp(max=MAX_LOG_RATIO).exp() * k3
    raise ValueError(f"unknown KL estimator: {kl!r}")


class GrpoTerms(NamedTuple):
    """What :func:`grpo_token_loss` returns, each ``[B, T]`` and 0 (or False) outside the mask."""

    loss: Tensor
    """To be minimised, times weight and summed. The only one with a gradient."""
    kl: Tensor
    """The estimated KL to the reference, before the coefficient; weighted like the loss. 0 without a reference."""
    ratio: Tensor
    """rho; at the sequence level the same number on every token of the sequence."""
    clipped: Tensor
    """bool: clipping changed the surrogate, so this term has no policy gradient; with CISPO, its weight was cut."""


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
    kl: KlEstimator = "k3",
    cispo_max: float | None = None,
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
    whole sequence.

    ``level="geometric"`` (GSPO eq. 5-7): rho_i is the geometric mean of the sequence's token ratios, ``exp(mean_t log
    rho_it)``, on each of its tokens; the weights ``sample_mean`` make of it one mean over sequences. The KL stays that of each
    token.

    With ``cispo_max`` (CISPO; its upper bound as ScaleRL, arXiv 2510.13786, and TRL have it) no token loses its gradient::

        loss_it = -(detach(min(rho_it, cispo_max)) A_i log pi(o_it | q, o_i<t) - beta k3_it)

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
        kl: the estimator in the place of k3 (:func:`kl_estimate`).
        cispo_max: the bound of CISPO's weights, at ``level="token"`` only.
        importance: weights that multiply the surrogate and not the KL (:func:`correction_weights`), ``[B,
            T]`` or ``[B, 1]``.

    Log-ratios are cut off at +20, beyond which there is no gradient.

    Raises ValueError for a KL coefficient without a reference, for an unknown level, and for CISPO at another than the token's.
    """
    if kl_coefficient and ref_log_probs is None:
        raise ValueError("a KL coefficient needs the reference's log-probabilities")
    if level not in get_args(Level) or (cispo_max is not None and level != "token"):
        raise ValueError(
            f"unknown level: {level!r}" if cispo_max is None else f"CISPO is of tokens, not level: {level!r}"
        )
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    reference = log_probs.detach() if ref_log_probs is None else ref_log_probs
    log_ratio = torch.where(mask, log_probs - old, 0.0)
    ref_log_ratio = torch.where(mask, reference - log_probs, 0.0)
    share = torch.ones_like(log_ratio)
    if level == "sequence":
        log_ratio, ref_log_ratio = log_ratio.sum(1, keepdim=True), ref_log_ratio.sum(1, keepdim=True)
        share = share / mask.sum(1, keepdim=True).clamp(min=1)

    estimated = kl_estimate(ref_log_ratio, log_ratio, kl)
    if level == "geometric":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)

    advantage = advantages.reshape(-1, 1).to(log_ratio.dtype)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    if cispo_max is None:
        unclipped = ratio * advantage
        surrogate = torch.minimum(unclipped, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
        clipped = surrogate < unclipped
    else:
        surrogate = ratio.detach().clamp(max=cispo_max) * advantage * torch.where(mask, log_probs, 0.0)
        clipped = ratio > cispo_max
    if importance is not None:
        surrogate = surrogate * torch.where(mask, importance, 1.0)
    loss = kl_coefficient * estimated - surrogate if kl_coefficient else -surrogate
    return GrpoTerms(
        loss=torch.where(mask, share * loss, 0.0),
        kl=torch.where(mask, share * estimated.detach(), 0.0),
        ratio=torch.where(mask, ratio.detach(), 0.0),
        clipped=clipped & mask,
    )


def distillation_loss(
    log_probs: Tensor, old_log_probs: Tensor | None, teacher_log_probs: Tensor, mask: Tensor
) -> Tensor:
    """KL(policy || teacher) estimated on every token that the policy sampled, in nats, still without its weight.

    Its expected gradient is that of the exact ``sum_a pi(a) log(pi(a) / pi_teacher(a))`` of the next token, averaged over the prefixes that
    the policy samples; through the sampling of these there is none. That is on-policy distillation with the reverse KL (GKD, Agarwal et al.,
    arXiv:2306.13649, eq. 4 with lambda = 1; reverse as in MiniLLM, arXiv:2306.08543), on sampled tokens in place of whole distributions::

        gradient_t = rho_t log(pi(o_t) / pi_teacher(o_t)) grad log pi(o_t),    rho_t = pi(o_t) / pi_old(o_t)

    which is REINFORCE with the advantage ``log pi_teacher - log pi`` of each token. The value is ``rho k3`` of :func:`kl_estimate`, unbiased
    like the gradient. All arguments are ``[B, T]``, as is the result: floating, with the gradient of ``log_probs``, 0 outside the ``mask``.
    ``old_log_probs`` are those of the policy that sampled; None: it is the policy itself, and rho is 1. Log-ratios are cut off at +20 where
    they are exponents.
    """
    old = log_probs if old_log_probs is None else old_log_probs
    log_ratio = torch.where(mask, (log_probs - old).detach(), 0.0)
    teacher_log_ratio = torch.where(mask, teacher_log_probs - log_probs, 0.0)
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp() * kl_estimate(teacher_log_ratio, log_ratio, "k3+")


class Correction(NamedTuple):
    """What :func:`correction_weights` returns, each ``[B, T]``."""

    weights: Tensor
    """For the surrogate; detached, 1 outside the mask."""
    cut: Tensor
    """bool: the ratio was above the bound, and the weight is the bound."""
    masked: Tensor
    """bool: the ratio was out of bounds, and the weight is 0."""


def correction_weights(
    learner_log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, options: CorrectionOptions
) -> Correction:
    """Weights for samples of a sampler that is not quite the learner, from ``r_it = pi_learner / pi_sampler``.

    Both log-probabilities ``[B, T]`` are those under the weights that sampled; with level ``sequence``, r is the product over the
    sequence's tokens, and a row must hold the whole sequence.

    - ``tis``: ``min(r, high)``, truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
      off-policy RL training").
    - ``icepop``: r where ``low <= r <= high``, else 0 (Ling Team, "Every step evolves", arXiv 2510.18855).
    - ``sequence_mask``: the same of the sequence's product; TRL's mode of that name.
    - ``geometric_mask``: 1 where the geometric mean of the sequence's token ratios is within the bounds, else 0 (Liu et al. 2025, "When
      speed kills stability"): unlike the product it does not grow with the length.

    A token whose weight is 0 has no policy gradient and stays in the loss's denominator. A log-probability that is not finite
    makes its weight NaN rather than be masked. Ratios are cut off at exp(20).
    """
    log_ratio = torch.where(mask, (learner_log_probs - sampler_log_probs).detach(), 0.0)
    if options.level == "sequence" or options.kind in ("sequence_mask", "geometric_mask"):
        log_ratio = log_ratio.sum(1, keepdim=True)
    if options.kind == "geometric_mask":
        log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp().expand(mask.shape)
    high, low = options.high or torch.inf, options.low or 0.0
    above = (ratio > high) & mask
    if options.kind == "tis":
        weights, masked = ratio.clamp(max=high), torch.zeros_like(mask)
    else:
        masked = ((ratio < low) & mask) | above
        kept = ratio if options.kind != "geometric_mask" else 1 + 0 * ratio  # which is NaN where the ratio is
        weights = torch.where(masked, 0.0, kept)
    return Correction(torch.where(mask, weights, 1.0), above & ~masked, masked)


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
