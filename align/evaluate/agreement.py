"""The agreement gate: the sampler and the learner must give the same token the same log-probability."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import nan

import numpy as np
import torch

from align.experience import training_sequence
from align.learner.group import LearnerGroup
from align.learner.objective import Sums
from align.learner.routing import Changes, add_changes
from align.losses import agreement
from align.recipe import AgreementOptions
from rollout import Fleet, Precision, Prompt, SamplingOptions, Trajectory

PROBE_TOKENS = 16


class AgreementError(Exception):
    """Sampler and learner disagree beyond the recipe's limit: what is trained is not what was sampled."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """|log-probability of the sampler - of the learner| over `tokens` tokens, in nats; `k3` estimates KL(sampler || learner).

    Of `equal`, a share of the tokens, both are the same to the last bit. `routes` has what was counted of their routing, by layer; it is empty
    where no experts were recorded.
    """

    mean: float
    largest: float
    k3: float
    tokens: int
    equal: float = nan
    routes: Changes = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"sampler and learner differ by {self.mean:.1e} nats a token on average, {self.largest:.1e} at most (k3 {self.k3:.1e}; "
            f"{self.equal:.1%} of {self.tokens} tokens equal to the last bit)"
        )

    @property
    def routed_otherwise(self) -> tuple[float, int]:
        """The largest share of a layer's tokens that the learner sends to other experts, and that layer; (0, -1) without any."""
        return max(((counts.changed / counts.known, layer) for layer, counts in self.routes.items()), default=(0.0, -1))

    @classmethod
    def of(cls, sums: Sums) -> "Disagreement":
        """The disagreement that a learner's pass over a batch found; NaN where it compared nothing."""
        n, routes = sums.compared, add_changes(sums.routes)
        if not n:
            return cls(nan, nan, nan, 0, routes=routes)
        return cls(sums.difference / n, sums.max_difference, sums.sampler_kl / n, n, sums.equal / n, routes)


class AgreementGate:
    """Warns, and beyond the limit raises, when sampler and learner part."""

    def __init__(
        self, options: AgreementOptions, dtype: str, warn: Callable[[str], None], precision: Precision = "model"
    ):
        """Both compute in `dtype`; `precision` is the grid that the sampler's weights alone are rounded to."""
        grid = dtype if precision == "model" else precision
        self._warn_mean, self._stop_mean = options.limits(grid)
        self._stop_routing = options.routing_limit(grid)
        self.dtype = dtype
        self._warn = warn

    def check(self, found: Disagreement, when: str) -> Disagreement:
        """Pass on `found`, having warned or raised AgreementError as its mean and its routes demand. NaN is beyond every limit."""
        if not found.mean <= self._stop_mean:
            raise AgreementError(
                f"{when}: {found}; the limit (agreement.stop_mean) is {self._stop_mean:.1e}. What to look at:\n"
                "  - does the sampler hold the learner's weights? `align doctor MODEL` sends an update and compares\n"
                "  - vLLM's CPU rotary kernel is wrong for DeepSeek-V2 without YaRN: rollout.native_rotary must be true\n"
                "  - do both compute in the same dtype (model.dtype)? In bfloat16 the limit has to be wider\n"
                "  - is the chat model's softmax scale right (YaRN)? `align doctor MODEL` says"
            )
        if not found.mean <= self._warn_mean:
            self._warn(f"{when}: {found} (agreement.warn_mean is {self._warn_mean:.1e})")
        self._check_routes(found, when)
        return found

    def _check_routes(self, found: Disagreement, when: str) -> None:
        share, layer = found.routed_otherwise
        counts = found.routes.get(layer)
        if counts is None or not share > self._stop_routing / 2:
            return
        first = next(number for number, of_layer in found.routes.items() if of_layer.changed)
        told = (
            f"{when}: the learner sends {counts.changed} of {counts.known} tokens of layer {layer} to other experts than the sampler did "
            f"({share:.2%}; the first layer that differs is {first}, and {counts.fell_back} tokens have no recorded experts)"
        )
        if share > self._stop_routing:
            raise AgreementError(
                f"{told}; the limit (agreement.stop_routing) is {self._stop_routing:.2%}. What to look at:\n"
                "  - is layer "
                f"{first}'s router the learner's? `align doctor MODEL --agreement` says where the engines part\n"
                "  - do both compute in the same dtype (model.dtype)? In bfloat16 routers round"
            )
        self._warn(f"{told}; the limit (agreement.stop_routing) is {self._stop_routing:.2%}")


def probe(fleet: Fleet, learner: LearnerGroup, prompts: Sequence[Prompt]) -> Disagreement:
    """Let the sampler continue some prompts and the learner score the same tokens; nothing is trained."""
    sampling = SamplingOptions(temperature=1.0, max_new_tokens=PROBE_TOKENS)
    return compare([group.trajectories[0] for group in fleet.sample(prompts, 1, sampling, seed=0, step=0)], learner)


def compare(trajectories: Sequence[Trajectory], learner: LearnerGroup) -> Disagreement:
    """The disagreement on trajectories drawn at temperature 1, the learner's weights rounded where they are sent so."""
    learned = learner.log_probs([training_sequence(trajectory) for trajectory in trajectories], 1.0, as_sent=True)
    sampled = [trajectory.log_probs[trajectory.sampled] for trajectory in trajectories]
    ours, theirs = (torch.from_numpy(np.concatenate(values)) for values in (learned, sampled))
    found = agreement(ours, theirs, torch.ones_like(ours, dtype=torch.bool))
    routes = add_changes(learner.take_routes())
    return Disagreement(found.mean_abs, found.max_abs, found.k3, found.tokens, found.equal / found.tokens, routes)
