"""A tracker has every step of a run once, whatever happens to the run; and whatever happens to a tracker, the run goes on."""

import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.recipe import RewardModelRecipe
from align.run import MetricsLog, RunDirectory, read_status, trackers
from align.run.tracker_libraries import Ending, Row, TrackedRun, mlflow_name
from align.run.trackers import Background, Trackers, check_trackers
from align.session.run import open_run

from ..tiny import tiny_recipe


class Recorder:
    """A tracker that remembers; as its library would, beyond the life of a process."""

    def __init__(self, project: str = "") -> None:
        self.project = project
        self.runs: list[tuple[str, str | None]] = []
        self.recipe: Mapping[str, Any] = {}
        self.logged: list[tuple[int, Mapping[str, float], float]] = []
        self.tables: list[tuple[int, str, Sequence[Row]]] = []
        self.endings: list[Ending] = []
        self.abandoned = False
        self.broken: Exception | None = None

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        self._break()
        self.runs.append((run.name, run_id))
        self.recipe = run.recipe
        return run_id or "first"

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._break()
        self.logged.append((step, values, time))

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        self.tables.append((step, name, rows))

    def finish(self, ending: Ending) -> None:
        self.endings.append(ending)

    def abandon(self) -> None:
        self.abandoned = True

    def _break(self) -> None:
        if self.broken is not None:
            raise self.broken

    @property
    def steps(self) -> list[int]:
        return [step for step, _, _ in self.logged]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    def made(project: str) -> Recorder:
        recorder.project = project
        return recorder

    monkeypatch.setitem(trackers.LIBRARIES, "trackio", made)
    return recorder


def recipe(directory: Path, *listed: Any) -> RewardModelRecipe:
    return tiny_recipe(run={"dir": directory}, trackers=list(listed))


def open_log(directory: Path, recorder: Recorder) -> MetricsLog:
    run = RunDirectory(directory)
    directory.mkdir(exist_ok=True)
    background = Background("trackio", recorder, TrackedRun("tiny", {}, run.trackers_directory), run.metrics_file)
    return MetricsLog(run, Trackers({"trackio": background}, {"trackio": 2}))


def write(log: MetricsLog, *steps: int, loss: float = 0.5) -> None:
    for step in steps:
        log.trackers.table(step, "sft/samples", [{"completion": str(step)}])
        log.write(step, "sft", {"loss": loss})


def end(log: MetricsLog, ending: Ending = "finished") -> None:
    log.trackers.finish(ending)
    log.close()


def cut_to(directory: Path, lines: int) -> None:
    file = directory / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))


def test_a_tracker_gets_what_metrics_jsonl_gets(tmp_path: Path) -> None:
    recorder = Recorder()
    log = open_log(tmp_path / "run", recorder)
    write(log, 1, 2)
    end(log)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert recorder.logged == [(row["step"], {"sft/loss": row["loss"]}, row["time"]) for row in rows]
    assert recorder.endings == ["finished"]


def test_steps_that_are_made_again_are_sent_once_and_to_the_same_run(tmp_path: Path) -> None:
    recorder, run = Recorder(), tmp_path / "run"
    log = open_log(run, recorder)
    write(log, 1, 2, 3, 4)
    end(log, "interrupted")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "sta')
    log = open_log(run, recorder)
    cut_to(run, 2)
    log.trackers.rewind(3)
    write(log, 3, 4, 5, loss=0.25)
    end(log)
    assert recorder.runs == [("tiny", None), ("tiny", "first")]
    assert recorder.steps == [1, 2, 3, 4, 5]
    assert [values["sft/loss"] for _, values, _ in recorder.logged] == [0.5, 0.5, 0.5, 0.5, 0.25]
    assert [step for step, _, _ in recorder.tables] == [1, 2, 3, 4, 5]
    assert recorder.endings == ["interrupted", "finished"]


@pytest.mark.parametrize(("kept", "steps"), [(2, [1, 2, 3, 4, 1, 2, 3]), (4, [1, 2, 3, 4, 5])])
def test_a_run_that_goes_back_with_another_recipe_has_a_new_run_with_all_its_metrics(
    tmp_path: Path, kept: int, steps: list[int]
) -> None:
    recorder, run = Recorder(), tmp_path / "run"
    log = open_log(run, recorder)
    write(log, 1, 2, 3, 4)
    end(log, "interrupted")
    log = open_log(run, recorder)
    cut_to(run, kept)
    log.trackers.rewind(kept + 1)
    log.trackers.begin_anew()
    write(log, kept + 1, loss=0.25)
    end(log)
    assert recorder.runs == [("tiny", None), ("tiny", None if kept == 2 else "first")]
    assert recorder.steps == steps
    assert recorder.logged[-1][1] == {"sft/loss": 0.25}


