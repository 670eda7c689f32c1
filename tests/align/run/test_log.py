"""Every number written is valid JSON on disk at once, and a scalar in TensorBoard."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.run import MetricsLog, RunDirectory
from align.run.tensorboard import TensorBoard, as_markdown
from align.run.trackers import Trackers


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def log(run: RunDirectory) -> Iterator[MetricsLog]:
    log = MetricsLog(run)
    yield log
    log.close()


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_step_is_one_line_on_disk_when_write_returns(run: RunDirectory, log: MetricsLog) -> None:
    log.write(1, "sft", {"loss": 2.5, "tokens": 100})
    log.write(2, "sft", {"loss": 1.5})

    first, second = lines(run.metrics_file)
    assert first == {"step": 1, "stage": "sft", "time": first["time"], "loss": 2.5, "tokens": 100}
    assert second["loss"] == 1.5
    assert first["time"] <= second["time"]


def test_tensorboard_reads_the_same_numbers_back(run: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(run, Trackers({"tensorboard": TensorBoard(run.tensorboard_directory, {"name": "tiny"})}))
    log.write(1, "sft", {"loss": 2.5})
    log.write(1, "grpo", {"reward/mean": 0.25, "kl": math.nan})
    log.write(2, "grpo", {"reward/mean": 0.5})

    events = EventAccumulator(str(run.tensorboard_directory))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["grpo/kl", "grpo/reward/mean", "sft/loss"]
    assert [(e.step, e.value) for e in events.Scalars("grpo/reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert events.Scalars("sft/loss")[0].wall_time == lines(run.metrics_file)[0]["time"]
    [text] = events.Tensors("recipe")
    assert text.tensor_proto.string_val == [b"```yaml\nname: tiny\n```"]


def test_tensorboard_forgets_the_steps_that_are_made_again(run: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3), (2, 3, 4)):
        board = TensorBoard(run.tensorboard_directory, {"name": "tiny"})
        board.rewind(steps[0])
        for step in steps:
            board.scalars(step, {"sft/loss": float(steps[0])}, 0.0)
        board.finish("finished")
    events = EventAccumulator(str(run.tensorboard_directory))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("sft/loss")] == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    assert len(events.Tensors("recipe")) == 1


def test_samples_are_a_table_among_tensorboards_texts() -> None:
    rows = [{"prompt": "1|2", "reward": 0.5}, {"prompt": "a\nb", "verdict": "pass"}]
    assert as_markdown(rows).splitlines() == [
        "| prompt | reward | verdict |",
        "| --- | --- | --- |",
        "| 1\\|2 | 0.5 |  |",
        "| a<br>b |  | pass |",
    ]


def test_what_json_has_no_number_for_is_written_as_a_string(run: RunDirectory, log: MetricsLog) -> None:
    numbers: dict[str, Any] = {"kl": math.nan, "ratio": np.float32("inf"), "loss": -math.inf}
    log.write(1, "grpo", numbers | {"reward": np.float32(0.5)})
    (line,) = lines(run.metrics_file)
    assert [line[name] for name in ("kl", "ratio", "loss", "reward")] == ["nan", "inf", "-inf", 0.5]


def test_a_metric_cannot_hide_the_step(run: RunDirectory, log: MetricsLog) -> None:
    with pytest.raises(ValueError, match="step"):
        log.write(1, "sft", {"step": 7.0})
    assert lines(run.metrics_file) == []


def test_events_are_lines_of_their_own(run: RunDirectory, log: MetricsLog) -> None:
    log.event("sampler restarted", "sampler 3 died", sampler=3, waits=[1.0, math.inf], path=Path("a"))
    (line,) = lines(run.events_file)
    assert line["kind"] == "sampler restarted"
    assert (line["message"], line["sampler"]) == ("sampler 3 died", 3)
    assert (line["waits"], line["path"]) == ([1.0, "inf"], "a")


def test_an_event_that_json_cannot_hold_leaves_no_half_line(run: RunDirectory, log: MetricsLog) -> None:
    with pytest.raises(TypeError):
        log.event("odd", "an object", thing=object())
    log.event("fine", "after it")
    assert [line["kind"] for line in lines(run.events_file)] == ["fine"]


def test_a_log_opened_again_appends(run: RunDirectory) -> None:
    for step in (1, 2):
        log = MetricsLog(run)
        log.write(step, "sft", {"loss": 1.0})
        log.close()
    assert [line["step"] for line in lines(run.metrics_file)] == [1, 2]
