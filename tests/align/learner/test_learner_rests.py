"""A learner that makes room for others in between computes what it would have computed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective
from align.recipe import GrpoOptions, LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions

OPTIMIZER = OptimizerOptions(learning_rate=1e-3)
GRPO = GrpoOptions(steps=1, prompts_per_step=1, group_size=2, kl_coefficient=0.1)
CASES: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-2, bfloat16": {"zero_stage": 2},
    "ZeRO-2, adapters": {"zero_stage": 2, "lora": LoraOptions(rank=4)},
}


def three_steps(learner: LearnerGroup, batch: list[TrainingSequence], between: Callable[[], None]) -> Any:
    """Losses, norms and what became of the weights."""
    found = []
    for _ in range(3):
        between()
        sums = learner.accumulate(batch, Objective(GRPO))
        between()
        found.append((sums.loss, sums.kl, learner.apply(1e-3)))
    between()
    return found, learner.log_probs(batch, 1.0), learner.weights()


@pytest.mark.parametrize(
    "case", [name if name == "ZeRO-1" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_same_to_the_last_bit(
    case: str, policy: ModelOptions, ray_session: None, sequences: Any, experience: Any
) -> None:
    model = policy.model_copy(update={"dtype": "bfloat16"}) if "bfloat16" in case else policy
    options = LearnerOptions(ranks=2, micro_batch_tokens=200, optimizer=OPTIMIZER, **CASES[case])
    learner = LearnerGroup(model, options, seed=0, reference=model)
    learner.wait_until_ready()
    batch = experience(sequences(0), learner.log_probs(sequences(0), 1.0))
    expected, expected_log_probs, expected_weights = three_steps(learner, batch, lambda: None)
    learner.close()

    again = LearnerGroup(model, options, seed=0, reference=model)
    again.wait_until_ready()

    def rest() -> None:
        again.offload()
        assert what_is_elsewhere(again) == [{"hp_params", "lp_params", "lp_grads", "optim_states"}] * 2
        again.onload()
        assert what_is_elsewhere(again) == [set()] * 2

    found, log_probs, weights = three_steps(again, batch, rest)
    again.close()
    assert found == expected
    assert all(np.array_equal(a, b) for a, b in zip(log_probs, expected_log_probs, strict=True))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def what_is_elsewhere(learner: LearnerGroup) -> list[set[str]]:
    """What DeepSpeed says it has moved, of each rank."""
    import ray

    def read(worker: Any) -> set[str]:
        return {state.name for state in worker._engine.optimizer.offloaded_states}

    return ray.get([rank.__ray_call__.remote(read) for rank in learner._ranks])
