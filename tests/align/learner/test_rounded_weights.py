"""A learner computes with the rounded weights that it sends, and afterwards with its own again, however its ranks share them out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from align.learner.batch import TrainingSequence, collate, sampled_values
from align.learner.group import LearnerGroup
from align.learner.objective import LogProbs
from align.learner.policy import PolicyRank, Weights
from align.learner.routing import RoutingReplay
from align.model.names import from_checkpoint
from align.model.policy import load_policy
from align.recipe import LearnerOptions, ModelOptions, OptimizerOptions

OPTIONS = LearnerOptions(ranks=1, zero_stage=0, micro_batch_tokens=200, optimizer=OptimizerOptions(learning_rate=1e-3))
WAYS: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"ranks": 2, "zero_stage": 1},
    "ZeRO-3": {"ranks": 2, "zero_stage": 3},
    "spread experts": {"ranks": 2, "zero_stage": 1, "expert_parallel": 2},
}


def computed_with(
    weights: dict[str, torch.Tensor], policy: ModelOptions, sequences: list[TrainingSequence]
) -> np.ndarray[Any, Any]:
    """The log-probabilities of transformers with a checkpoint's weights."""
    model: Any = load_policy(policy)
    model.load_state_dict(from_checkpoint(weights), strict=False)
    batch = collate(sequences, 1)
    with torch.no_grad():
        return np.concatenate(sampled_values(LogProbs(model)(**batch.inputs, temperature=1.0)[0], batch))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_rank_computes_with_what_it_sends(
    policy: ModelOptions, sequences: Callable[[int], list[TrainingSequence]], precision: Any
) -> None:
    network: Any = load_policy(policy)
    rank: Any = object.__new__(PolicyRank)
    rank._options, rank._engine = OPTIONS, Weights(LogProbs(network))
    rank._device, rank._pad_id, rank._routing = torch.device("cpu"), 1, RoutingReplay(network)
    rank._below = ("",)
    drawn = sequences(0)

    def values(**how: Any) -> np.ndarray[Any, Any]:
        return np.concatenate(rank.log_probs([drawn], 1.0, **how)[0])

    exact = values()
    sent = {name: tensor for bucket in rank.publish(iter, 1e6, precision=precision) for name, tensor in bucket.items()}
    rounded = values(precision=precision)
    assert np.abs(rounded - computed_with(sent, policy, drawn)).max() < 1e-6
    assert np.abs(rounded - exact).mean() > 1e-3
    assert (values() == exact).all()
    with pytest.raises(ValueError, match="empty"):
        rank.log_probs([[]], 1.0, precision=precision)
    assert (values() == exact).all(), "also after an error"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
def test_ranks_together_compute_with_what_they_send(
    way: str, ray_session: None, policy: ModelOptions, sequences: Callable[[int], list[TrainingSequence]]
) -> None:
    learner = LearnerGroup(policy, OPTIONS.model_copy(update=WAYS[way]), seed=0, precision="int8")
    drawn = sequences(0)
    try:
        learner.wait_until_ready()
        exact = np.concatenate(learner.log_probs(drawn, 1.0))
        rounded = np.concatenate(learner.log_probs(drawn, 1.0, as_sent=True))
        sent = learner.weights()
        assert np.abs(rounded - computed_with(sent, policy, drawn)).max() < 1e-5
        assert np.abs(rounded - exact).mean() > 1e-3
        assert (np.concatenate(learner.log_probs(drawn, 1.0)) == exact).all()
    finally:
        learner.close()
