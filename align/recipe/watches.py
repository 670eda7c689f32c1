"""What a run is watched for, and when it is told."""

from pydantic import Field

from align.recipe.section import Section


class AgreementOptions(Section):
    """How far sampler and learner may differ in the log-probability of a token."""

    warn_mean: float | None = Field(None, gt=0, description="mean |difference|; by dtype when not given")
    stop_mean: float | None = Field(None, gt=0, description="mean |difference|; by dtype when not given")

    def limits(self, dtype: str) -> tuple[float, float]:
        """(warn, stop): mean |difference| in nats a token, as given or as the dtype can hold."""
        # In float32 a token whose router was undecided can go to another expert: 0.1 nats of one token, 2e-5 of a step's mean.
        by_dtype = {"float32": (1e-4, 1e-3), "bfloat16": (0.03, 0.15)}
        warn, stop = by_dtype[dtype]
        return self.warn_mean or warn, self.stop_mean or stop


class AlarmOptions(Section):
    """When a GRPO run is told to be going wrong; what is compared with earlier steps waits until there are `window` of them."""

    window: int = Field(5, ge=1, description="steps that entropy and reward are compared with: the first, and the last")
    entropy_share: float = Field(
        0.1, ge=0, le=1, description="share of the first steps' entropy below which it collapsed"
    )
    uniform_groups: float = Field(0.95, gt=0, description="share of groups whose rewards are all equal")
    reward_jump: float = Field(1.0, gt=0, description="change of the mean reward, in standard deviations of a sample's")
    dead_experts: float = Field(0.5, gt=0, description="share of a layer's experts that no token goes to")


class GuardOptions(Section):
    """An alarm for over-optimisation: the reward that is learned from goes up while the one that is trusted goes down."""

    learned: str = Field(description="component of the reward, such as the label of a reward model")
    trusted: str = Field(description="component that is not trained on, such as a rule of weight 0")
    window: int = Field(5, ge=2, description="steps that are compared with as many before them")
