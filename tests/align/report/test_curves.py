"""Which metrics share a panel, and how many points of them a page holds."""

from collections.abc import Callable
from pathlib import Path

from align.report.curves import POINTS_OF_A_PAGE, Panel, Series, as_data, panels, thin
from align.report.read import read_run


def drawn(path: Path, write_run: Callable[..., Path], *records: dict[str, object]) -> dict[str, Panel]:
    (stage,) = read_run(write_run(path / "run", metrics=records)).stages
    return {panel.title: panel for panel in panels(stage)}


def test_metrics_go_where_they_are_compared(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    names = ["loss", "validation_loss", "reward", "reward/exact", "accuracy", "accuracy/code", "agreement/mean"]
    names += ["agreement/max", "seconds/sampling", "evaluation/pass@4", "evaluation/mean_length", "length"]
    found = drawn(tmp_path, write_run, {"step": 1, "stage": "grpo", "time": 9.0} | dict.fromkeys(names, 1.0))
    assert {title: [series.name for series in panel.series] for title, panel in found.items()} == {
        "loss": ["loss", "validation_loss"],
        "reward": ["reward"],
        "reward by component": ["exact"],
        "accuracy": ["accuracy", "accuracy/code"],
        "held-out problems": ["pass@4"],
        "length": ["mean_length", "length"],
        "agreement of sampler and learner": ["mean", "max"],
        "seconds by part": ["sampling"],
    }
    assert found["agreement of sampler and learner"].log


def test_the_load_of_the_experts_is_a_line_for_each_layer_or_expert(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    names = ["expert_load/layer_1/max", "expert_load/layer_2/max", "expert_load/violation", "other"]
    found = drawn(tmp_path, write_run, {"step": 1} | dict.fromkeys(names, 1.0))
    assert {title: [series.name for series in panel.series] for title, panel in found.items()} == {
        "expert_load/max": ["layer_1", "layer_2"],
        "expert_load": ["violation"],
        "other": ["other"],
    }


def test_what_is_no_finite_number_is_a_gap_and_a_step_written_again_counts_anew(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    records = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": "nan"}, {"step": 3, "reward": "inf"}]
    records += [{"step": 1, "reward": 7.0}, {"step": 4, "note": "text", "flag": True}]
    (series,) = drawn(tmp_path, write_run, *records)["reward"].series
    assert (series.steps, series.values, series.last) == ([1, 2, 3], [7.0, None, None], 7.0)


def test_thinning_keeps_the_spikes() -> None:
    values: list[float | None] = [1.0] * 5000
    values[1234], values[4000] = 99.0, -99.0
    thinned = thin(Series("loss", range(5000), values), 100)
    assert len(thinned.steps) <= 100
    assert {99.0, -99.0} <= set(thinned.values)
    assert list(thinned.steps) == sorted(thinned.steps)
    assert thin(thinned, 100) is thinned


def test_a_page_holds_a_bounded_number_of_points(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    names = [f"expert_load/layer_{layer}/expert_{expert}" for layer in range(20) for expert in range(50)]
    root = write_run(tmp_path / "run", metrics=[{"step": step} | dict.fromkeys(names, 0.5) for step in range(200)])
    (stage,) = as_data(read_run(root).stages)
    assert sum(len(series["steps"]) for panel in stage["panels"] for series in panel["series"]) <= POINTS_OF_A_PAGE
    assert stage["panels"][0]["thinned"]
