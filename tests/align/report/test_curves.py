"""Which metrics share a panel, how many points of them a page holds, and what the plot of a run shows."""

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from align.errors import UserError
from align.report import write_plot
from align.report.curves import POINTS_OF_A_PAGE, Panel, Series, as_data, panels, thin
from align.report.plot import AGREEMENT, HEIGHT, WIDTH, build_plot, round_numbers
from align.report.read import read_run

WriteRun = Callable[..., Path]
EVIL = "</title><script>alert(1)</script>&\x00\ud800"


def drawn(write_run: WriteRun, *records: dict[str, object]) -> dict[str, Panel]:
    (stage,) = read_run(write_run(metrics=records)).stages
    return {panel.title: panel for panel in panels(stage)}


def test_metrics_go_where_they_are_compared(write_run: WriteRun) -> None:
    names = ["loss", "validation_loss", "reward", "reward/exact", "accuracy", "accuracy/code", "agreement/mean"]
    names += ["agreement/max", "seconds/sampling", "evaluation/pass@4", "evaluation/mean_length", "length"]
    names += ["uniform_groups", "expert_load/layer_1/max", "expert_load/layer_2/max", "expert_load/violation", "other"]
    names += ["evaluation/accuracy/kind/title", "routing/changed", "routing/first_layer", "refill/replaced"]
    names += ["refill/with_variance", "refill/seconds", "sync/mean", "sync/k3"]
    found = drawn(
        write_run, *({"step": s, "stage": "grpo", "time": 9.0} | dict.fromkeys(names, 1.0) for s in (1, 2, 3))
    )
    assert {title: [series.name for series in panel.series] for title, panel in found.items()} == {
        "loss": ["loss", "validation_loss"],
        "reward": ["reward"],
        "reward by component": ["exact"],
        "accuracy": ["accuracy", "accuracy/code"],
        "held-out problems by kind": ["accuracy/kind/title"],
        "held-out problems": ["pass@4"],
        "length": ["mean_length", "length"],
        "shares": ["zero_variance_groups", "refill/with_variance"],
        "groups that were replaced": ["refill/replaced"],
        "routing: shares": ["routing/changed"],
        "routing: first layer that changed": ["routing/first_layer"],
        "after a weight sync: sampler and learner": ["sync/mean"],
        "after a weight sync: k3": ["sync/k3"],
        "agreement of sampler and learner": ["mean", "max"],
        "seconds by part": ["sampling", "refill/seconds"],
        "expert_load/max": ["layer_1", "layer_2"],
        "expert_load": ["violation"],
        "other": ["other"],
    }
    assert found["agreement of sampler and learner"].log


def test_what_was_evaluated_only_before_and_after_has_no_curve(write_run: WriteRun) -> None:
    records = [{"step": s, "loss": 1.0 / (s + 1), "evaluation/accuracy": s / 9} for s in (0, 9)]
    assert drawn(write_run, *records).keys() == {"loss"}


def test_what_is_no_finite_number_is_a_gap_and_a_step_written_again_counts_anew(write_run: WriteRun) -> None:
    records = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": "nan"}, {"step": 3, "reward": "inf"}]
    records += [{"step": 1, "reward": 7.0}, {"step": 4, "note": "text", "flag": True}]
    (series,) = drawn(write_run, *records)["reward"].series
    assert (series.steps, series.values, series.last) == ([1, 2, 3], [7.0, None, None], 7.0)


def test_thinning_keeps_the_spikes_and_the_last_value() -> None:
    values: list[float | None] = [1.0] * 5000
    values[1234], values[4000] = 99.0, -99.0
    values[-3:] = 0.5, 0.75, None
    thinned = thin(Series("loss", range(5000), values), 100)
    assert thinned.last == 0.75
    assert len(thinned.steps) <= 100
    assert {99.0, -99.0} <= set(thinned.values)
    assert list(thinned.steps) == sorted(thinned.steps)
    assert thin(thinned, 100) is thinned


def test_a_page_holds_a_bounded_number_of_points(write_run: WriteRun) -> None:
    names = [f"expert_load/layer_{layer}/expert_{expert}" for layer in range(20) for expert in range(50)]
    root = write_run(metrics=[{"step": step} | dict.fromkeys(names, 0.5) for step in range(200)])
    (stage,) = as_data(read_run(root).stages)
    assert sum(len(series["steps"]) for panel in stage["panels"] for series in panel["series"]) <= POINTS_OF_A_PAGE
    assert stage["panels"][0]["thinned"]


