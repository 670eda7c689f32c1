"""A learner that goes on from a checkpoint is, to the last bit, the one that never stopped, in whatever way it trains."""

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from align.errors import UserError
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective
from align.learner.state import SHARED, own_file
from align.model.names import PARTS, to_checkpoint
from align.model.policy import load_policy
from align.recipe import LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions

Draw = Callable[[int], list[TrainingSequence]]
OPTIMIZER = OptimizerOptions(learning_rate=1e-3, weight_decay=0.01)
WAYS = {
    "zero-0": (LearnerOptions(ranks=1, zero_stage=0, optimizer=OPTIMIZER), "float32"),
    "zero-1": (LearnerOptions(ranks=2, zero_stage=1, optimizer=OPTIMIZER), "float32"),
    "zero-3": (LearnerOptions(ranks=2, zero_stage=3, optimizer=OPTIMIZER), "float32"),
    "zero-2 in bfloat16": (LearnerOptions(ranks=2, zero_stage=2, optimizer=OPTIMIZER), "bfloat16"),
    "zero-1 in bfloat16": (LearnerOptions(ranks=2, zero_stage=1, optimizer=OPTIMIZER), "bfloat16"),
    "zero-0 in bfloat16": (LearnerOptions(ranks=1, zero_stage=0, optimizer=OPTIMIZER), "bfloat16"),
    "adapters with dropout": (
        LearnerOptions(ranks=1, zero_stage=1, optimizer=OPTIMIZER, lora=LoraOptions(rank=4, dropout=0.1)),
        "float32",
    ),
    "frozen, zero-0": (LearnerOptions(ranks=1, zero_stage=0, optimizer=OPTIMIZER, freeze=["router"]), "float32"),
    "frozen, zero-3 in bfloat16": (
        LearnerOptions(ranks=2, zero_stage=3, optimizer=OPTIMIZER, freeze=["router", "embeddings", "norms"]),
        "bfloat16",
    ),
    "frozen, spread experts": (
        LearnerOptions(ranks=2, expert_parallel=2, optimizer=OPTIMIZER, freeze=["router"]),
        "float32",
    ),
}
QUICK = "zero-1"


def steps(learner: LearnerGroup, sequences: Draw, numbers: range) -> list[tuple[float, float]]:
    """Train on the batches of these numbers; the losses and gradient norms."""
    return [(learner.accumulate(sequences(n), Objective()).loss, learner.apply(1e-3 / (n + 1))) for n in numbers]


@pytest.mark.parametrize("way", [pytest.param(w, marks=[] if w == QUICK else [pytest.mark.slow]) for w in WAYS])
def test_going_on_from_a_checkpoint_is_the_same_to_the_last_bit(
    ray_session: None, policy: ModelOptions, sequences: Draw, tmp_path: Path, way: str
) -> None:
    options, dtype = WAYS[way]
    model = policy.model_copy(update={"dtype": dtype})
    with closing(LearnerGroup(model, options, seed=0)) as learner:
        learner.wait_until_ready()
        steps(learner, sequences, range(3))
        files = learner.save_state(tmp_path)
        whole = steps(learner, sequences, range(3, 6))
        expected = learner.weights()
        missing = learner.missing_gradients()
    assert files.keys() == {path.name for path in tmp_path.iterdir()}

    with closing(LearnerGroup(model, options, seed=1)) as other:
        other.wait_until_ready()
        other.load_state(tmp_path)
        assert steps(other, sequences, range(3, 6)) == whole
        weights = other.weights()
        assert {name for name, tensor in weights.items() if not torch.equal(tensor, expected[name])} == set()
        assert other.missing_gradients() == missing
        base = dict(to_checkpoint(load_policy(model).state_dict().items()))
        kept = {name for name in weights if any(re.search(PARTS[part], name) for part in options.freeze)}
        assert all(torch.equal(weights[name], base[name]) for name in kept)
        assert bool(kept) == bool(options.freeze)


def test_the_state_of_another_learner_is_refused(
    ray_session: None, policy: ModelOptions, sequences: Draw, tmp_path: Path
) -> None:
    with closing(LearnerGroup(policy, WAYS["zero-0"][0], seed=0)) as learner:
        learner.wait_until_ready()
        learner.save_state(tmp_path)
        state = torch.load(tmp_path / SHARED, weights_only=True)
        name, tensor = next(iter(state.items()))
        torch.save(state | {name: tensor.double()}, tmp_path / SHARED)
        with pytest.raises(UserError, match=r"float64 .* in the checkpoint, and torch.float32"):
            learner.load_state(tmp_path)
        torch.save(state, tmp_path / SHARED)
        own = torch.load(tmp_path / own_file(0), weights_only=True)
        torch.save(own | {"masters": [tensor]}, tmp_path / own_file(0))
        with pytest.raises(UserError, match="it has 1 groups of master copies, and this learner 0; another version"):
            learner.load_state(tmp_path)
    assert (tmp_path / own_file(0)).exists()
