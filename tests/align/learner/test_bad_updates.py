"""A gradient that is no number is never a part of the weights, and a rank that hangs is named with its stacks."""

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from align.errors import NonFiniteError
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerError, LearnerGroup
from align.learner.objective import Objective
from align.recipe import GrpoOptions, LearnerOptions, ModelOptions, OptimizerOptions

Draw = Callable[[int], list[TrainingSequence]]

GRPO = Objective(GrpoOptions(steps=1, prompts_per_step=1, group_size=2))
OPTIMIZER = OptimizerOptions(learning_rate=1e-3, weight_decay=0.1)


@pytest.fixture(params=[1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def learner(request: pytest.FixtureRequest, policy: ModelOptions, ray_session: None) -> Iterator[LearnerGroup]:
    options = LearnerOptions(ranks=2, zero_stage=request.param, optimizer=OPTIMIZER)
    learner = LearnerGroup(policy, options, seed=0)
    learner.wait_until_ready()
    yield learner
    learner.close()


def spoilt(sequences: list[TrainingSequence], **what: object) -> list[TrainingSequence]:
    """One of the sequences is bad: so is its rank's loss, the other rank's is not."""
    return [replace(sequences[0], **what), *sequences[1:]]  # type: ignore[arg-type]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_bad_numbers_leave_weights_and_optimizer_as_they_were(learner: LearnerGroup, sequences: Draw) -> None:
    drawn = sequences(0)
    sampled = [replace(s, advantage=1.0) for s in drawn]
    bad = [
        (spoilt(drawn, weight=math.inf), Objective()),
        (spoilt(sampled, advantage=math.nan), GRPO),
        (spoilt(sampled, advantage=math.inf), GRPO),
    ]
    learner.accumulate(drawn, Objective())
    assert math.isfinite(learner.apply(1e-3))
    before = learner.weights()
    for batch, objective in bad:
        assert not math.isfinite(learner.accumulate(batch, objective).loss)
        assert not math.isfinite(learner.apply(1e-3))
        assert same(learner.weights(), before)
    # With no residue of what was dropped an update at a rate of zero changes nothing, and one at a rate of its own does.
    learner.accumulate(drawn, Objective())
    assert math.isfinite(learner.apply(0.0))
    assert same(learner.weights(), before)
    learner.accumulate(drawn, Objective())
    assert math.isfinite(learner.apply(1e-3))
    after = learner.weights()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert not same(after, before)

    for batch, objective in bad:
        learner.accumulate(batch, objective)
        learner.apply(1e-3)
    learner.accumulate(*bad[0])
    with pytest.raises(NonFiniteError, match=r"4 updates in a row.*stop_after_bad_steps"):
        learner.apply(1e-3)
    assert same(learner.weights(), after)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_its_stacks_are_told(
    policy: ModelOptions, sequences: Draw, ray_session: None
) -> None:
    with closing(LearnerGroup(policy, LearnerOptions(ranks=2, optimizer=OPTIMIZER), seed=0)) as learner:
        learner.wait_until_ready()
        learner.accumulate(sequences(0), Objective())
        learner._options = learner._options.model_copy(update={"step_timeout_s": 10})
        os.kill(learner._processes[1].pid, signal.SIGSTOP)
        with pytest.raises(
            LearnerError, match=r"learner rank .*1 was not done updating the weights.*learner\.step_timeout_s"
        ) as stalled:
            learner.apply(1e-3)
        rank_0, rank_1 = stalled.value.stacks.split("rank 1:")
        assert "MainThread" in rank_0
        assert "stopped" in rank_1
    assert not os.path.exists(f"/proc/{learner._processes[1].pid}")
