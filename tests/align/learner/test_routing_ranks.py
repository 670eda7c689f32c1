"""Experts that are forced, and balance losses, give one loss, norm and load, however the ranks share out the model and however they compute it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from align.learner.batch import TrainingSequence, collate
from align.learner.group import LearnerGroup
from align.learner.objective import LogProbs, Objective
from align.learner.routing import routing_metrics
from align.losses import LossOptions
from align.model.policy import load_policy
from align.recipe import BalanceOptions, LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions
from rollout.parts import EMBEDDING, LAST_NORM, PartNotes, Parts

EXPERTS, CHOSEN, LAYERS = 8, 2, 3
ALONE = LearnerOptions(
    ranks=1,
    zero_stage=0,
    micro_batch_tokens=200,
    optimizer=OptimizerOptions(learning_rate=1e-3, clip_norm=0.5),
    balance=BalanceOptions(expert=0.5),
)
WAYS: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"ranks": 2, "zero_stage": 1},
    "ZeRO-3": {"ranks": 2, "zero_stage": 3},
    "ZeRO-3, checkpointing": {"ranks": 2, "zero_stage": 3, "gradient_checkpointing": True},
    "spread experts": {"ranks": 2, "zero_stage": 1, "expert_parallel": 2},
    "spread experts, checkpointing": {
        "ranks": 2,
        "zero_stage": 2,
        "expert_parallel": 2,
        "gradient_checkpointing": True,
    },
    "shared prompts": {"share_prompts": True},
    "adapters": {"lora": LoraOptions(rank=4, targets=["attention", "experts"])},
}


def with_experts(sequences: list[TrainingSequence], seed: int) -> list[TrainingSequence]:
    """Two completions of each sequence's prompt, each token with experts of nobody in particular, the prompt's in common."""
    random, drawn = np.random.default_rng(seed), []
    for group, sequence in enumerate(sequences):
        shape = (len(sequence.token_ids) - 1, LAYERS, EXPERTS)
        first, other = (np.argsort(random.random(shape))[..., :CHOSEN].astype(np.uint8) for _ in range(2))
        other[: sequence.prompt_length - 1] = first[: sequence.prompt_length - 1]
        values = random.normal(-6, 1, sequence.sampled_tokens).astype(np.float32)
        for experts, advantage in ((first, 1.0), (other, -0.5)):
            more = {"experts": experts, "group": group, "advantage": advantage, "old_log_probs": values}
            drawn.append(replace(sequence, **more))
    return drawn


def computed_by_parts(policy: ModelOptions, sequence: TrainingSequence) -> Parts:
    """What the parts of the model compute in this process."""
    module = LogProbs(load_policy(policy))
    notes = PartNotes(module.policy)
    with torch.no_grad():
        module(**collate([sequence], 0).inputs, temperature=1.0)
    return notes.close()


def trained(policy: ModelOptions, options: LearnerOptions, sequences: Callable[[int], list[TrainingSequence]]) -> Any:
    """Two steps of GRPO: losses, norms, load, log-probabilities afterwards. Before them every part computes what it does in this process."""
    learner = LearnerGroup(policy, options, seed=0, replay="sampler")
    noted = computed_by_parts(policy, sequences(0)[0])
    try:
        learner.wait_until_ready()
        found, _ = learner.part_distances(sequences(0)[0], noted)
        assert list(found) == [name for name in noted if "," in name or name in (EMBEDDING, LAST_NORM)]
        assert max(distance.relative for distance in found.values()) < 1e-5
        losses, norms, routes = [], [], []
        for step in range(2):
            sums = learner.accumulate(with_experts(sequences(step), step), Objective(LossOptions()))
            losses.append(sums.loss)
            routes += sums.routes
            norms.append(learner.apply(1e-3))
        load = learner.expert_load() | routing_metrics(routes)
        return losses, norms, load, np.concatenate(learner.log_probs(with_experts(sequences(9), 9), 1.0))
    finally:
        learner.close()


@pytest.fixture(scope="module")
def alone(ray_session: None, policy: ModelOptions, sequences: Callable[[int], list[TrainingSequence]]) -> Any:
    return trained(policy, ALONE, sequences)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_one_loss(
    way: str, alone: Any, policy: ModelOptions, sequences: Callable[[int], list[TrainingSequence]]
) -> None:
    losses, norms, load, log_probs = trained(policy, ALONE.model_copy(update=WAYS[way]), sequences)
    expected_losses, expected_norms, expected_load, expected = alone
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-5)
    assert load["routing/changed"] > 0.5
    if way != "adapters":  # which train other parameters
        assert losses[1] == pytest.approx(expected_losses[1], rel=1e-4)
        assert norms == pytest.approx(expected_norms, rel=1e-3)
        assert load == pytest.approx(expected_load, abs=0.02)
        assert load["balance/expert"] == pytest.approx(expected_load["balance/expert"], rel=1e-3)
        assert np.abs(log_probs - expected).max() < 1e-3
