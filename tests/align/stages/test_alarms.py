"""What goes wrong in silence is told once, with the samples that show it."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.errors import BadNumbersError
from align.evaluate.problems import Answer
from align.recipe import AlarmOptions
from align.run import MetricsLog, Progress, RunDirectory
from align.run.checkpoints import CheckpointDirectory
from align.session.run import Run
from align.session.signals import StopRequest
from align.stages.alarms import Alarms, SeenSample, no_history
from align.stages.bad_numbers import BadSamples, bad_samples
from reward import SampleReward, Verdict
from rollout import Completion, FinishReason

FINE = {"entropy": 1.0, "uniform_groups": 0.2, "reward": 0.5, "reward_std": 0.4, "experts/layer_1/dead": 0.0}
SAMPLES = [SeenSample("a#0", 0.0, -1.0, False), SeenSample("a#1", 1.0, -0.1, False), SeenSample("b#0", 1.0, -0.5, True)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    directory = RunDirectory.create(tmp_path / "run")
    with Progress(log=directory.log_file) as progress:
        yield Run(
            directory,
            MetricsLog(directory),
            CheckpointDirectory(directory.checkpoints_directory),
            progress,
            StopRequest(),
        )


def told(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.directory.events_file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("change", "kind", "samples"),
    [
        ({"entropy": 0.05}, "entropy", ["a#1", "b#0", "a#0"]),
        ({"uniform_groups": 1.0}, "variance", ["b#0"]),
        ({"reward": 1.0}, "reward", ["a#1", "b#0", "a#0"]),
        ({"reward": 0.0}, "reward", ["a#0", "a#1", "b#0"]),
        ({"experts/layer_1/dead": 0.75}, "experts", []),
    ],
)
def test_an_alarm_is_told_when_it_begins(run: Run, change: dict[str, float], kind: str, samples: Sequence[str]) -> None:
    history = no_history()
    alarms = Alarms(AlarmOptions(), run, history)
    for step in range(1, 11):
        alarms.observe(step, FINE, SAMPLES)
    assert told(run) == []
    alarms.observe(11, FINE | change, SAMPLES)
    # As after an interruption: what the alarms remember comes out of a checkpoint.
    resumed = Alarms(AlarmOptions(), run, json.loads(json.dumps(history)))
    resumed.observe(12, FINE | change, SAMPLES)
    [event] = told(run)
    assert (event["alarm"], event["samples"]) == (kind, samples)
    assert "GRPO step 11" in event["message"]


def answer(index: int, log_prob: float = -1.0, reward: float | None = 1.0) -> Answer:
    completion = Completion("p", index, [1], [5, 6], [-1.0, log_prob], FinishReason.STOP, 0, 0)
    return Answer(completion, "", SampleReward(reward, Verdict.PASS, {}))


def test_a_sample_with_a_number_that_is_none_is_found_with_its_name() -> None:
    answers = [answer(0), answer(1, log_prob=math.nan), answer(2, reward=math.inf), answer(3), answer(4, reward=None)]
    assert bad_samples(answers, [0.0, 0.0, 0.0, math.nan, 0.0]) == {
        "p#1": "log-probability",
        "p#2": "reward",
        "p#3": "advantage",
    }


def test_bad_samples_in_too_many_steps_in_a_row_end_the_run(run: Run) -> None:
    state: dict[str, Any] = {}
    steps = BadSamples(2, run, state)
    steps.observe(1, {"p#1": "reward"})
    steps.observe(2, {})
    steps.observe(3, {"p#1": "reward"})
    steps = BadSamples(2, run, json.loads(json.dumps(state)))
    with pytest.raises(BadNumbersError, match=r"2 steps in a row.*reward of p#1"):
        steps.observe(4, {"p#1": "reward"})
    assert [event["samples"] for event in told(run)] == [["p#1"]] * 3


def test_an_update_that_was_left_out_is_told_and_counted(run: Run) -> None:
    run.progress.stage("GRPO", 4)
    run.record_step("grpo", 3, {"gradient_norm": math.nan}, ())
    run.record_step("grpo", 4, {"gradient_norm": 1.0}, ())
    counts = [json.loads(line)["skipped_update"] for line in run.directory.metrics_file.read_text().splitlines()]
    assert counts == [1.0, 0.0]
    assert "grpo step 3" in told(run)[0]["message"]
