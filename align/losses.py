"""The mathematics of SFT, GRPO and reward models as pure functions on tensors: no I/O, no distributed code, no state.

A loss here is never a mean. It is a value for every token, and the scalar is the sum of value times weight::

    loss = sum_it  weight_i * terms.loss[i, t]

The weights come from :func:`completion_weights`, computed once over the whole global batch, and already hold
its denominator. However the batch is then split over ranks, micro-batches and accumulation steps, the parts
add up to the same loss and the same gradient. (Where an engine averages gradients over ranks or accumulation
steps, its caller multiplies by their number.) For SFT the value is ``-log_probs``, the weight ``token_mean``. A reward
model has a value for every pair of completions, and the weight is one over their number.

Sources: DeepSeek-V2 report (arXiv 2405.04434), DeepSeekMath (arXiv 2402.03300), DAPO (arXiv 2503.14476),
Dr. GRPO (arXiv 2503.20783), GSPO (arXiv 2507.18071), CISPO (MiniMax-M1, arXiv 2506.13585), RLOO (arXiv 2402.14740),
REINFORCE++ (arXiv 2501.03262), DeepSeek-V3.2 (arXiv 2512.02556). In shapes, N is the completions of a global
batch, B the rows of a micro-batch, T their padded length; ``mask [B, T]`` is True on the tokens that are trained
on. Where it is False the other arguments may hold anything, NaN and infinities included: that reaches neither
values nor gradients.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.options import Options, refuse_without_effect

Aggregation = Literal["sample_mean", "token_mean", "sequence_sum", "constant_length"]
Level = Literal["token", "sequence", "geometric"]
KlEstimator = Literal["k2", "k3", "k3+", "unbiased"]
Baseline = Literal["group", "leave_one_out", "batch"]
AdvantageScale = Literal["std", "batch", "none"]

STD_EPSILON = 1e-4  # added to the group's standard deviation; TRL's value
ZERO_STD = 1e-6  # at or below this, a group's rewards count as all equal
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far outside any trust region, far inside float32

CORRECTIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "tis": {"level": "token", "high": 2.0},
    "icepop": {"level": "token", "low": 0.5, "high": 5.0},
    "sequence_mask": {"high": 3.0},
    "geometric_mask": {"low": 0.99, "high": 1.01},
}
"""The level and the bounds of each kind of correction that are not given."""


class CorrectionOptions(Options):
    """How the surrogate is corrected for what parts sampler and learner, by r = pi_learner / pi_sampler before a step's first update."""

    kind: Literal["none", "tis", "icepop", "sequence_mask", "geometric_mask"] = Field(
        "none",
        description="weights: tis, r cut at high; icepop, r, and 0 outside low and high; sequence_mask, the same for whole completions; "
        "geometric_mask, 1, and 0 where the geometric mean of a completion's r is outside",
    )
    level: Literal["token", "sequence"] | None = Field(
        None, description="tis, icepop: r of a token or of a whole completion; token when not given"
    )
    low: float | None = Field(
        None, gt=0, description="lowest r that is kept; when not given icepop 0.5, geometric_mask 0.99"
    )
    high: float | None = Field(
        None, description="highest r; when not given tis 2, icepop 5, sequence_mask 3, geometric_mask 1.01"
    )

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        usual = CORRECTIONS.get(str(data.get("kind")), {})
        return {**usual, **{key: value for key, value in data.items() if value is not None or key not in usual}}

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.kind == "none":
            why = dict.fromkeys(("level", "low", "high"), "kind: none corrects nothing")
        elif self.kind == "tis":
            why = {"low": "tis cuts ratios from above alone"}
        elif self.kind == "icepop":
            why = {}
        else:
            why = {"level": f"{self.kind} has one ratio for a whole completion"}
        for key, reason in why.items():
            refuse_without_effect(self, key, reason, at="grpo.correction.")
        if self.high is not None and not (self.low or 0) < 1 <= self.high:
            raise ValueError(
                f"low ({self.low}) must be below 1 and high ({self.high}) no lower: 1 is the ratio where sampler and learner agree"
            )
        return self