def test_the_plot_has_rewards_accuracy_with_its_evaluations_and_agreement(write_run: WriteRun) -> None:
    records = [
        {"step": s, "reward": s / 50, "accuracy": s / 100, "agreement/mean": 1e-6, "agreement/max": 2e-5}
        for s in range(1, 101)
    ]
    records += [{"step": s, "evaluation/accuracy": s / 200} for s in range(0, 101, 2)]
    root = write_run(metrics=records)
    write_run(root / "sft", stage="sft", metrics=[{"step": 1, "loss": 3.0}])
    plot = build_plot(read_run(root))
    assert plot.title == "run: grpo"
    reward, accuracy, agreement = plot.panels
    assert [(line.name, line.last) for line in reward.lines] == [("reward", "2")]
    assert [(line.name, line.last) for line in accuracy.lines] == [("training", "100%"), ("held-out", "50%")]
    assert [(line.name, line.last) for line in agreement.lines] == [("mean", "1e-6"), ("largest", "2e-5")]
    assert [text for _, text in agreement.y_ticks] == ["1e-6", "1e-5", "1e-4"]
    assert agreement.title == AGREEMENT[0]
    # The evaluations are marked, from the first step to the last; a hundred steps of training are not.
    assert [x for x, _ in accuracy.lines[1].marks][::25] == [0, WIDTH / 2, WIDTH]
    assert not accuracy.lines[0].marks
    assert accuracy.x_ticks[0] == (0, "0")
    assert accuracy.x_ticks[-1] == (WIDTH, "100")
    assert agreement.lines[0].path.startswith(f"M{WIDTH / 100:.1f} {HEIGHT:.1f} L")


def test_a_run_without_rewards_has_its_loss_plotted_with_gaps(write_run: WriteRun) -> None:
    losses = [3.0, "nan", 2.0, 1.0]
    root = write_run(stage="sft", metrics=[{"step": s, "loss": v} for s, v in enumerate(losses)])
    (panel,) = build_plot(read_run(root)).panels
    (line,) = panel.lines
    assert [part[0] for part in line.path.split() if part[0].isalpha()] == ["M", "M", "L"]
    assert len(line.marks) == 3


def test_the_plot_of_dpo_has_the_pairs_in_the_right_order(write_run: WriteRun) -> None:
    records = [{"step": s, "loss": 0.7, "pair_accuracy": 0.5 + s / 10} for s in range(1, 5)]
    root = write_run(stage="dpo", metrics=[*records, {"step": 4, "validation_pair_accuracy": 0.75}])
    _, pairs = build_plot(read_run(root)).panels
    assert [(line.name, line.last) for line in pairs.lines] == [("training", "90%"), ("held-out", "75%")]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3), (-2.5, 7), (1e-9, 2e-9), (0, 12345)])
def test_ticks_are_round_few_and_within(low: float, high: float) -> None:
    ticks = round_numbers(low, high, 5)
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high and len(f"{tick:g}") <= 7 for tick in ticks)


def test_the_plot_is_one_small_file_that_loads_nothing(tmp_path: Path, write_run: WriteRun) -> None:
    metrics = [{"step": s, "reward": 1.0, "agreement/mean": 0.0} for s in range(20_000)]
    root = write_run(metrics=metrics, recipe={"name": EVIL})
    path = write_plot(root, tmp_path / "plots" / "run.svg")
    assert path == tmp_path / "plots" / "run.svg"
    text = path.read_text(encoding="utf-8")
    elements = list(ElementTree.fromstring(text).iter())
    assert {element.tag.rpartition("}")[2] for element in elements} == {
        *("svg", "title", "style", "rect", "g", "text", "tspan", "line", "path")
    }
    assert elements[1].text == EVIL.replace("\x00", "\ufffd").replace("\ud800", "\ufffd") + ": grpo"
    assert "prefers-color-scheme: dark" in text
    assert not any(
        word in text.replace("http://www.w3.org/2000/svg", "") for word in ("http", "url(", "@import", "href")
    )
    assert len(text) < 20_000


def test_what_cannot_be_plotted_is_refused(tmp_path: Path, write_run: WriteRun) -> None:
    root = write_run()
    with pytest.raises(UserError, match="no metrics yet"):
        write_plot(root, tmp_path / "plot.svg")
    with pytest.raises(UserError, match=r"no file NAME\.svg"):
        write_plot(root, tmp_path / "plot.png")