def test_a_copy_of_a_run_has_a_run_of_its_own_and_a_moved_one_goes_on_in_its_own(tmp_path: Path) -> None:
    recorder, run = Recorder(), tmp_path / "run"
    log = open_log(run, recorder)
    write(log, 1, 2)
    end(log, "interrupted")
    shutil.copytree(run, tmp_path / "copy")
    log = open_log(tmp_path / "copy", recorder)
    write(log, 3)
    end(log)
    run.rename(tmp_path / "moved")
    end(open_log(run, Recorder()))
    log = open_log(tmp_path / "moved", recorder)
    write(log, 3)
    end(log)
    assert recorder.runs == [("tiny", None), ("tiny", None), ("tiny", "first")]
    assert recorder.steps == [1, 2, 1, 2, 3, 3]


def test_a_run_that_goes_back_in_the_same_process_sends_no_step_twice(tmp_path: Path) -> None:
    recorder, run = Recorder(), tmp_path / "run"
    log = open_log(run, recorder)
    write(log, 1, 2, 3)
    cut_to(run, 1)
    log.trackers.rewind(2)
    write(log, 2, 3, 4)
    end(log)
    assert recorder.steps == [1, 2, 3, 4]


def test_what_a_tracker_has_missed_is_sent_when_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, run = Recorder(), tmp_path / "run"
    log = open_log(run, recorder)
    write(log, 1)
    recorder.broken = ConnectionError("no route")
    write(log, 2, loss=float("nan"))
    end(log)
    recorder.broken = None
    log = open_log(run, recorder)
    write(log, 3)
    end(log)
    assert recorder.steps == [1, 2, 3]
    assert str(recorder.logged[1][1]) == "{'sft/loss': nan}"


def test_a_tracker_that_fails_is_told_of_once_and_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    recorder.broken = ConnectionError("no route to http://me:secret@host")
    log = open_log(tmp_path / "run", recorder)
    write(log, *range(1, 50))
    end(log)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "tracker trackio failed and is left alone from here on (ConnectionError: no route" in caplog.messages[0]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 49


@pytest.mark.parametrize(
    ("hangs", "limit", "told"),
    [
        ("start", "START_TIMEOUT_S", "it has not answered for 0 seconds"),
        ("scalars", "FINISH_TIMEOUT_S", "it was still sending"),
        ("finish", "FINISH_TIMEOUT_S", "it was still sending"),
    ],
)
def test_a_tracker_that_hangs_holds_the_run_up_for_a_limited_time_at_its_end_alone(
    hangs: str, limit: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, limit, 0.1)
    recorder, released = Recorder(), threading.Event()
    monkeypatch.setattr(recorder, hangs, lambda *_: released.wait(60) and "first")
    log = open_log(tmp_path / "run", recorder)
    write(log, 1, 2)
    end(log)
    assert f"TimeoutError: {told}" in caplog.messages[0]
    assert recorder.abandoned
    released.set()


