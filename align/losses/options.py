"""What of a recipe decides about the loss: `grpo.correction`, and the keys of `grpo` that are the equations'."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from align.options import Options, refuse_without_effect

Aggregation = Literal["sample_mean", "token_mean", "sequence_sum", "constant_length"]
Level = Literal["token", "sequence", "geometric"]
KlEstimator = Literal["k2", "k3", "k3+", "unbiased"]
Baseline = Literal["group", "leave_one_out", "batch"]
AdvantageScale = Literal["std", "batch", "none"]

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
            low = "" if self.low is None else f"low ({self.low}) must be below 1 and "
            raise ValueError(
                f"{low}high ({self.high}) {'no' if low else 'must not be'} lower than 1, the ratio where sampler and learner agree"
            )
        return self


class DistillOptions(Options):
    """On-policy distillation: on what the policy samples, the gradient of KL(policy || teacher), token by token."""

    teacher: str = Field(
        min_length=1,
        description="Hugging Face directory or hub name of a policy with the same tokenizer; it stays as it is",
    )
    weight: float = Field(1.0, gt=0, description="weight of that KL in the loss, beside the rewards or alone")


class DpoLossOptions(Options):
    """What of a recipe's `dpo` decides about the loss."""

    beta: float = Field(
        0.1,
        gt=0,
        description="weight of the log-ratios to the policy of the start: the larger, the less the policy moves",
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the cross-entropy a token of the chosen completions, beside the loss of the pairs (RPO, arXiv 2404.19733)",
    )


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
    distill: DistillOptions | None = Field(
        None, description="learn from a teacher's probabilities of the tokens that the policy samples"
    )

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
