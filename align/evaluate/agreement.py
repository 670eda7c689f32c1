"""The agreement gate: the sampler and the learner must give the same token the same log-probability."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from align.experience import training_sequence
from align.learner.group import LearnerGroup
from align.learner.objective import Sums
from align.recipe import AgreementOptions
from rollout import Fleet, Prompt, SamplingOptions, Trajectory

PROBE_TOKENS = 16


class AgreementError(Exception):
    """Sampler and learner disagree beyond the recipe's limit: what is trained is not what was sampled."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """|log-probability of the sampler - of the learner| over `tokens` tokens, in nats; `k3` estimates KL(sampler || learner)."""

    mean: float
    largest: float
    k3: float
    tokens: int

    @classmethod
    def of(cls, sums: Sums) -> "Disagreement":
        """The disagreement that a learner's pass over a batch found; NaN where it compared nothing."""
        n = sums.compared
        if not n:
            return cls(nan, nan, nan, 0)
        return cls(sums.difference / n, sums.max_difference, sums.sampler_kl / n, sums.compared)


class AgreementGate:
    """Warns, and beyond the limit raises, when sampler and learner part."""

    def __init__(self, options: AgreementOptions, dtype: str, warn: Callable[[str], None]):
        self._warn_mean, self._stop_mean = options.limits(dtype)
        self._warn = warn

    def check_sums(self, sums: Sums, when: str) -> None:
        """Check the disagreement that a learner's pass over a batch found."""
        self.check(Disagreement.of(sums), when)

    def check(self, found: Disagreement, when: str) -> Disagreement:
        """Pass on `found`, having warned or raised AgreementError as its mean demands. NaN is beyond every limit."""
        size = f"sampler and learner differ by {found.mean:.1e} nats a token on average, {found.largest:.1e} at most"
        if not found.mean <= self._stop_mean:
            raise AgreementError(
                f"{when}: {size}; the limit (agreement.stop_mean) is {self._stop_mean:.1e}. What to look at:\n"
                "  - does the sampler hold the learner's weights? `align doctor MODEL` sends an update and compares\n"
                "  - vLLM's CPU rotary kernel is wrong for DeepSeek-V2 without YaRN: rollout.native_rotary must be true\n"
                "  - do both compute in the same dtype (model.dtype)? In bfloat16 the limit has to be wider\n"
                "  - is the chat model's softmax scale right (YaRN)? `align doctor MODEL` says"
            )
        if not found.mean <= self._warn_mean:
            self._warn(f"{when}: {size} (agreement.warn_mean is {self._warn_mean:.1e})")
        return found


def probe(fleet: Fleet, learner: LearnerGroup, prompts: Sequence[Prompt]) -> Disagreement:
    """Let the sampler continue some prompts and the learner score the same tokens; nothing is trained."""
    sampling = SamplingOptions(temperature=1.0, max_new_tokens=PROBE_TOKENS)
    return compare([group.trajectories[0] for group in fleet.sample(prompts, 1, sampling, seed=0, step=0)], learner)


def compare(trajectories: Sequence[Trajectory], learner: LearnerGroup) -> Disagreement:
    """The disagreement on trajectories drawn at temperature 1."""
    learned = learner.log_probs([training_sequence(trajectory) for trajectory in trajectories], 1.0)
    sampled = [trajectory.log_probs[trajectory.sampled] for trajectory in trajectories]
    differences = np.concatenate(learned).astype(np.float64) - np.concatenate(sampled)
    size = np.abs(differences)
    return Disagreement(
        float(size.mean()), float(size.max()), float((np.expm1(differences) - differences).mean()), len(size)
    )
