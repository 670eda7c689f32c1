"""The recipe: what a stage does, as typed values. Every key that a YAML file may have is explained here and in what this imports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.recipe.evaluation import EvaluationOptions
from align.recipe.learners import LearnerOptions
from align.recipe.section import Section, refuse_without_effect
from align.recipe.watches import AgreementOptions, AlarmOptions, GuardOptions
from reward import RewardTerm
from rollout import WeightOptions
from rollout.types import FleetOptions, SamplingOptions

DataStage = Literal["sft", "reward_model", "grpo"]


class RunOptions(Section):
    """Where a run's files go."""

    dir: Path | None = Field(None, description="run directory; runs/NAME when not given")
    overwrite: bool = Field(False, description="replace the run that the directory already holds")
    allow_changes: bool = Field(
        False, description="go on with an interrupted run although its recipe or data have changed"
    )
    grace_s: float = Field(
        8.0,
        ge=0,
        description="how long a step may take to end, and its checkpoint to be written, once the run is to stop",
    )


class ModelOptions(Section):
    """The policy to start from."""

    path: str = Field(description="Hugging Face directory or hub name")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="take the weights that are there, or draw new ones from the recipe's seed"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False


class DataOptions(Section):
    """Which examples of which data card. A recipe may list several; each step then takes from all of them."""

    card: str = Field(description="name of a card in data_cards/, or a path to one")
    split: Literal["train", "validation", "test"] = Field(
        "train", description="validation is for GRPO without evaluation.every alone; test is never trained on"
    )
    path: Path | None = Field(
        None, description="local file, or directory with a file for each split, to read in place of the card's source"
    )
    levels: list[int] | None = Field(None, description="difficulty levels to keep; all when not given")
    limit: int | None = Field(None, ge=1, description="first so many examples, after a seeded shuffle")
    params: dict[str, Any] = Field({}, description="parameters of a generated source")
    share: float = Field(1.0, gt=0, description="part of each step that comes from here, relative to the others")
    too_long: Literal["leave_out", "refuse"] = Field(
        "leave_out", description="what becomes of an example that has more tokens than there is room for"
    )

    @model_validator(mode="after")
    def _test_is_held_out(self) -> Self:
        if self.split == "test":
            raise ValueError("split: test is what a policy is evaluated on: train on another split")
        return self


class SftOptions(Section):
    """Supervised fine-tuning (DeepSeek-V2 report, section 4.1)."""

    steps: int = Field(ge=1, description="optimizer steps")
    sequences_per_step: int = Field(64, ge=1)
    validate_every: int = Field(100, ge=1, description="steps between two validation losses")
    validation_limit: int = Field(256, ge=1, description="examples of the validation loss")


class RewardModelOptions(Section):
    """A reward model, trained on preferences from the SFT policy (DeepSeek-V2 report, section 4.2)."""

    loss: Literal["pairwise", "pointwise"] = Field(
        "pairwise", description="both completions compared, or each judged alone; see align.losses"
    )
    steps: int = Field(ge=1, description="optimizer steps")
    pairs_per_step: int = Field(64, ge=1)
    margin_scale: float = Field(
        0.0, ge=0, description="a preference's own margin times this is subtracted from the difference of the rewards"
    )
    max_length: int = Field(512, ge=2, description="prompt and completion, in tokens; pairs with more are left out")
    validate_every: int = Field(50, ge=1, description="steps between two looks at the validation pairs")
    validation_limit: int = Field(256, ge=1, description="validation pairs of a data card")
    test_limit: int = Field(1024, ge=1, description="test pairs of a data card, for the evaluation at the end")


class GrpoOptions(Section):
    """Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, section 4.1; DeepSeek-V2 report, eq. 32-34)."""

    steps: int = Field(ge=1, description="exploration steps: sample, score, train, send weights")
    prompts_per_step: int = Field(ge=1)
    group_size: int = Field(ge=2, description="completions of a prompt (G)")
    updates_per_step: int = Field(1, ge=1, description="optimizer updates on the samples of one step")
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.2, ge=0)
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the k3 KL to the reference (beta)")
    level: Literal["token", "sequence"] = Field(
        "token",
        description="importance ratio of a token (DeepSeekMath eq. 3) or of a completion (report eq. 32)",
    )
    aggregation: Literal["sample_mean", "token_mean", "sequence_sum"] = Field(
        "sample_mean",
        description="how token losses become one loss; see align.losses.completion_weights. level: sequence needs sequence_sum",
    )
    advantage_scale: Literal["std", "none"] = Field(
        "std", description="divide by the group's standard deviation, or only centre"
    )
    train_on_truncated: bool = Field(True, description="train on completions cut off at the length limit")
    drop_uniform_groups: bool = Field(False, description="leave out groups whose rewards are all equal")

    @model_validator(mode="after")
    def _one_mean_over_a_completion(self) -> Self:
        if self.level == "sequence" and self.aggregation != "sequence_sum":
            raise ValueError(
                f"level: sequence is one loss for each completion, of which aggregation: {self.aggregation} would divide by the length "
                "a second time: set aggregation: sequence_sum, which is their mean (report eq. 32), or level: token"
            )
        return self


