"""A sampler beside a learner of adapters."""

from collections.abc import Callable
from typing import NamedTuple

from align.evaluate.agreement import Disagreement, probe
from align.learner.group import LearnerGroup
from rollout import Fleet, Prompt

PROMPTS = [Prompt(f"p{i}", [1, 40 + i, 60 + 3 * i, 17]) for i in range(6)]
Perturb = Callable[[LearnerGroup, int], None]


class Engines(NamedTuple):
    fleet: Fleet
    learner: LearnerGroup

    @property
    def apart(self) -> Disagreement:
        return probe(self.fleet, self.learner, PROMPTS)
