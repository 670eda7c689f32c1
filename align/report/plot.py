"""One plot of a run for a README: reward, accuracy and agreement side by side, as geometry that plot.svg draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10

from align.errors import UserError
from align.report.curves import Series, metric_series, thin
from align.report.parts import plain
from align.report.read import RunRecord

WIDTH, HEIGHT = 232, 150
MOST_POINTS = 300
MOST_MARKS = 25
TICKS = 5
# (title, logarithmic, {metric: its name in the legend}): a panel is drawn if the stage has one of its metrics.
REWARD = ("reward, mean of the step", False, {"reward": "reward"})
LOSS = ("loss", False, {"loss": "training", "validation_loss": "validation"})
ACCURACY = ("accuracy", False, {"accuracy": "training", "evaluation/accuracy": "held-out"})
PAIRS = ("pairs in the right order", False, {"pair_accuracy": "training", "validation_pair_accuracy": "held-out"})
SHARES = (ACCURACY[0], PAIRS[0])
AGREEMENT = ("sampler–learner gap, nats/token", True, {"agreement/mean": "mean", "agreement/max": "largest"})


@dataclass(frozen=True, slots=True)
class Line:
    """A metric as an SVG path, with its name and last value, and (x, y) of the points to mark: evaluations, and where they are few."""

    name: str
    last: str
    path: str
    marks: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class PlotPanel:
    """One panel, in pixels from its top left corner; ticks are (place, label)."""

    title: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True)
class Plot:
    """The panels of one stage, to be drawn in a row, each `width` by `height` pixels."""

    title: str
    panels: Sequence[PlotPanel]
    width: int = WIDTH
    height: int = HEIGHT


def build_plot(run: RunRecord) -> Plot:
    """The plot of the run's last stage with rewards, else of its last with metrics. Raises UserError without metrics."""
    by_stage = [(stage, found) for stage in run.stages if (found := metric_series(stage.metrics))]
    if not by_stage:
        raise UserError(f"{run.path} has no metrics yet, so there is nothing to plot")
    stage, series = next((each for each in reversed(by_stage) if "reward" in each[1]), by_stage[-1])
    steps = [step for each in series.values() for step in each.steps]
    panels = []
    for title, log, names in (REWARD if "reward" in series else LOSS, PAIRS, ACCURACY, AGREEMENT):
        shown = {name: thin(series[metric], MOST_POINTS) for metric, name in names.items() if metric in series}
        if shown:
            panels.append(_panel(title, log, shown, min(steps), max(*steps, min(steps) + 1)))
    return Plot(f"{run.name}: {stage.label}", panels)


def round_numbers(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    power = 10 ** floor(log10((high - low) / count))
    width = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * count >= high - low)
    return [float(f"{i * width:.12g}") for i in range(ceil(low / width), floor(high / width) + 1)]


def _panel(title: str, log: bool, series: Mapping[str, Series], first: int, last: int) -> PlotPanel:
    """`series` by their names over the steps `first` to `last`; on a log scale, only positive values have a place."""
    heights = {
        name: [None if v is None or (log and v <= 0) else log10(v) if log else v for v in each.values]
        for name, each in series.items()
    }
    known = [height for found in heights.values() for height in found if height is not None] or [0.0]
    low, high = min(known), max(known)
    if log:
        low, high = floor(low), max(ceil(high), floor(low) + 1)
        ticks = [(float(power), f"1e{power}") for power in range(int(low), int(high) + 1, ceil((high - low) / TICKS))]
    else:
        margin = (high - low) * 0.05 or abs(high) * 0.1 or 0.5
        low, high = low - margin if low < 0 or low > margin else 0.0, high + margin
        ticks = [(tick, _text(title, tick)) for tick in round_numbers(low, high, TICKS)]

    def x(step: float) -> float:
        return WIDTH * (step - first) / (last - first)

    def y(height: float) -> float:
        return HEIGHT * (high - height) / (high - low)

    lines = []
    for name, each in series.items():
        points = [None if h is None else (x(step), y(h)) for step, h in zip(each.steps, heights[name], strict=True)]
        path = " ".join(
            "" if point is None else f"{'L' if before else 'M'}{point[0]:.1f} {point[1]:.1f}"
            for before, point in pairwise([None, *points])
        )
        marked = name == "held-out" or len(points) <= MOST_MARKS
        marks = [point for point in points if point is not None] if marked else []
        lines.append(Line(name, _text(title, each.last), path, marks))
    steps = [(x(step), plain(int(step))) for step in round_numbers(first, last, TICKS) if step.is_integer()]
    return PlotPanel(title, steps, [(y(height), text) for height, text in ticks], lines)


def _text(title: str, value: float | None) -> str:
    return f"{100 * value:.3g}%" if title in SHARES and value is not None else plain(value)