class PreferencesOptions(Section):
    """Pairs of the policy's own answers, the better one known by its verdict (DeepSeek-V2 report, section 4.2)."""

    prompts: int = Field(512, ge=1, description="training prompts of each data card that has no data.limit of its own")
    held_out_prompts: int = Field(128, ge=1, description="prompts of each of the card's other splits")
    samples: int = Field(8, ge=2, description="answers of a prompt")
    pairs_per_prompt: int = Field(2, ge=1, description="pairs of a prompt at most, no answer in two of them")


class ScoringOptions(Section):
    """The pool of processes that judge completions while others are being sampled."""

    workers: int = Field(1, ge=1)
    gpus: float = Field(
        0, ge=0, description="GPUs of a worker, for reward models; a share lets workers have one together"
    )
    timeout_s: float = Field(600, gt=0, description="longest time a group may take to be judged")
    infra_error_limit: float = Field(
        0.05, ge=0, le=1, description="share of samples that nobody could judge above which the run stops"
    )


class MachineOptions(Section):
    """What the machine must have."""

    cores: int = Field(1, ge=1)
    memory_gb: float = Field(1.0, gt=0, description="memory that must be free, in GiB")


class Recipe(Section):
    """What every stage has."""

    stage: Literal["sft", "reward_model", "grpo", "preferences"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    run: RunOptions = RunOptions()
    machine: MachineOptions = MachineOptions()
    model: ModelOptions
    data: list[DataOptions] = Field(min_length=1, description="one mapping, or a list of them")

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, data: Any) -> Any:
        return [data] if isinstance(data, Mapping) else data

    @property
    def directory(self) -> Path:
        return self.run.dir or Path("runs") / self.name

    @property
    def data_stage(self) -> DataStage:
        """The stage that the cards of its data must be meant for."""
        raise NotImplementedError


class TrainingRecipe(Recipe):
    """A stage that trains, and goes on from its last checkpoint when it was interrupted."""

    learner: LearnerOptions
    save_every: int | None = Field(
        None,
        ge=1,
        description="steps between checkpoints; when not given, one is written only where the run is told to stop",
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="checkpoints that stay, the newest; with evaluation.every also the most accurate one"
    )


class SamplingRecipe(Recipe):
    """A stage in which the policy answers prompts and the answers are judged."""

    rewards: list[RewardTerm] = Field(min_length=1)
    scoring: ScoringOptions = ScoringOptions()
    rollout: FleetOptions = FleetOptions()


IN_TURNS: Mapping[str, Mapping[str, Any]] = {"learner": {"gpus": 0.6}, "rollout": {"gpus": 0.4, "sleeps": True}}
"""What goes without saying where a learner rank and a rollout worker take turns on a GPU: shares of it, by Ray's count."""


