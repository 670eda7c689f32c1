"""The statistics of a GRPO step, and its seconds."""

import time
from collections.abc import Sequence
from math import isfinite, nan

import numpy as np

from align.evaluate.accuracy import mean_of
from align.evaluate.agreement import Disagreement
from align.experience import ScoredGroup
from align.learner.objective import Sums
from align.learner.routing import routing_metrics
from align.recipe import GrpoOptions
from align.stages.advantages import Advantages


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def lap(self, part: str) -> None:
        """Count the time since the last lap as time of `part`."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._at
        self._at = now


def step_metrics(
    groups: Sequence[ScoredGroup],
    advantages: Advantages,
    sums: Sums,
    norm: float,
    clock: Clock,
    *,
    rewarded: bool = True,
) -> dict[str, float]:
    """The metrics of a step by name; NaN where there was nothing to take a mean of.

    Not `rewarded`, it has none of the reward that is trained on; and no accuracy where nothing was scored at all. Lengths in tokens,
    log-probabilities and entropy in nats, times in seconds.
    """
    answers = [answer for group in groups for answer in group.trajectories]
    scored = [answer for answer in answers if answer.reward.value is not None]
    judged = [answer for answer in scored if answer.scored]
    rewards = [float(answer.reward.value) for answer in scored if answer.reward.value is not None]
    lengths = np.array([len(answer.trajectory.token_ids) for answer in answers])
    tokens, seconds, found = sums.tokens or nan, clock.total, Disagreement.of(sums)
    metrics = {
        "reward": mean_of(rewards),
        "reward_std": float(np.std(rewards)) if rewards else nan,
        "accuracy": mean_of([answer.right for answer in judged]),
        "zero_variance_groups": advantages.zero_variance_groups,
        "not_judged": 1 - float(advantages.valid.double().mean()),
        "trained_on": float(advantages.kept.double().mean()),
        "bad_samples": float(len(advantages.non_finite)),
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "truncated": mean_of([answer.truncated for answer in answers]),
        "weight_version": float(answers[0].trajectory.weight_versions[-1].version),
        "loss": sums.loss,
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
    if not rewarded:
        for name in ("reward", "reward_std", "zero_variance_groups", *(() if judged else ("accuracy",))):
            del metrics[name]
    for name in dict.fromkeys(name for answer in scored for name in answer.reward.components):
        parts = [answer.reward.components.get(name) for answer in scored]
        # One of weight 0 that could not judge has no number, and masks nothing.
        metrics[f"reward/{name}"] = mean_of([part.value for part in parts if part is not None and isfinite(part.value)])
    domains = [group.problem.example.domain for group in groups]
    if len(set(domains)) > 1:
        for domain in dict.fromkeys(domains):
            its = [
                answer for group in groups if group.problem.example.domain == domain for answer in group.trajectories
            ]
            metrics[f"accuracy/{domain}"] = mean_of([a.right for a in its if a.scored and a.reward.value is not None])
    if sums.prompt_routes:
        metrics["routing/prompt_changed"] = sums.prompt_routes_changed / sums.prompt_routes
    seconds_of = {f"seconds/{part}": value for part, value in clock.seconds.items()}
    return metrics | routing_metrics(sums.routes) | seconds_of


def option_metrics(options: GrpoOptions, advantages: Advantages, sums: Sums) -> dict[str, float]:
    """The metrics of what a recipe may ask for beside: a KL term and distillation, in nats a token; correction, refill, skipping: shares of tokens, of the step's
    groups, and of samples."""
    metrics: dict[str, float] = {}
    tokens = float(sums.tokens) or nan
    if options.kl_coefficient:
        metrics["kl"] = sums.kl / tokens
    if options.distill is not None:
        metrics["distill/kl"] = sums.teacher_kl / tokens
    if options.correction.kind != "none":
        metrics |= {
            "correction/cut": sums.correction_cut / tokens,
            "correction/masked": sums.correction_masked / tokens,
            # Kish's: of n tokens, the share that as many of equal weight would be.
            "correction/effective_sample_size": sums.correction_weights**2 / (tokens * (sums.correction_squares or 1)),
        }
    if options.refill_rounds:
        of_step = advantages.zero_variance[: options.prompts_per_step]
        metrics |= {
            "refill/replaced": float(len(advantages.zero_variance) - len(of_step)),
            "refill/with_variance": 1 - float(of_step.double().mean()),
        }
    if options.skip_zero_gradient:
        metrics["skipped_samples"] = 1 - float(advantages.computed.sum()) / (float(advantages.kept.sum()) or nan)
    return metrics
