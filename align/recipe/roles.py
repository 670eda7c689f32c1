"""The processes that a recipe needs, and their work in a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.recipe.learner import LearnerOptions
from align.recipe.options import EvaluationOptions, ScoringOptions
from reward import RewardTerm
from rollout import WeightOptions
from rollout.types import FleetOptions, SamplingOptions


@dataclass(frozen=True, slots=True)
class Roles:
    """The processes that a recipe needs, each with its options (None where there are none of the kind), and their work in a step.

    `learner`: ranks that train `trained`, on `trained_sequences` of at most `longest` tokens; with a `reference` they hold the
    policy a second time, for the KL or for DPO, whose loss is of `margins` to it, and of a distillation the model at the
    path `teacher`. `rollout`: workers that hold the policy and
    sample `sampled_sequences` of at most `sampling.max_new_tokens`, `sampling_rounds` times at most (of preference data, all of them;
    none in SFT, where they only answer evaluations). `scoring`: processes that score what was sampled, by `rewards`. `evaluation`: what
    the policy is asked before and after the stage, by `weights` kept equal to the learner's. `colocated`: a rank and a worker share a
    GPU and use it in turn. `routes`: the experts of what is sampled go from process to process with it.
    """

    learner: LearnerOptions | None = None
    trained: Literal["policy", "reward_model"] | None = None
    trained_sequences: int = 0
    longest: int = 0
    reference: bool = False
    margins: bool = False
    teacher: str | None = None
    rollout: FleetOptions | None = None
    sampling: SamplingOptions | None = None
    sampled_sequences: int = 0
    sampling_rounds: int = 1
    scoring: ScoringOptions | None = None
    rewards: Sequence[RewardTerm] = ()
    evaluation: EvaluationOptions | None = None
    weights: WeightOptions | None = None
    colocated: bool = False
    routes: bool = False

    @property
    def gpu_parts(self) -> list[float]:
        """The GPUs, or part of one, of each process, in the order in which they start."""
        ranks, workers = self.learner.ranks if self.learner else 0, self.rollout.workers if self.rollout else 0
        sampling = [self.rollout.tensor_parallel * self.rollout.gpus] * workers if self.rollout else []
        scoring = [float(self.scoring.gpus)] * self.scoring.workers if self.scoring else []
        learning = [float(self.learner.gpus)] * ranks if self.learner else []
        return [1.0] * max(ranks, workers) + scoring if self.colocated else [*sampling, *scoring, *learning]

    @property
    def scoring_gpus(self) -> float:
        """How many GPUs of them the scoring workers take."""
        return self.scoring.workers * self.scoring.gpus if self.scoring else 0.0

    @property
    def gpus(self) -> float:
        """How many GPUs all processes take, where there are some."""
        return round(sum(self.gpu_parts), 4)  # as finely as Ray counts


def take(free: list[float], wanted: float) -> bool:
    """Take `wanted` GPUs from a node, given how much of each is `free`, and return whether there was room; `free` changes only then.

    A process is placed as Ray places it: on whole GPUs, or on the one of which least is left.
    """
    if wanted == int(wanted):
        idle = [place for place, left in enumerate(free) if left == 1.0][: int(wanted)]
        for place in idle if len(idle) == wanted else ():
            free[place] = 0.0
        return len(idle) == wanted
    room = [place for place, left in enumerate(free) if left >= wanted - 1e-4]  # as finely as Ray counts
    if room:
        free[min(room, key=lambda place: free[place])] -= wanted
    return bool(room)


def reward_models(rewards: Sequence[RewardTerm]) -> list[str]:
    """The directories of the trained reward models among rewards."""
    return [str(term.params["path"]) for term in rewards if term.name == "reward_model" and "path" in term.params]