class LossOptions(Options):
    """What of a recipe's `grpo` decides about the loss."""

    clip_low: float = Field(0.2, ge=0, lt=1, description="importance ratios are clipped below 1 - clip_low")
    clip_high: float = Field(0.2, ge=0, description="importance ratios are clipped above 1 + clip_high")
    cispo_max: float | None = Field(
        None,
        ge=1,
        description="CISPO: log-probabilities weighted by importance ratios of at most this, in place of the clipped surrogate",
    )
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the KL to the reference in the loss (beta)")
    kl: KlEstimator = Field(
        "k3",
        description="how that KL is estimated; k3+: k3 with the gradient of k2; unbiased: k3 times the importance ratio (DeepSeek-V3.2)",
    )
    level: Level = Field(
        "token",
        description="importance ratio of a token (DeepSeekMath eq. 3), of a completion (report eq. 32), or the geometric mean of a "
        "completion's tokens (GSPO)",
    )
    aggregation: Aggregation = Field(
        "sample_mean",
        description="how token losses become one loss; constant_length divides all completions by sampling.max_new_tokens (Dr. GRPO); "
        "see completion_weights. level: sequence needs sequence_sum",
    )
    baseline: Baseline = Field(
        "group",
        description="what is subtracted from a reward: the mean of its group, of the others in its group (RLOO), or of the step",
    )
    advantage_scale: AdvantageScale = Field(
        "std",
        description="divide by the group's standard deviation, by that of all advantages of the step, or only centre",
    )
    correction: CorrectionOptions = CorrectionOptions()

    @model_validator(mode="after")
    def _one_mean_over_a_completion(self) -> Self:
        if self.level == "sequence" and self.aggregation != "sequence_sum":
            raise ValueError(
                f"level: sequence is one loss for each completion, of which aggregation: {self.aggregation} would divide by the length "
                "a second time: set aggregation: sequence_sum, which is their mean (report eq. 32), or level: token"
            )
        return self

    @model_validator(mode="after")
    def _leave_out_what_has_no_effect(self) -> Self:
        if not self.kl_coefficient:
            refuse_without_effect(self, "kl", "kl_coefficient is 0", at="grpo.")
        if self.cispo_max is not None:
            for key in ("clip_low", "clip_high"):
                refuse_without_effect(self, key, "cispo_max bounds the weights and clips no surrogate", at="grpo.")
            if self.level != "token":
                raise ValueError(f"cispo_max bounds weights of tokens: leave out level: {self.level}, or cispo_max")
        return self

    @model_validator(mode="after")
    def _the_scale_is_of_what_was_centred(self) -> Self:
        if self.baseline == "batch" and self.advantage_scale == "std":
            raise ValueError(
                "baseline: batch is not the group's mean, around which advantage_scale: std is measured: set advantage_scale: batch, or none"
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


class Routing(NamedTuple):
    """Where the tokens of B sequences, or of parts of them, went in one MoE layer. The sums of a sequence's parts add up to its own."""

    tokens: Tensor
    """[B], how many there are."""
    affinities: Tensor
    """[B, E], the sum of their affinities to each expert. The only one with a gradient."""
    chosen: Tensor
    """[B, E], how many chose each expert."""
    sent: Tensor
    """[B, D], how many went to each device: once, however many of its experts they chose."""


def routing_sums(logits: Tensor, expert_ids: Tensor, mask: Tensor, devices: int = 1) -> Routing:
    """The sums over the tokens of each sequence under `mask` [B, T] bool, in float32 or the wider dtype of the logits.

    ``logits [B, T, E]`` are the router's, whose affinities are the *full* softmax, before the top-k or the limit of devices sets
    any to 0. ``expert_ids [B, T, K]`` int64 are the experts that the tokens went through. Device i of D holds the i-th E / D experts.
    """
    experts = logits.shape[-1]
    probs = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    ids = torch.where(mask[..., None], expert_ids, 0)
    real = mask[..., None].to(probs.dtype)
    chosen = probs.new_zeros(len(mask), experts).scatter_add_(1, ids.flatten(1), real.expand_as(ids).flatten(1))
    on_device = probs.new_zeros(*mask.shape, devices).scatter_(2, ids // (experts // devices), 1.0)
    affinities = torch.where(mask[..., None], probs, 0.0).sum(1)
    return Routing(real.sum((1, 2)), affinities, chosen, (on_device * real).sum(1))


def balance_losses(routing: Routing, top_k: int, devices_a_token: int = 1) -> Tensor:
    """The expert-, device- and communication-level balance losses of one MoE layer, ``[B, 3]``, before their factors.

    DeepSeek-V2 report (arXiv:2405.04434) eq. 23-31, for each sequence of T tokens apart, as in the released model (``seq_aux``)::

        expert         sum_j f_j P_j       f_j   = E / (K T) * tokens that chose expert j,   P_j = 1/T sum_t s_jt
        device         sum_i f'_i P'_i     f'_i  = mean of f_j over the experts of device i,  P'_i = sum of their P_j
        communication  sum_i f"_i P'_i     f"_i  = D / (M T) * tokens sent to device i

    with K = `top_k` and M = `devices_a_token`, the most devices that a token may be sent to. Even routing gives 1, a sequence
    without tokens 0. The gradient flows through P alone. The caller multiplies by the factors (alpha_1 to alpha_3) over the number of
    sequences in the global batch.
    """
    tokens, devices = routing.tokens.clamp(min=1)[:, None], routing.sent.shape[1]
    fractions = routing.chosen * routing.chosen.shape[1] / (top_k * tokens)
    affinities = routing.affinities / tokens
    of_devices = affinities.unflatten(1, (devices, -1)).sum(2)
    sent = routing.sent * devices / (devices_a_token * tokens)
    expert = (fractions * affinities).sum(1)
    device = (fractions.unflatten(1, (devices, -1)).mean(2) * of_devices).sum(1)
    return torch.stack([expert, device, (sent * of_devices).sum(1)], dim=1)


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
