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
REINFORCE++ (arXiv 2501.03262), DeepSeek-V3.2 (arXiv 2512.02556), GKD (arXiv 2306.13649). In shapes, N is the completions of a global
batch, B the rows of a micro-batch, T their padded length; ``mask [B, T]`` is True on the tokens that are trained
on. Where it is False the other arguments may hold anything, NaN and infinities included: that reaches neither
values nor gradients.
"""

from align.losses.balance import Routing, balance_losses, routing_sums
from align.losses.grpo import (
    ZERO_STD,
    agreement,
    completion_weights,
    correction_weights,
    distillation_loss,
    group_advantages,
    grpo_token_loss,
    kl_estimate,
    token_entropies,
    token_log_probs,
)
from align.losses.options import (
    CORRECTIONS,
    AdvantageScale,
    Aggregation,
    CorrectionOptions,
    DistillOptions,
    DpoLossOptions,
    KlEstimator,
    Level,
    LossOptions,
)
from align.losses.preference import dpo_loss, pairwise_loss, pointwise_loss

__all__ = [
    "CORRECTIONS",
    "ZERO_STD",
    "AdvantageScale",
    "Aggregation",
    "CorrectionOptions",
    "DistillOptions",
    "DpoLossOptions",
    "KlEstimator",
    "Level",
    "LossOptions",
    "Routing",
    "agreement",
    "balance_losses",
    "completion_weights",
    "correction_weights",
    "distillation_loss",
    "dpo_loss",
    "group_advantages",
    "grpo_token_loss",
    "kl_estimate",
    "pairwise_loss",
    "pointwise_loss",
    "routing_sums",
    "token_entropies",
    "token_log_probs",
]