def test_a_tracker_that_fails_leaves_nothing_that_the_end_of_the_process_waits_for(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.broken = ConnectionError("down")
    log = open_log(tmp_path / "run", recorder)
    write(log, 1)
    end(log)
    assert recorder.abandoned


def test_one_that_fails_takes_no_other_with_it(tmp_path: Path, recorder: Recorder) -> None:
    recorder.broken = RuntimeError("down")
    with open_run(recipe(tmp_path / "run", "trackio", "tensorboard")) as run:
        run.progress.stage("tiny", 2)
        for step in (1, 2):
            run.record_step("reward_model", step, {"loss": 0.5}, ())
    events = [json.loads(line) for line in run.directory.events_file.read_text().splitlines()]
    assert [event["kind"] for event in events] == ["warning"]
    assert any(run.directory.tensorboard_directory.iterdir())
    assert read_status(run.directory.path)["state"] == "finished"  # type: ignore[index]


@pytest.mark.parametrize(
    ("error", "ending"), [(None, "finished"), (KeyboardInterrupt(), "interrupted"), (RuntimeError(), "failed")]
)
def test_a_tracker_is_told_how_the_run_ended(
    error: BaseException | None, ending: Ending, tmp_path: Path, recorder: Recorder
) -> None:
    def run_it() -> None:
        with open_run(recipe(tmp_path / "run", {"name": "trackio", "project": "mine"})) as run:
            run.progress.stage("tiny", 1)
            run.record_step("reward_model", 1, {"loss": 0.5}, ())
            if error is not None:
                raise error

    if error is None:
        run_it()
    else:
        with pytest.raises(type(error)):
            run_it()
    assert recorder.endings == [ending]
    assert recorder.project == "mine"


def test_a_run_that_ends_before_its_first_metrics_starts_no_tracker(tmp_path: Path, recorder: Recorder) -> None:
    with pytest.raises(UserError), open_run(recipe(tmp_path / "run", "trackio")):
        raise UserError("the data cannot be read")
    assert recorder.runs == []
    assert not (tmp_path / "run").exists()


def test_no_text_of_the_data_is_sent_unless_a_recipe_says_how_much(tmp_path: Path, recorder: Recorder) -> None:
    rows = [
        {"completion": f"answer {i}", "reward": i / 2, "token_ids": [1, 2], "components": {"a": 0.5}} for i in range(8)
    ]
    some, all_of_them = {"name": "trackio", "samples": 3}, {"name": "trackio", "samples": 99}
    for place, listed in enumerate(["trackio", some, all_of_them]):
        with open_run(recipe(tmp_path / f"run{place}", listed)) as run:
            run.record_samples("grpo", 1, rows)
            assert run.directory.samples_file(1).exists()
    assert [(step, name, len(sent)) for step, name, sent in recorder.tables] == [
        (1, "grpo/samples", 3),
        (1, "grpo/samples", 8),
    ]
    assert recorder.tables[0][2] == [{"completion": f"answer {i}", "reward": i / 2} for i in (0, 2, 5)]


def test_no_secret_is_sent(tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_KEY", "planted/with+signs=")
    made = recipe(tmp_path / "run", {"name": "trackio", "samples": 1})
    made = made.model_copy(
        update={
            "data": [made.data[0].model_copy(update={"params": {"api_key": "planted", "url": "https://me:planted@h/"}})]
        }
    )
    with open_run(made) as run:
        run.record_samples("grpo", 1, [{"completion": "is planted/with+signs= a secret?"}])
    assert recorder.recipe["data"][0]["params"] == {"api_key": "***", "url": "https://***h/"}
    assert recorder.recipe["name"] == "tiny"
    assert recorder.tables[0][2] == [{"completion": "is *** a secret?"}]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (["wandb", {"name": "wandb"}], "named twice"),
        (["wandbs"], r"trackers\.0\.name"),
        ([{"name": "tensorboard", "project": "mine"}], "project has no effect on tensorboard"),
        (7, "valid list"),
    ],
)
def test_what_no_tracker_can_be_is_refused(listed: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModelRecipe.model_validate(recipe(tmp_path).model_dump() | {"trackers": listed})


def test_a_name_alone_is_a_tracker(tmp_path: Path) -> None:
    values = recipe(tmp_path).model_dump()
    of: Callable[[Any], list[str]] = lambda listed: [  # noqa: E731
        tracker.name for tracker in RewardModelRecipe.model_validate(values | {"trackers": listed}).trackers
    ]
    assert of("wandb") == of(["wandb"]) == of({"name": "wandb"}) == ["wandb"]
    assert of([]) == []
    del values["trackers"]
    assert [tracker.name for tracker in RewardModelRecipe.model_validate(values).trackers] == ["tensorboard"]


def test_one_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="mlflow is not installed: `pip install mlflow`"):
        check_trackers(recipe(tmp_path, "mlflow").trackers)


def test_a_directory_of_its_name_is_not_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UserError, match="trackio is not installed"):
        check_trackers(recipe(tmp_path, "trackio").trackers)


def test_mlflow_gets_names_that_it_takes() -> None:
    assert mlflow_name("grpo/evaluation/pass@4") == "grpo/evaluation/pass_4"
    assert mlflow_name("sft/loss") == "sft/loss"
