"""The load of the experts in the report: a curve over all layers, and a table by layer for each stage that has some."""

from collections.abc import Callable
from pathlib import Path

from align.report import write_report
from align.report.curves import panels
from align.report.experts import expert_loads
from align.report.read import read_run

LOADS = [
    {
        "step": step,
        "loss": 1.0,
        "experts/cv": 0.1 * step,
        **{f"experts/layer_{layer}/cv": 0.1 * step for layer in (2, 10)},
        **{f"experts/layer_{layer}/max_over_mean": 1 + 0.1 * step for layer in (2, 10)},
        **{f"experts/layer_{layer}/dead": 0.25 * (step == 3) for layer in (2, 10)},
    }
    for step in (1, 2, 3)
]


def test_first_and_last_step_of_every_layer_stand_side_by_side(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path / "run", metrics=[*LOADS, {"step": 3, "evaluation/accuracy": 0.5}])
    (load,) = expert_loads(read_run(run))
    assert load.rows == [
        ["2", "0.1", "0.3", "1.1", "1.3", "0.0%", "25.0%"],
        ["10", "0.1", "0.3", "1.1", "1.3", "0.0%", "25.0%"],
    ]
    titles = {panel.title: [series.name for series in panel.series] for panel in panels(read_run(run).whole)}
    assert titles["expert load"] == ["cv"]
    assert titles["experts/cv"] == ["layer_2", "layer_10"]
    page = write_report(run).read_text()
    assert "<h2>Expert load</h2>" in page
    assert "| 10 | 0.1 | 0.3 | 1.1 | 1.3 | 0.0% | 25.0% |" in (run / "report.md").read_text()


def test_a_run_of_a_dense_model_says_nothing_of_experts(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path / "run", metrics=[{"step": 1, "loss": 1.0}])
    assert expert_loads(read_run(run)) == []
    assert "Expert load" not in write_report(run).read_text()
    assert "Expert load" not in (run / "report.md").read_text()
