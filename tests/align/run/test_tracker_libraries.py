"""What the trackers' own libraries have of a run that was stopped and went on: each step once, in one run, and no secret."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.recipe import RewardModelRecipe
from align.run import MetricsLog, RunDirectory
from align.run.trackers import Trackers, check_trackers

from ..tiny import tiny_recipe

SECRET = "planted-planted-planted"
VALUES = {"loss": 0.5, "evaluation/pass@4": 0.25, "kl": float("nan")}
STEPS = [(step, 0.5) for step in (1, 2, 3)]


def recipe(tracker: str) -> RewardModelRecipe:
    return tiny_recipe(
        trackers=[{"name": tracker, "project": "sums", "samples": 2}],
        data={"card": "nano_helpful", "params": {"api_key": SECRET}},
    )


def track(directory: Path, tracker: str) -> None:
    """Log steps 1 and 2; then, as a resumed run, step 2 again and step 3."""
    run = RunDirectory(directory)
    directory.mkdir()
    made = recipe(tracker)
    for steps in ((1, 2), (2, 3)):
        log = MetricsLog(run, Trackers.of(made.trackers, made.name, made.model_dump(mode="json"), run))
        if steps[0] > 1:
            run.metrics_file.write_text(run.metrics_file.read_text().splitlines(keepends=True)[0])
            log.trackers.rewind(2)
        for step in steps:
            rows = [{"prompt": "1+1", "completion": f"{step} {SECRET}", "reward": 0.5}]
            log.trackers.table(step, "grpo/samples", rows)
            log.write(step, "grpo", VALUES)
        log.trackers.finish("interrupted" if steps[0] == 1 else "finished")
        log.close()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert caplog.messages == []
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in written if SECRET.encode() in file.read_bytes()] == []


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio, trackio.sqlite_storage, trackio.utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    check_trackers(recipe("trackio").trackers)
    track(tmp_path / "run", "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "sums.db") as database:
        rows = [
            (name, step, json.loads(values))
            for name, step, values in database.execute("select run_name, step, metrics from metrics order by id")
        ]
        [(config,)] = database.execute("select config from configs").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert [(step, row["grpo/loss"]) for _, step, row in rows if "grpo/loss" in row] == STEPS
    tables = [(step, row["grpo/samples"]["_value"]) for _, step, row in rows if "grpo/samples" in row]
    assert tables == [(step, [{"prompt": "1+1", "completion": f"{step} ***", "reward": 0.5}]) for step in (1, 2, 3)]
    assert json.loads(config)["learner"]["optimizer"]["learning_rate"] == 1e-3


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_has_each_step_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    check_trackers(recipe("mlflow").trackers)
    track(tmp_path / "run", "mlflow")
    assert (tmp_path / "mlflow.db").exists()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("sums")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    for name in ("grpo/loss", "grpo/evaluation/pass_4", "grpo/kl"):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == [1, 2, 3]
    assert run.data.params["learner.optimizer.learning_rate"] == "0.001"
    assert run.data.params["data.0.params.api_key"] == "***"
    folder = Path(client.download_artifacts(run.info.run_id, ""))
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == [
        *(f"grpo/samples/step_{step:05d}.json" for step in (1, 2, 3)),
        "recipe.yaml",
    ]
    table = json.loads((folder / "grpo/samples/step_00002.json").read_text())
    assert table["data"] == [["1+1", "2 ***", 0.5]]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    check_trackers(recipe("wandb").trackers)
    track(tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1
    records = [record for file in files for record in wandb_records(file)]
    history = [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["step"], row["grpo/loss"]) for row in history if "grpo/loss" in row] == STEPS
    assert [row["step"] for row in history if "grpo/samples" in row] == [1, 2, 3]
    kept = {record.run.project for record in records if record.WhichOneof("record_type") == "run"}
    assert kept == {"sums"}


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_without_a_key_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UserError, match="wandb has no API key"):
        check_trackers(recipe("wandb").trackers)


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a W&B file: LevelDB's log format after seven bytes, each record a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
