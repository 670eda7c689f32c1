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
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-0": {"zero_stage": 0},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-0, bfloat16": {"zero_stage": 0},
    "ZeRO-1, bfloat16": {"zero_stage": 1},
    "ZeRO-2, bfloat16": {"zero_stage": 2},
    "ZeRO-3, bfloat16": {"zero_stage": 3},
    "ZeRO-2, adapters": {"zero_stage": 2, "lora": LoraOptions(rank=4)},
    "ZeRO-3, adapters": {"zero_stage": 3, "lora": LoraOptions(rank=4)},
    "ZeRO-1, experts spread": {"zero_stage": 1, "expert_parallel": 2},
    "ZeRO-2, experts spread": {"zero_stage": 2, "expert_parallel": 2},
}


def two_steps(learner: LearnerGroup, batch: list[TrainingSequence], between: Callable[[], None]) -> Any:
    """Losses, norms and what became of the weights."""
    found = []
    for _ in range(2):
        between()
        sums = learner.accumulate(batch, Objective(GRPO))
        between()
        found.append((sums.loss, sums.kl, learner.apply(1e-3)))
    between()
    return found, learner.log_probs(batch, 1.0), learner.weights()


@pytest.mark.parametrize(
    "case", [name if name == "ZeRO-3" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_same_to_the_last_bit(
    case: str, policy: ModelOptions, ray_session: None, sequences: Any, experience: Any
) -> None:
    model = policy.model_copy(update={"dtype": "bfloat16"}) if "bfloat16" in case else policy
    options = LearnerOptions(ranks=2, micro_batch_tokens=200, optimizer=OPTIMIZER, **CASES[case])
    learner = LearnerGroup(model, options, seed=0, reference=model)
    learner.wait_until_ready()
    batch = experience(sequences(0), learner.log_probs(sequences(0), 1.0))
    expected, expected_log_probs, expected_weights = two_steps(learner, batch, lambda: None)
    learner.close()

    again = LearnerGroup(model, options, seed=0, reference=model)
    before = in_memory(again)
    again.wait_until_ready()

    def rest() -> None:
        again.offload()
        again.onload()

    found, log_probs, weights = two_steps(again, batch, rest)
    assert found == expected
    assert all(np.array_equal(a, b) for a, b in zip(log_probs, expected_log_probs, strict=True))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)

    again.accumulate(batch, Objective(GRPO))
    assert all(working > start + 5e5 for working, start in zip(in_memory(again), before, strict=True))
    again.offload()
    assert all(at_rest < start + 5e4 for at_rest, start in zip(in_memory(again), before, strict=True))
    again.close()


def in_memory(learner: LearnerGroup) -> list[int]:
    """Bytes of all tensors in the process of each rank, but for the host memory that it offloads to."""
    import ray

    def read(worker: Any) -> int:
        import gc

        gc.unfreeze()
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        # Weights that are a mapped file cannot be resized; on a GPU they would have been copied there.
        storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.untyped_storage().resizable()]
        sizes = {storage._cdata: storage.nbytes() for storage in storages}
        host = worker._host_memory._chunks if hasattr(worker, "_host_memory") else []
        assert len(host) <= 1  # of a quarter of a GiB: what is scratch is not copied
        return sum(sizes.values()) - sum(sizes[chunk.untyped_storage()._cdata] for chunk in host)

    return ray.get([rank.__ray_call__.remote(read) for rank in learner._ranks])
