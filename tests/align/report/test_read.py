"""A run directory as data, and what is refused by file and line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from align.errors import UserError
from align.report.read import read_records, read_run, read_table
from align.run import MetricsLog, RunDirectory, write_samples

WriteRun = Callable[..., Path]


def test_the_stages_inside_a_run_come_before_its_own(write_run: WriteRun) -> None:
    root = write_run(stage="pipeline")
    write_run(root / "preference", stage="grpo", metrics=[{"step": 1, "loss": 3.0}])
    write_run(root / "preference" / "reward", stage="reward_model")
    run = read_run(root)
    assert [stage.label for stage in run.stages] == ["preference/reward", "preference", "pipeline"]
    assert run.stages[1].metrics[0]["loss"] == 3.0
    assert run.name == "run"


def test_two_stages_never_share_a_label(write_run: WriteRun) -> None:
    root = write_run(stage="sft")
    write_run(root / "sft", stage="sft")
    assert [stage.label for stage in read_run(root).stages] == ["sft", "sft (whole run)"]


def test_what_a_live_run_has_written_so_far_is_read(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    log = MetricsLog(run)
    log.write(1, "grpo", {"reward": float("nan"), "loss": 0.5})
    log.close()
    (stage,) = read_run(run.path).stages
    assert stage.metrics[0]["loss"] == 0.5
    assert stage.recipe == {}
    assert stage.status["state"] == "running"


def test_a_last_line_cut_off_in_writing_is_left_out_and_said(write_run: WriteRun) -> None:
    root = write_run(metrics=[{"step": 1, "loss": 2.0}])
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    (stage,) = read_run(root).stages
    assert [record["step"] for record in stage.metrics] == [1]
    assert stage.remarks == ["metrics.jsonl, line 2: cut off while it was written, and skipped here"]


@pytest.mark.parametrize("content", [b'{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', b'{"kind": "warning"}\n{"kind"\n'])
def test_any_other_damaged_line_is_refused_by_file_and_line(tmp_path: Path, content: bytes) -> None:
    """One in the middle, and a last one that ends and so was not cut off."""
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_records(tmp_path / "metrics.jsonl", [])


def test_what_is_no_run_is_refused(tmp_path: Path, write_run: WriteRun) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        read_run(tmp_path / "file")
    write_run("runs/nano")
    with pytest.raises(UserError, match=r"no run directory.*It holds runs, though: give one of nano"):
        read_run(tmp_path / "runs")


def test_a_damaged_recipe_is_refused_by_name(write_run: WriteRun) -> None:
    root = write_run()
    (root / "recipe.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"recipe\.yaml: not valid YAML"):
        read_run(root)


def test_an_evaluation_cannot_name_a_file_elsewhere(write_run: WriteRun) -> None:
    root = write_run(evaluations=[({"name": "after"}, [{"id": "1"}])])
    (stage,) = read_run(root).stages
    assert stage.evaluation_file("after") == root / "evaluations" / "after.parquet"
    assert stage.evaluation_file("../evaluations/after") is None
    assert stage.evaluation_file("before") is None


def test_columns_and_metrics_of_earlier_versions_are_read_by_their_present_names(
    tmp_path: Path, write_run: WriteRun
) -> None:
    file = tmp_path / "step_00001.parquet"
    wanted = ("id", "ground_truth", "log_probs", "components")
    for answer, log_probs in (("answer", "sampler_log_probs"), ("ground_truth", "log_probs")):
        write_samples(file, [{"other": 1, answer: "2", "components": {"exact": 1.0}, log_probs: [-0.5], "id": "a"}])
        rows = read_table(file, wanted).to_pylist()
        assert rows == [{"ground_truth": "2", "components": {"exact": 1.0}, "log_probs": [-0.5], "id": "a"}]
    (stage,) = read_run(write_run(metrics=[{"step": 1, "uniform_groups": 0.5}])).stages
    assert stage.metrics == [{"step": 1, "zero_variance_groups": 0.5}]
