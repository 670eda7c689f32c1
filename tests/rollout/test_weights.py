"""Weights that are not those that were sent are an error, never samples."""

import pytest

from rollout import FinishReason, Prompt, RolloutError, SamplingOptions, Trajectory, WeightUpdateError
from rollout.supervisor import Supervisor
from rollout.weights import check_coverage
from rollout.worker_handle import Batch, Doing, Job, Task


def test_an_update_that_leaves_a_parameter_out_is_refused_by_name() -> None:
    check_coverage({"norm.weight", "head.weight"}, {"norm.weight", "head.weight", "more"})
    with pytest.raises(WeightUpdateError, match=r"1 of the sampler's 2 parameters .*: head\.weight"):
        check_coverage({"norm.weight", "head.weight"}, {"norm.weight"})


@pytest.mark.parametrize("version", [0, 1])
def test_completions_of_other_weights_are_refused(version: int) -> None:
    job = Job(SamplingOptions(), version=1)
    drawn = [Trajectory.of_one_turn(Prompt("p", [1]), 0, [5], [-0.5], FinishReason.STOP, weight_version=version)]
    supervisor = object.__new__(Supervisor)
    supervisor._jobs = [job]
    member = type("Member", (), {"restarts": 0})()
    supervisor._succeeded(member, Task(Doing.SAMPLING, 0.0, Batch(job, [])), drawn)  # type: ignore[arg-type]
    answer = job.answers.get_nowait()
    if version == job.version:
        assert answer == drawn
    else:
        assert isinstance(answer, RolloutError)
        assert "other weights than those of version 1" in str(answer)
