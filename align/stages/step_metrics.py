"""The statistics of a GRPO step, and its seconds."""

import time
from collections.abc import Sequence
from math import nan

import numpy as np

from align.evaluate.accuracy import mean_of
from align.evaluate.agreement import Disagreement
from align.experience import ScoredGroup
from align.learner.objective import Sums
from align.learner.routing import routing_metrics
from align.stages.advantages import Advantages


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap as that of `part`."""
        now = time.perf_counter()
        self.seconds[part] = now - self._at
        self._at = now


def step_metrics(
    groups: Sequence[ScoredGroup], advantages: Advantages, sums: Sums, norm: float, clock: Clock
) -> dict[str, float]:
    """The metrics of a step by name; NaN where there was nothing to take a mean of.

    Lengths in tokens, log-probabilities and entropy in nats, times in seconds.
    """
    answers = [answer for group in groups for answer in group.trajectories]
    scored = [answer for answer in answers if answer.reward.value is not None]
    rewards = [float(answer.reward.value) for answer in scored if answer.reward.value is not None]
    lengths = np.array([len(answer.trajectory.token_ids) for answer in answers])
    tokens, seconds, found = sums.tokens or nan, sum(clock.seconds.values()), Disagreement.of(sums)
    metrics = {
        "reward": mean_of(rewards),
        "reward_std": float(np.std(rewards)) if rewards else nan,
        "accuracy": mean_of([answer.right for answer in scored]),
        "zero_variance_groups": advantages.zero_variance_groups,
        "not_judged": 1 - float(advantages.valid.double().mean()),
        "trained_on": float(advantages.kept.double().mean()),
        "bad_samples": float(len(advantages.non_finite)),
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "truncated": mean_of([answer.truncated for answer in answers]),
        "weight_version": float(answers[0].trajectory.weight_versions[-1].version),
        "loss": sums.loss,
        "kl": sums.kl,
        "entropy": sums.entropy / tokens,
        "clip_fraction": sums.clipped / tokens,
        "gradient_norm": norm,
        "agreement/mean": found.mean,
        "agreement/max": found.largest,
        "agreement/k3": found.k3,
        "agreement/equal": found.equal,
        "step_seconds": seconds,
        "tokens_per_second": float(lengths.sum()) / seconds,
        "sampling_tokens_per_second": float(lengths.sum()) / clock.seconds["sampling"],
        "training_tokens_per_second": sums.padded_tokens / clock.seconds["training"],
    }
    for name in dict.fromkeys(name for answer in scored for name in answer.reward.components):
        parts = [answer.reward.components.get(name) for answer in scored]
        metrics[f"reward/{name}"] = mean_of([part.value for part in parts if part is not None])
    domains = [group.problem.example.domain for group in groups]
    if len(set(domains)) > 1:
        for domain in dict.fromkeys(domains):
            its = [
                answer for group in groups if group.problem.example.domain == domain for answer in group.trajectories
            ]
            metrics[f"accuracy/{domain}"] = mean_of([a.right for a in its if a.reward.value is not None])
    if sums.prompt_routes:
        metrics["routing/prompt_changed"] = sums.prompt_routes_changed / sums.prompt_routes
    seconds_of = {f"seconds/{part}": value for part, value in clock.seconds.items()}
    return metrics | routing_metrics(sums.routes) | seconds_of
