"""What the tests of learners train on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup


@pytest.fixture(scope="session")
def sequences() -> Callable[[int], list[TrainingSequence]]:
    """A function of a seed: twelve sequences of random tokens, so weighted that the loss is the mean over completion tokens."""

    def draw(seed: int) -> list[TrainingSequence]:
        random = Random(seed)
        drawn = []
        for _ in range(12):
            prompt, completion = random.randint(2, 20), random.randint(1, 30)
            drawn.append(
                TrainingSequence.of_completion([random.randrange(512) for _ in range(prompt + completion)], prompt, 1.0)
            )
        total = sum(s.sampled_tokens for s in drawn)
        return [replace(s, weight=1 / total) for s in drawn]

    return draw


@pytest.fixture(scope="session")
def experience() -> Callable[[list[TrainingSequence], Sequence[Any]], list[TrainingSequence]]:
    """A function of sequences and their log-probabilities now: samples of an older policy.

    Ratios are inside and outside the trust region, advantages of both signs.
    """

    def sampled(drawn: list[TrainingSequence], policy_log_probs: Sequence[Any]) -> list[TrainingSequence]:
        random = np.random.default_rng(7)
        return [
            replace(
                s,
                weight=1 / (len(drawn) * s.sampled_tokens),
                advantage=float(random.normal()),
                old_log_probs=(now + random.normal(0, 0.2, len(now))).astype(np.float32),
            )
            for s, now in zip(drawn, policy_log_probs, strict=True)
        ]

    return sampled


@pytest.fixture(scope="session")
def perturb() -> Callable[[LearnerGroup, int], None]:
    """Adds noise, drawn from a seed, to A and B of every adapter of a learner."""

    def perturbed(learner: LearnerGroup, seed: int) -> None:
        import ray

        def add_noise(worker: Any) -> None:
            generator = torch.Generator().manual_seed(seed)
            for parameter in worker._network.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)

        ray.get([rank.__ray_call__.remote(add_noise) for rank in learner._ranks])

    return perturbed
