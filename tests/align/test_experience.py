"""The record of a trajectory on its way from the sampler to the loss and to a samples file."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.types import Example
from align.errors import UserError
from align.experience import (
    ScoredTrajectory,
    is_scored_row,
    reward_sample,
    row_of,
    sample_of,
    token_columns,
    training_sequence,
    trajectory_of,
)
from align.run import read_samples, write_samples
from reward import SampleReward, Score, Verdict
from rollout import FinishReason, Prompt, Trajectory, Turn, Versions

EXAMPLE = Example("p", ({"role": "user", "content": "?"},), None, "4", "math")
TWO_TURNS = Trajectory(
    prompt_id="p",
    index=3,
    seed=7,
    prompt_token_ids=[1, 2, 3],
    token_ids=[10, 11, 20, 21, 12],
    sampled=np.array([True, True, False, False, True]),
    log_probs=np.array([-0.1, -0.2, 0, 0, -0.3], dtype=np.float32),
    weight_versions=[Versions(0, 5), Versions(4, 6)],
    turns=[Turn(0, 2, FinishReason.STOP), Turn(4, 5, FinishReason.LENGTH)],
    finish_reason=FinishReason.LENGTH,
)


@pytest.mark.parametrize("experts", [None, (256, np.uint8), (300, np.uint16)])
def test_a_samples_file_holds_the_whole_record(tmp_path: Path, experts: Any) -> None:
    chosen = None
    if experts is not None:
        chosen = np.random.default_rng(0).integers(0, experts[0], (7, 2, 2)).astype(experts[1])
    fields = {name: getattr(TWO_TURNS, name) for name in Trajectory.__slots__}
    trajectory = Trajectory(**fields | {"experts": chosen})
    scored = ScoredTrajectory(
        trajectory, "text", SampleReward(1.0, Verdict.PASS, {"exact_answer": Score(1.0, Verdict.PASS)})
    )
    write_samples(tmp_path / "samples.parquet", [row_of(EXAMPLE, scored) | token_columns(trajectory)])
    [row] = read_samples(tmp_path / "samples.parquet")
    assert trajectory_of(row) == trajectory
    assert trajectory_of(row) != TWO_TURNS or experts is None


def test_the_learners_log_probabilities_stand_at_the_tokens_that_were_sampled() -> None:
    columns = token_columns(TWO_TURNS, np.array([-1.0, -2.0, -3.0], dtype=np.float32))
    assert columns["learner_log_probs"] == [-1.0, -2.0, 0.0, 0.0, -3.0]
    assert token_columns(TWO_TURNS)["learner_log_probs"] is None


@pytest.mark.parametrize("known", [6, 8])
def test_with_experts_of_fewer_or_more_tokens_than_went_through_the_model_nothing_is_trained_on(known: int) -> None:
    of = {name: getattr(TWO_TURNS, name) for name in Trajectory.__slots__}
    assert training_sequence(Trajectory(**of | {"experts": np.zeros((7, 2, 2), np.uint8)})).experts is not None
    with pytest.raises(
        UserError, match=f"prompt 'p' has the experts of {known} tokens, where 7 went through the model"
    ):
        training_sequence(Trajectory(**of | {"experts": np.zeros((known, 2, 2), np.uint8)}))


def test_a_samples_file_from_before_turns_is_read() -> None:
    row = {
        "id": "p",
        "index": 0,
        "seed": 1,
        "weight_version": 4,
        "finish_reason": "stop",
        "prompt_token_ids": [1],
        "token_ids": [5, 6],
        "sampler_log_probs": [-1.0, -2.0],
    }
    expected = Trajectory.of_one_turn(
        Prompt("p", [1]), 0, [5, 6], [-1.0, -2.0], FinishReason.STOP, seed=1, weight_version=4
    )
    assert trajectory_of(row) == expected


def test_the_learner_trains_on_what_the_policy_drew_and_on_nothing_else() -> None:
    sequence = training_sequence(TWO_TURNS, weight=0.5, advantage=-1.0, group=2)
    assert list(sequence.token_ids) == [1, 2, 3, 10, 11, 20, 21, 12]
    assert [t for t, sampled in zip(sequence.token_ids, sequence.sampled, strict=True) if sampled] == [10, 11, 12]
    assert sequence.sampler_log_probs == pytest.approx([-0.1, -0.2, -0.3])
    assert (sequence.prompt_length, sequence.sampled_tokens, sequence.group) == (3, 3, 2)


def test_a_stored_row_is_the_sample_that_was_scored(tmp_path: Path) -> None:
    example = Example(
        "p", ({"role": "user", "content": "?"},), None, "4", "math", metadata={"unit": "m", "cases": [{"in": 1}]}
    )
    scored = ScoredTrajectory(
        TWO_TURNS, "text", SampleReward(None, Verdict.INFRA_ERROR, {"math": Score(math.nan, Verdict.INFRA_ERROR)})
    )
    write_samples(tmp_path / "samples.parquet", [row_of(example, scored), row_of(EXAMPLE, scored)])
    rows = read_samples(tmp_path / "samples.parquet")
    assert all(is_scored_row(row) for row in rows)
    assert [sample_of(row) for row in rows] == [reward_sample(each, TWO_TURNS, "text") for each in (example, EXAMPLE)]
    assert sample_of({key: value for key, value in rows[0].items() if key != "metadata"}).metadata == {}