class PolicyRecipe(SamplingRecipe, TrainingRecipe):
    """A stage that trains the policy."""

    evaluation: EvaluationOptions = EvaluationOptions()
    agreement: AgreementOptions = AgreementOptions()
    weights: WeightOptions = WeightOptions()
    take_turns: bool = Field(
        False,
        description="a learner rank and a rollout worker share a GPU, and use it in turn: while one works, what the other holds is in the "
        "CPU's memory",
    )

    @property
    def evaluation_cards(self) -> list[str]:
        """The data cards whose held-out problems the policy answers, each once."""
        return list(dict.fromkeys(self.evaluation.cards or [data.card for data in self.data]))

    @model_validator(mode="after")
    def _one_card_for_a_path(self) -> Self:
        for key in ("path", "levels"):
            if getattr(self.evaluation, key) is not None and len(self.evaluation_cards) > 1:
                raise ValueError(f"evaluation.{key} is for a single data card; name it in evaluation.cards")
        return self

    @model_validator(mode="after")
    def _an_adapter_to_send(self) -> Self:
        if self.weights.transport == "adapter":
            if self.learner.lora is None:
                raise ValueError(
                    "weights.transport: adapter sends the adapter alone, and there is none: set learner.lora"
                )
            refuse_without_effect(self.weights, ["bucket_mb"], "weights", "an adapter is sent as a whole")
        return self

    @model_validator(mode="before")
    @classmethod
    def _turns_are_taken_on_a_gpu(cls, data: Any) -> Any:
        if not (isinstance(data, Mapping) and data.get("take_turns")):
            return data
        given = {key: data.get(key) or {} for key in IN_TURNS}
        return {**data, **{key: {**IN_TURNS[key], **own} for key, own in given.items() if isinstance(own, Mapping)}}

    @model_validator(mode="after")
    def _turns_can_be_taken(self) -> Self:
        learner, rollout = self.learner, self.rollout
        if not self.take_turns:
            return self
        if learner.zero_stage not in (1, 2) or learner.expert_parallel > 1:
            raise ValueError(
                "take_turns: DeepSpeed moves what it holds under zero_stage 1 and 2, without expert_parallel"
            )
        if learner.zero_stage == 1 and self.model.dtype == "bfloat16":
            raise ValueError(
                "take_turns: DeepSpeed does not move the float32 gradients of a bfloat16 model under zero_stage 1; take zero_stage 2"
            )
        if learner.gpus + rollout.gpus > 1:
            raise ValueError("take_turns: learner.gpus and rollout.gpus are more than one GPU together; leave them out")
        if learner.resources or rollout.resources:
            raise ValueError(
                "take_turns: a rank and a worker are in one place; leave out learner.resources and rollout.resources"
            )
        if self.weights.transport == "broadcast":
            raise ValueError(
                "take_turns: weights.transport: broadcast wants a GPU for each process; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _a_device_for_each_process(self) -> Self:
        if self.weights.transport == "broadcast" and min(self.learner.gpus, self.rollout.gpus) < 1:
            raise ValueError(
                "weights.transport: broadcast wants a GPU of its own for each process: leave it out, or learner.gpus and rollout.gpus"
            )
        return self


class SftRecipe(PolicyRecipe):
    """Supervised fine-tuning."""

    stage: Literal["sft"]
    sft: SftOptions

    @property
    def data_stage(self) -> DataStage:
        return "sft"

    @model_validator(mode="after")
    def _leave_out_what_has_no_effect(self) -> Self:
        why = "SFT looks at the validation loss, every sft.validate_every steps"
        refuse_without_effect(self.evaluation, ["every"], "evaluation", why)
        for data in self.data:
            refuse_without_effect(data, ["split"], "data", "the validation split gives the validation loss")
        return self


class RewardModelRecipe(TrainingRecipe):
    """A reward model from preferences. Nothing is sampled for it."""

    stage: Literal["reward_model"]
    init_from: Path | None = Field(
        None, description="SFT recipe that trains the policy it is made of, run first and with this recipe's seed"
    )
    reward_model: RewardModelOptions

    @property
    def data_stage(self) -> DataStage:
        return "reward_model"

    @model_validator(mode="after")
    def _leave_out_what_has_no_effect(self) -> Self:
        if self.reward_model.loss == "pointwise" and self.reward_model.margin_scale:
            raise ValueError("reward_model.margin_scale has no effect on the pointwise loss: leave it out")
        refuse_without_effect(self.learner, ["share_prompts"], "learner", "a reward model reads whole conversations")
        for data in self.data:
            refuse_without_effect(data, ["levels"], "data", "preferences have no levels")
            refuse_without_effect(data, ["split"], "data", "validation and test pairs judge the reward model")
        return self


class GrpoRecipe(PolicyRecipe):
    """Reinforcement learning with GRPO."""

    stage: Literal["grpo"]
    init_from: Path | None = Field(
        None, description="SFT recipe that trains the starting policy, run first and with this recipe's seed"
    )
    reference: Path | None = Field(
        None, description="checkpoint of the KL's reference; the policy at the start of the stage when not given"
    )
    sampling: SamplingOptions = SamplingOptions()
    grpo: GrpoOptions
    guard: GuardOptions | None = None
    alarms: AlarmOptions = AlarmOptions()

    @property
    def data_stage(self) -> DataStage:
        return "grpo"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: greedy completions of a group are all alike; use 1.0")
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
        if self.weights.transport == "adapter" and self.init_from is not None:
            raise ValueError(
                "weights.transport: adapter wants workers that start from the policy that is trained: run init_from's recipe first, "
                "and give what it made as model.path"
            )
        if self.sampling.max_new_tokens >= self.rollout.max_length:
            raise ValueError(
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens}) leaves no room for a prompt in "
                f"rollout.max_length ({self.rollout.max_length})"
            )
        if self.grpo.prompts_per_step % self.grpo.updates_per_step:
            raise ValueError(
                f"grpo.prompts_per_step ({self.grpo.prompts_per_step}) cannot be split into "
                f"grpo.updates_per_step ({self.grpo.updates_per_step}) equal parts"
            )
        return self


class PreferencesRecipe(SamplingRecipe):
    """Preference data from the policy's own answers."""

    stage: Literal["preferences"]
    sampling: SamplingOptions = SamplingOptions()
    preferences: PreferencesOptions = PreferencesOptions()

    @property
    def data_stage(self) -> DataStage:
        return "grpo"

    @model_validator(mode="after")
    def _leave_out_what_has_no_effect(self) -> Self:
        refuse_without_effect(self.run, ["allow_changes"], "run", "this stage begins anew when it was interrupted")
        for data in self.data:
            refuse_without_effect(data, ["split", "share"], "data", "every prompt of every split is answered once")
        return self


STAGES: dict[str, type[Recipe]] = {
    "sft": SftRecipe,
    "reward_model": RewardModelRecipe,
    "grpo": GrpoRecipe,
    "preferences": PreferencesRecipe,
}
