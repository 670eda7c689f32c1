"""What the recipes of all stages share, of those that train, and of those that sample."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.options import Options, refuse_without_effect
from align.recipe.learner import LearnerOptions
from align.recipe.options import DataOptions, MachineOptions, ModelOptions, RunOptions, ScoringOptions, TrackerOptions
from align.recipe.roles import Roles
from reward import RewardTerm
from rollout.types import FleetOptions

DataStage = Literal["sft", "reward_model", "grpo"]
STAGE = "the stage that the recipe is for"


class Recipe(Options):
    """What every stage has."""

    no_effect: ClassVar[Mapping[str, str]] = {}
    """Keys that do nothing in this stage, and why: they are refused."""
    data_stage: ClassVar[DataStage]
    """The stage that the cards of its data must be meant for."""

    stage: Literal["sft", "reward_model", "dpo", "grpo", "preferences"] = Field(description=STAGE)
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="what the run is called; it goes to runs/NAME"
    )
    seed: int = Field(0, ge=0, description="seed of the order of the data, of sampling and of new weights")
    run: RunOptions = RunOptions()
    machine: MachineOptions = MachineOptions()
    trackers: list[TrackerOptions] = Field(
        [TrackerOptions(name="tensorboard")],
        description="experiment trackers that follow the run: a list of names, or of mappings with these keys",
    )
    model: ModelOptions
    data: list[DataOptions] = Field(min_length=1, description="what is trained on: one mapping, or a list of them")

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, data: Any) -> Any:
        return [data] if isinstance(data, Mapping) else data

    @field_validator("trackers", mode="before")
    @classmethod
    def _names_alone(cls, trackers: Any) -> Any:
        listed = [trackers] if isinstance(trackers, str | Mapping) else trackers
        return (
            [{"name": one} if isinstance(one, str) else one for one in listed] if isinstance(listed, list) else listed
        )

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: list[TrackerOptions]) -> list[TrackerOptions]:
        names = [tracker.name for tracker in trackers]
        if len(set(names)) < len(names):
            raise ValueError(f"a tracker is named twice: {', '.join(names)}")
        return trackers

    @model_validator(mode="after")
    def _leave_out_what_has_no_effect(self) -> Self:
        for key, why in self.no_effect.items():
            refuse_without_effect(self, key, why)
        return self

    @property
    def directory(self) -> Path:
        return (self.run.dir or Path("runs") / self.name).expanduser()

    def roles(self) -> Roles:
        """The processes that it needs."""
        raise NotImplementedError


class TrainingRecipe(Recipe):
    """A stage that trains, and goes on from its last checkpoint when it was interrupted."""

    learner: LearnerOptions
    save_every: int | None = Field(
        None,
        ge=1,
        description="steps between checkpoints; when not given, one is written only where the run is told to stop and its step ends in time (run.grace_s), where an alarm (alarms.stop), a reward or a rollout worker ends it and, with evaluation.every, of the best step",
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="checkpoints that stay, the newest; with evaluation.every also the most accurate one"
    )

    @property
    def steps(self) -> int:
        """How many steps the stage makes."""
        return int(getattr(self, self.stage).steps)


class SamplingRecipe(Recipe):
    """A stage in which the policy answers prompts and the answers are scored."""

    rewards: list[RewardTerm] = Field(
        min_length=1,
        description="what an answer is worth: a list, whose weighted sum counts; whether it is right is what the first one for its domain says",
    )
    scoring: ScoringOptions = ScoringOptions()
    rollout: FleetOptions = FleetOptions()

    def roles(self) -> Roles:
        return Roles(rollout=self.rollout, scoring=self.scoring if self.rewards else None, rewards=self.rewards)
