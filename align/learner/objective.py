"""What a learner computes on a micro-batch (log-probabilities, the loss, the sums that become metrics), and its learning rate."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from align.learner.batch import Batch, sampled_values
from align.learner.head import head_is_last, head_log_probs, head_replaced, of_logits
from align.learner.routing import Changes
from align.losses import (
    DpoLossOptions,
    LossOptions,
    agreement,
    correction_weights,
    distillation_loss,
    dpo_loss,
    grpo_token_loss,
)
from align.recipe import OptimizerOptions


class LogProbs(torch.nn.Module):
    """The policy as a function from token ids to the log-probabilities of the last K of them.

    DeepSpeed wraps this module, so that the whole computation from ids to log-probabilities is its forward pass. The
    auxiliary balance loss that some checkpoints ask for (`output_router_logits`) is not computed: no objective has it.
    Logits are computed in tiles, as `in_tiles` says, unless the model changes them after its head.
    """

    def __init__(self, policy: Any):
        super().__init__()
        self.policy = policy
        self._always: dict[str, Any] = (
            {"output_router_logits": False} if hasattr(policy.config, "output_router_logits") else {}
        )
        self.in_tiles = head_is_last(policy, use_cache=False, **self._always)

    def forward(
        self,
        token_ids: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        prefixes: torch.Tensor | None = None,
        prefix_mask: torch.Tensor | None = None,
        prefix_of: torch.Tensor | None = None,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`token_ids` [B, T], `targets` [B, K] (their last K columns) -> log-probabilities [B, K] float32, and entropies where these are asked for.

        With `prefixes` [G, P], row b comes after the tokens of prefix `prefix_of[b]` where `prefix_mask` [G, P] is true;
        these are computed once for all rows.
        """
        kept = targets.shape[1]
        before: dict[str, Any] = {"use_cache": False}
        if prefixes is not None and prefix_mask is not None and prefix_of is not None:
            before = self._after(prefixes, prefix_mask, prefix_of, token_ids)
        inputs = {"input_ids": token_ids, "logits_to_keep": kept + 1, **before, **self._always}
        # The last position predicts what nobody asks for; models that know no `logits_to_keep` return those before, too.
        targets = pad(targets, (0, 1))
        if not self.in_tiles:
            logits = self.policy(**inputs).logits[:, -kept - 1 :]
            found = of_logits(logits, targets, temperature, with_entropy)
        else:
            head = self.policy.get_output_embeddings()
            of_states = partial(head_log_probs, head, head.forward, targets=targets, temperature=temperature)
            with head_replaced(head, lambda states: of_states(states[:, -kept - 1 :], with_entropy=with_entropy)):
                found = self.policy(**inputs).logits
        return found[0, :, :-1], found[1, :, :-1].detach() if with_entropy else None

    def _after(
        self, prefixes: torch.Tensor, mask: torch.Tensor, prefix_of: torch.Tensor, token_ids: torch.Tensor
    ) -> dict[str, Any]:
        """What lets rows of tokens go on from prefixes, to whose keys and values the gradient flows back."""
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = self.policy(
            input_ids=prefixes,
            attention_mask=mask,
            position_ids=places,
            use_cache=True,
            logits_to_keep=1,
            **self._always,
        ).past_key_values
        cache.reorder_cache(prefix_of)
        lengths = mask.sum(dim=1)[prefix_of]
        return {
            "past_key_values": cache,
            "attention_mask": torch.cat([mask[prefix_of], torch.ones_like(token_ids, dtype=torch.bool)], dim=1),
            "position_ids": lengths[:, None] + torch.arange(token_ids.shape[1], device=lengths.device),
            "use_cache": True,
        }


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss to minimise: supervised when `grpo` and `dpo` are None. `temperature` is the sampler's.

    With `dpo` the sequences are the completions of pairs, in turn: the chosen one, then the rejected one.
    """

    grpo: LossOptions | None = None
    temperature: float = 1.0
    dpo: DpoLossOptions | None = None

    @property
    def is_supervised(self) -> bool:
        """Whether the loss is of tokens that were given: no policy drew them, and dropout is for these alone."""
        return self.grpo is None and self.dpo is None

    @property
    def has_reference(self) -> bool:
        """Whether the log-probabilities of the frozen reference are part of the loss."""
        return self.dpo is not None or (self.grpo is not None and self.grpo.kl_coefficient > 0)

    @property
    def together(self) -> int:
        """How many sequences that follow each other are in the loss together, and so in one micro-batch."""
        return 1 if self.dpo is None else 2


@dataclass(slots=True)
class Sums:
    """Sums over the completion tokens of a batch; add those of all micro-batches and ranks, then divide.

    `loss` is already divided by the batch's denominator (see `TrainingSequence.weight`). `log_probs` [batch][sequence] [S] are those of
    the sampled tokens, of GRPO under the learner's policy before the step's first update, of DPO before its only one, with `reference_log_probs`
    under the frozen reference. Of GRPO's correction
    there are the tokens whose weight was cut, those whose weight is 0, and the sums of the weights and of their squares. `teacher_kl` is the
    estimated KL to the teacher of a distillation. `routes` has what each
    rank counted of routes that were given, `prompt_routes` the (token, layer) of shared prompts that were given more than once, and
    `prompt_routes_changed` how many of these a later completion had with other experts than the first.
    """

    loss: float = 0.0
    kl: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0
    entropy: float = 0.0
    clipped: int = 0
    correction_cut: int = 0
    correction_masked: int = 0
    correction_weights: float = 0.0
    correction_squares: float = 0.0
    teacher_kl: float = 0.0
    compared: int = 0
    difference: float = 0.0
    sampler_kl: float = 0.0
    max_difference: float = 0.0
    equal: int = 0
    routes: list[Changes] = field(default_factory=list)
    prompt_routes: int = 0
    prompt_routes_changed: int = 0
    log_probs: list[list[npt.NDArray[np.float32]]] = field(default_factory=list)
    reference_log_probs: list[list[npt.NDArray[np.float32]]] = field(default_factory=list)

    def add(self, other: "Sums") -> None:
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            # NumPy's maximum with NaN is NaN.
            setattr(self, name, float(np.maximum(mine, theirs)) if name == "max_difference" else mine + theirs)


def loss_and_sums(
    log_probs: torch.Tensor,
    entropy: torch.Tensor | None,
    reference_log_probs: torch.Tensor | None,
    batch: Batch,
    objective: Objective,
    teacher_log_probs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Sums]:
    """The micro-batch's part of the loss, a scalar with gradient, and its sums. All log-probabilities and `entropy` are [B, K].

    Raises ValueError where a log-probability is missing that the objective is made of.
    """
    counted = batch.mask & (batch.weights > 0)
    sums = Sums(tokens=int(counted.sum()), padded_tokens=batch.padded_tokens)
    if entropy is not None:
        sums.entropy = float(entropy[counted].sum())
    if objective.grpo is not None:
        loss = grpo_loss(log_probs, reference_log_probs, teacher_log_probs, batch, objective.grpo, sums)
    elif objective.dpo is not None:
        if reference_log_probs is None:
            raise ValueError("DPO needs the reference's log-probabilities")
        loss = pair_loss(log_probs, reference_log_probs, batch, objective.dpo)
        sums.log_probs = [sampled_values(log_probs.detach(), batch)]
        sums.reference_log_probs = [sampled_values(reference_log_probs, batch)]
    else:
        loss = -(torch.where(counted, log_probs, 0.0) * batch.weights).sum()
    sums.loss = float(loss.detach())
    return loss, sums


def grpo_loss(
    log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor | None,
    teacher_log_probs: torch.Tensor | None,
    batch: Batch,
    options: LossOptions,
    sums: Sums,
) -> torch.Tensor:
    """The weighted loss of the batch's tokens, a scalar with gradient; what is counted of them goes into `sums`. All log-probabilities are [B, K]."""
    counted = batch.mask & (batch.weights > 0)
    at_sampling = (log_probs if batch.old_log_probs is None else batch.old_log_probs).detach()
    importance = None
    if options.correction.kind != "none":
        if batch.sampler_log_probs is None:
            raise ValueError("grpo.correction needs the log-probabilities that tokens were drawn with")
        importance, cut, masked = correction_weights(
            at_sampling, batch.sampler_log_probs, batch.mask, options.correction
        )
        weights = importance[counted].double()
        sums.correction_cut, sums.correction_masked = int(cut[counted].sum()), int(masked[counted].sum())
        sums.correction_weights, sums.correction_squares = float(weights.sum()), float(weights.square().sum())
    terms = grpo_token_loss(
        log_probs,
        batch.old_log_probs,
        reference_log_probs,
        batch.advantages,
        batch.mask,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        kl_coefficient=options.kl_coefficient,
        level=options.level,
        kl=options.kl,
        cispo_max=options.cispo_max,
        importance=importance,
    )
    loss = (terms.loss * batch.weights).sum()
    if options.distill is not None:
        if teacher_log_probs is None:
            raise ValueError("grpo.distill needs the teacher's log-probabilities")
        teacher_kl = distillation_loss(log_probs, batch.old_log_probs, teacher_log_probs, batch.mask)
        weights = batch.weights if importance is None else batch.weights * importance
        loss = loss + options.distill.weight * (teacher_kl * weights).sum()
        sums.teacher_kl = float(teacher_kl.detach()[counted].sum())
    sums.kl = float(terms.kl.detach()[counted].sum())
    sums.clipped = int((terms.clipped & counted).sum())
    sums.log_probs = [sampled_values(at_sampling, batch)]
    if batch.sampler_log_probs is not None and sums.tokens:
        compared = agreement(at_sampling, batch.sampler_log_probs, counted)
        sums.compared = compared.tokens
        sums.difference = compared.mean_abs * compared.tokens
        sums.sampler_kl = compared.k3 * compared.tokens
        sums.max_difference = compared.max_abs
        sums.equal = compared.equal
    return loss


def pair_loss(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, batch: Batch, options: DpoLossOptions
) -> torch.Tensor:
    """The weighted loss of the pairs of which the batch has the completions in turn, a scalar with gradient; both log-probabilities are [B, K]."""
    raised = torch.where(batch.mask, log_probs - reference_log_probs, 0.0).sum(dim=1)
    losses = dpo_loss(raised[::2], raised[1::2], options.beta)
    if options.sft_weight:
        of_tokens = torch.where(batch.mask, log_probs, 0.0).sum(dim=1) / batch.mask.sum(dim=1)
        losses = losses - options.sft_weight * of_tokens[::2]
    return (losses * batch.weights.amax(dim=1)[::2]).sum()


def learning_rate(step: int, total_steps: int, options: OptimizerOptions) -> float:
    """The learning rate of step `step` in 0..total_steps-1 of a stage, and of all updates in it: linear warm-up, then cosine or constant.

    The cosine falls from `learning_rate` at the end of the warm-up to `final_ratio` of it at the last step.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.learning_rate
    span = max(total_steps - options.warmup_steps - 1, 1)
    progress = min((step - options.warmup_steps) / span, 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return options.learning_rate * (options.final_ratio + (1 - options.final_ratio) * cosine)
