"""The recipe of each stage: which options it has, which of them go together, and which processes it needs. `base` has what they share."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from align.options import is_kept, refuse_without_effect
from align.recipe.base import STAGE, Recipe, SamplingRecipe, TrainingRecipe
from align.recipe.learner import BalanceOptions
from align.recipe.options import (
    AgreementOptions,
    AlarmOptions,
    DpoOptions,
    EvaluationOptions,
    GrpoOptions,
    GuardOptions,
    PreferencesOptions,
    RewardModelOptions,
    SftOptions,
)
from align.recipe.roles import Roles
from align.shipped import found
from reward import RewardTerm
from rollout import WeightOptions
from rollout.types import SamplingOptions

INIT_FROM = "SFT recipe that trains the policy to start from, run first and with what this recipe shares with it"
ALL_ANSWERED = "every prompt of every split is answered once"
GREEDY = "sampling.temperature is 0: greedy answers to a prompt are all alike; use 1.0"
COLOCATED: Mapping[str, Mapping[str, Any]] = {"learner": {"gpus": 0.6}, "rollout": {"gpus": 0.4, "sleeps": True}}
"""What goes without saying where a learner rank and a rollout worker share a GPU: their shares of it, by Ray's count."""


class PolicyRecipe(SamplingRecipe, TrainingRecipe):
    """A stage that trains the policy."""

    evaluation: EvaluationOptions = EvaluationOptions()
    agreement: AgreementOptions = AgreementOptions()
    weights: WeightOptions = WeightOptions()
    alarms: AlarmOptions = AlarmOptions()
    colocate: bool = Field(
        False,
        description="a learner rank and a rollout worker share a GPU, and use it in turn: while one works, what the other holds is in the "
        "CPU's memory",
    )

    def roles(self) -> Roles:
        return replace(
            super().roles(),
            learner=self.learner,
            trained="policy",
            longest=self.rollout.max_length,
            evaluation=self.evaluation,
            weights=self.weights,
            colocated=self.colocate,
        )

    @property
    def evaluation_cards(self) -> list[str]:
        """The data whose held-out problems the policy answers, each once: names of cards, paths where there is none."""
        options, cards = self.evaluation, [data.card for data in self.data if data.card]
        if options.path is not None and not options.cards and not cards:
            return [str(options.path)]
        return list(dict.fromkeys(options.cards or [data.card or str(data.path) for data in self.data]))

    @model_validator(mode="after")
    def _one_card_for_a_path(self) -> Self:
        for key in ("path", "levels"):
            if getattr(self.evaluation, key) is not None and len(self.evaluation_cards) > 1:
                raise ValueError(f"evaluation.{key} is for a single data card; name it in evaluation.cards")
        return self

    @model_validator(mode="after")
    def _nothing_is_scored_without_rewards(self) -> Self:
        if not self.rewards:
            for key in ("scoring", "evaluation.samples", "evaluation.against", "evaluation.every"):
                refuse_without_effect(self, key, "there are no rewards to score answers by")
        return self

    @model_validator(mode="after")
    def _an_adapter_to_send(self) -> Self:
        if self.weights.transport == "adapter":
            if self.learner.lora is None:
                raise ValueError(
                    "weights.transport: adapter sends the adapter alone, and there is none: set learner.lora"
                )
            refuse_without_effect(self, "weights.bucket_mb", "an adapter is sent as a whole")
        elif self.rollout.cuda_graphs and self.learner.lora is not None:
            raise ValueError(
                "rollout.cuda_graphs: a graph computes without the adapters that learner.lora sends beside the weights; leave it out, or "
                "set weights.transport: adapter"
            )
        return self

    @model_validator(mode="after")
    def _routes_to_compare(self) -> Self:
        if not (self.rollout.record_experts or self.roles().routes):
            refuse_without_effect(
                self,
                "agreement.stop_routing",
                "no experts are recorded to compare; rollout.record_experts records them",
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _share_a_gpu(cls, data: Any) -> Any:
        if not (isinstance(data, Mapping) and data.get("colocate")):
            return data
        given = {key: data.get(key) or {} for key in COLOCATED}
        return {**data, **{key: {**COLOCATED[key], **own} for key, own in given.items() if isinstance(own, Mapping)}}

    @model_validator(mode="after")
    def _can_be_colocated(self) -> Self:
        learner, rollout = self.learner, self.rollout
        if not self.colocate:
            return self
        if learner.gpus + rollout.gpus > 1:
            raise ValueError("colocate: learner.gpus and rollout.gpus are more than one GPU together; leave them out")
        if learner.resources or rollout.resources:
            raise ValueError(
                "colocate: a rank and a worker are in one place; leave out learner.resources and rollout.resources"
            )
        refuse_without_effect(
            self, "rollout.gpu_memory_share", "rollout.kv_cache_gb is what a worker has beside its weights"
        )
        if self.weights.transport == "broadcast":
            raise ValueError(
                "colocate: weights.transport: broadcast wants a GPU for each process; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _a_device_for_each_process(self) -> Self:
        if self.weights.transport == "broadcast" and min(self.learner.gpus, self.rollout.gpus) < 1:
            raise ValueError(
                "weights.transport: broadcast wants a GPU of its own for each process: leave it out, or learner.gpus and rollout.gpus"
            )
        return self


SAMPLED_ALARMS = ("entropy", "variance", "reward", "refill", "idle")
"""Alarms on what GRPO samples and scores in its steps."""


NOTHING_SAMPLED: dict[str, str] = dict.fromkeys(
    ("weights.precision", "alarms.entropy_share", "alarms.zero_variance_groups", "alarms.reward_jump"),
    "nothing is sampled to be trained on",
)


class SupervisedRecipe(PolicyRecipe):
    """A policy that learns from answers that are given. It answers held-out prompts before and after."""

    rewards: list[RewardTerm] = Field(
        [],
        description="what scores the answers to held-out prompts, of which the first for a domain says what is right; without any there are a validation loss and answers to read",
    )

    @model_validator(mode="after")
    def _alarms_that_may_come(self) -> Self:
        if (never := [name for name in self.alarms.stop if name in SAMPLED_ALARMS]) and not is_kept():
            raise ValueError(
                f"alarms.stop: {', '.join(never)} cannot come here (nothing is sampled to be trained on): leave it out"
            )
        return self


class SftRecipe(SupervisedRecipe):
    """Supervised fine-tuning."""

    no_effect: ClassVar = {
        "evaluation.every": "SFT looks at the validation loss, every sft.validate_every steps",
        "data.split": "the validation split gives the validation loss",
        "learner.share_prompts": "no two conversations of SFT have their prompt in common",
        **NOTHING_SAMPLED,
    }
    data_stage: ClassVar = "sft"

    stage: Literal["sft"] = Field(description=STAGE)
    sft: SftOptions

    def roles(self) -> Roles:
        return replace(super().roles(), trained_sequences=self.sft.sequences_per_step)


class DpoRecipe(SupervisedRecipe):
    """Direct preference optimisation of a policy on pairs of completions."""

    no_effect: ClassVar = {
        "evaluation.every": "DPO looks at the validation pairs, every dpo.validate_every steps",
        "data.levels": "preferences have no levels",
        "data.split": "the validation split gives the validation pairs",
        **NOTHING_SAMPLED,
    }
    data_stage: ClassVar = "reward_model"

    stage: Literal["dpo"] = Field(description=STAGE)
    init_from: Annotated[Path, AfterValidator(found)] | None = Field(None, description=INIT_FROM)
    dpo: DpoOptions

    def roles(self) -> Roles:
        return replace(super().roles(), trained_sequences=2 * self.dpo.pairs_per_step, reference=True, margins=True)

    @model_validator(mode="after")
    def _problems_to_answer(self) -> Self:
        if not self.evaluation.cards and any(data.card for data in self.data):
            raise ValueError(
                "evaluation: a card of pairs has no problems for the policy to answer: name cards that have, with evaluation.cards (evaluation.path is for pairs in a file)"
            )
        return self

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        if self.learner.lora is not None and self.learner.lora.dropout:
            raise ValueError("learner.lora.dropout must be 0: margins are measured without it")
        return self


class RewardModelRecipe(TrainingRecipe):
    """A reward model from preferences. Nothing is sampled for it."""

    no_effect: ClassVar = {
        "learner.share_prompts": "a reward model reads whole conversations",
        "data.levels": "preferences have no levels",
        "data.split": "validation and test pairs judge the reward model",
    }
    data_stage: ClassVar = "reward_model"

    stage: Literal["reward_model"] = Field(description=STAGE)
    init_from: Annotated[Path, AfterValidator(found)] | None = Field(None, description=INIT_FROM)
    reward_model: RewardModelOptions

    def roles(self) -> Roles:
        options = self.reward_model
        return Roles(
            learner=self.learner,
            trained="reward_model",
            trained_sequences=2 * options.pairs_per_step,
            longest=options.max_length,
        )

    @model_validator(mode="after")
    def _a_margin_to_scale(self) -> Self:
        if self.reward_model.loss == "pointwise" and self.reward_model.margin_scale:
            raise ValueError("reward_model.margin_scale has no effect on the pointwise loss: leave it out")
        return self


class GrpoRecipe(PolicyRecipe):
    """Reinforcement learning with GRPO."""

    data_stage: ClassVar = "grpo"

    stage: Literal["grpo"] = Field(description=STAGE)
    init_from: Annotated[Path, AfterValidator(found)] | None = Field(None, description=INIT_FROM)
    reference: Path | None = Field(
        None, description="checkpoint of the KL's reference; the policy at the start of the stage when not given"
    )
    rewards: list[RewardTerm] = Field(
        [],
        description="what an answer is worth: a list, whose weighted sum counts, and of which the first for a domain says what is right; "
        "beside grpo.distill there may be none, or all of weight 0, which are measured and not trained on",
    )
    sampling: SamplingOptions = SamplingOptions()
    grpo: GrpoOptions
    guard: GuardOptions | None = None

    @property
    def is_rewarded(self) -> bool:
        """Whether rewards are trained on: otherwise a teacher alone is."""
        return any(term.weight for term in self.rewards)

    def roles(self) -> Roles:
        sequences = self.grpo.prompts_per_step * self.grpo.group_size
        recorded = self.rollout.record_experts or self.grpo.routing_replay == "sampler"
        return replace(
            super().roles(),
            rollout=self.rollout.model_copy(update={"record_experts": recorded}),
            trained_sequences=sequences,
            reference=self.grpo.kl_coefficient > 0,
            teacher=self.grpo.distill.teacher if self.grpo.distill else None,
            sampling=self.sampling,
            sampled_sequences=sequences,
            sampling_rounds=1 + self.grpo.refill_rounds,
            routes=self.rollout.record_experts or self.grpo.routing_replay != "off",
        )

    @model_validator(mode="after")
    def _something_teaches(self) -> Self:
        if self.is_rewarded:
            if self.grpo.group_size == 1 and self.grpo.baseline != "batch":
                raise ValueError(
                    "grpo.group_size: 1 leaves a completion nothing that its reward is compared with: take 2 or more, or learn from "
                    "grpo.distill alone, with rewards of weight 0 or none"
                )
            return self
        if self.grpo.distill is None:
            raise ValueError(
                "rewards: none has a weight, so there is nothing to learn from: say what an answer is worth, or name a teacher (grpo.distill)"
            )
        surrogate = (
            "preset",
            "clip_low",
            "clip_high",
            "cispo_max",
            "baseline",
            "advantage_scale",
            "drop_zero_variance_groups",
            "refill_rounds",
        )
        level = () if self.grpo.kl_coefficient else ("level",)
        of_rewards = ("guard", "alarms.zero_variance_groups", "alarms.reward_jump")
        for key in (*(f"grpo.{name}" for name in (*surrogate, *level)), *of_rewards):
            refuse_without_effect(
                self, key, "the teacher of grpo.distill is learned from alone, as no reward has a weight"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sampling.temperature == 0:
            raise ValueError(GREEDY)
        if "validation" in {data.split for data in self.data} and (
            self.evaluation.every or self.evaluation.split == "validation"
        ):
            raise ValueError(
                "data.split: validation is what evaluation.every and evaluation.split: validation measure on: train on train, or "
                "leave those out"
            )
        if self.reference is not None and not self.grpo.kl_coefficient:
            raise ValueError("reference has no effect while grpo.kl_coefficient is 0: set that, or leave it out")
        if self.learner.lora is not None and self.learner.lora.dropout:
            raise ValueError(
                "learner.lora.dropout must be 0: with it the learner would judge another policy than the one that sampled"
            )
        precision = self.weights.precision
        if precision != "model" and self.learner.lora is not None:
            raise ValueError(
                f"weights.precision: {precision} rounds what is sent, and beside learner.lora the weights without an adapter are never sent: leave one "
                "of them out"
            )
        if precision == self.model.dtype:
            raise ValueError(f"weights.precision: {precision} has no effect on a model of that dtype: leave it out")
        if self.sampling.max_new_tokens >= self.rollout.max_length:
            raise ValueError(
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens}) leaves no room for a prompt in "
                f"rollout.max_length ({self.rollout.max_length})"
            )
        if self.grpo.routing_replay == "learner" and self.grpo.updates_per_step == 1:
            raise ValueError(
                "grpo.routing_replay: learner has no effect with a single update a step, before which the learner's experts are its own: "
                "take sampler, or several grpo.updates_per_step"
            )
        if self.grpo.skip_zero_gradient and self.learner.balance != BalanceOptions():
            raise ValueError(
                "grpo.skip_zero_gradient has no effect beside learner.balance, whose gradient every sample has: leave one of them out"
            )
        if self.grpo.prompts_per_step % self.grpo.updates_per_step:
            raise ValueError(
                f"grpo.prompts_per_step ({self.grpo.prompts_per_step}) cannot be split into "
                f"grpo.updates_per_step ({self.grpo.updates_per_step}) equal parts"
            )
        return self


class PreferencesRecipe(SamplingRecipe):
    """Preference data from the policy's own answers."""

    no_effect: ClassVar = {
        "run.allow_changes": "this stage begins anew when it was interrupted",
        "data.split": ALL_ANSWERED,
        "data.share": ALL_ANSWERED,
        "rollout.record_experts": "no samples are written",
    }
    data_stage: ClassVar = "grpo"

    stage: Literal["preferences"] = Field(description=STAGE)
    sampling: SamplingOptions = SamplingOptions()
    preferences: PreferencesOptions = PreferencesOptions()

    @model_validator(mode="after")
    def _have_answers_to_compare(self) -> Self:
        if self.sampling.temperature == 0:
            raise ValueError(GREEDY)
        return self

    def roles(self) -> Roles:
        sequences = self.preferences.prompts * self.preferences.samples
        return replace(super().roles(), sampling=self.sampling, sampled_sequences=sequences)


STAGES: dict[str, type[Recipe]] = {
    "sft": SftRecipe,
    "reward_model": RewardModelRecipe,
    "dpo": DpoRecipe,
    "grpo": GrpoRecipe,
    "preferences": PreferencesRecipe,
}
