"""Experts that are forced, and balance losses, give one loss, norm and load, however the ranks share out the model and however they compute it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective
from align.losses import LossOptions
from align.recipe import BalanceOptions, LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions

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


def trained(policy: ModelOptions, options: LearnerOptions, sequences: Callable[[int], list[TrainingSequence]]) -> Any:
    """Two steps of GRPO: losses, norms, load, log-probabilities afterwards."""
    learner = LearnerGroup(policy, options, seed=0, replay="sampler")
    try:
        learner.wait_until_ready()
        losses, norms = [], []
        for step in range(2):
            losses.append(learner.accumulate(with_experts(sequences(step), step), Objective(LossOptions())).loss)
            norms.append(learner.apply(1e-3))
        load = learner.expert_load()
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
