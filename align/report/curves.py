"""Learning curves: which metrics of a stage share a panel, and their points, thinned where there are too many."""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from align.report.read import Record, Stage, finite, number

MOST_POINTS = 1_000
LEAST_POINTS = 40
POINTS_OF_A_PAGE = 150_000
WRITTEN_BY_THE_LOG = ("step", "stage", "time")
DROPPED_PREFIXES = ("reward", "seconds", "agreement", "evaluation", "experts")

# (title, unit, logarithmic, metrics): a metric goes to the first panel whose pattern it matches.
PANELS = (
    ("loss", "", False, r"loss|.*_loss"),
    ("reward", "", False, r"reward|reward_std"),
    ("reward by component", "", False, r"reward/.*"),
    ("accuracy", "", False, r"accuracy|accuracy/.*"),
    ("held-out problems by kind", "", False, r"evaluation/accuracy/.*"),
    ("held-out problems", "", False, r"evaluation/(?!mean_length).*"),
    ("problems by which checkpoints are chosen, by kind", "", False, r"validation/accuracy/.*"),
    ("held-out problems by which checkpoints are chosen", "", False, r"validation/(?!mean_length).*"),
    ("length", "tokens", False, r"length|length_max|(evaluation|validation)/mean_length"),
    ("shares", "", False, r"truncated|zero_variance_groups|not_judged|trained_on|clip_fraction|refill/with_variance"),
    ("groups that were replaced", "", False, r"refill/replaced"),
    ("routing: shares", "", False, r"routing/(changed|undecided|fell_back|prompt_changed)"),
    ("routing: first layer that changed", "", False, r"routing/first_layer"),
    ("after a weight sync: sampler and learner", "nats", True, r"sync/(mean|max)"),
    ("after a weight sync: k3", "nats", True, r"sync/k3"),
    ("agreement of sampler and learner", "nats", True, r"agreement/(mean|max)"),
    ("agreement: k3", "nats", True, r"agreement/k3"),
    ("agreement: share of tokens equal to the last bit", "", False, r"agreement/equal"),
    ("KL to the reference", "nats a token", False, r"kl|kl/.*"),
    ("KL to the teacher", "nats a token", False, r"distill/kl"),
    ("entropy", "nats", False, r"entropy"),
    ("expert load", "", False, r"experts/[^/]*"),
    ("gradient norm", "", False, r"gradient_norm"),
    ("learning rate", "", False, r"learning_rate"),
    ("seconds by part", "s", False, r"seconds/.*|(.*/|step_)seconds"),
    ("throughput", "tokens/s", False, r"(.*_)?tokens_per_second"),
)


@dataclass(frozen=True, slots=True)
class Series:
    """One metric: `values` [N] at `steps` [N], in rising order; a value that is not a finite number is None."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]

    @property
    def last(self) -> float | None:
        return next((value for value in reversed(self.values) if value is not None), None)


@dataclass(slots=True)
class Panel:
    """Metrics that are drawn in one chart."""

    title: str
    unit: str = ""
    log: bool = False
    series: list[Series] = field(default_factory=list)


def panels(stage: Stage) -> list[Panel]:
    """Every numeric metric of a stage, in panels: those of PANELS first, then the others by their prefix.

    What was evaluated only before and after the stage is left out: the report has a table of that.
    """
    known = {title: Panel(title, unit, log) for title, unit, log, _ in PANELS}
    others: dict[str, Panel] = {}
    for metric, series in metric_series(stage.metrics).items():
        if metric.startswith("evaluation/") and len(series.steps) <= 2:
            continue
        title, name = _place(metric)
        panel = known.get(title) or others.setdefault(title, Panel(title))
        panel.series.append(replace(series, name=name))
    return [panel for panel in (*known.values(), *others.values()) if panel.series]


def metric_series(metrics: Iterable[Record]) -> dict[str, Series]:
    """Each numeric metric by its name; where a step was written twice, as after a resumed run, the later one counts."""
    points: dict[str, dict[int, float | None]] = {}
    for record in metrics:
        step = record.get("step")
        if not isinstance(step, int):
            continue
        for key, raw in record.items():
            if number(raw) is not None and key not in WRITTEN_BY_THE_LOG:
                points.setdefault(key, {})[step] = finite(raw)
    ordered = {key: dict(sorted(found.items())) for key, found in points.items()}
    return {key: Series(key, list(found), list(found.values())) for key, found in ordered.items()}


def as_data(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The curves of every stage that has some, for the page's script."""
    drawn = [(stage.label, found) for stage in stages if (found := panels(stage))]
    lines = sum(len(panel.series) for _, found in drawn for panel in found)
    limit = max(LEAST_POINTS, min(MOST_POINTS, POINTS_OF_A_PAGE // max(lines, 1)))
    return [{"label": label, "panels": [_panel_data(panel, limit) for panel in found]} for label, found in drawn]


def thin(series: Series, limit: int) -> Series:
    """At most `limit` points, three at least: the least and the greatest of each stretch of the series, so that no spike is lost, and the last one."""
    if len(series.steps) <= limit:
        return series
    stretches = max((limit - 1) // 2, 1)
    bounds = [round(i * len(series.steps) / stretches) for i in range(stretches + 1)]
    kept: list[int] = []
    for start, end in itertools.pairwise(bounds):
        measured = [(value, i) for i in range(start, end) if (value := series.values[i]) is not None]
        kept += sorted({min(measured)[1], max(measured)[1]}) if measured else [start]
    last = max((i for i, value in enumerate(series.values) if value is not None), default=kept[-1])
    kept = sorted({*kept, last})
    return Series(series.name, [series.steps[i] for i in kept], [series.values[i] for i in kept])


def _place(key: str) -> tuple[str, str]:
    """The title of a metric's panel, and its name there."""
    prefix, _, rest = key.partition("/")
    for title, _, _, pattern in PANELS:
        if re.fullmatch(pattern, key):
            return title, rest if rest and prefix in DROPPED_PREFIXES else key
    if not rest:
        return key, key
    # Of expert_load/layer_3/max, what is counted (layer_3) makes the lines, what is measured (max) the panel.
    parts = rest.split("/")
    counted = [part for part in parts if re.search(r"\d", part)] or parts[-1:]
    return "/".join([prefix, *(part for part in parts if part not in counted)]), "/".join(counted)


def _panel_data(panel: Panel, limit: int) -> dict[str, Any]:
    thinned = [thin(series, limit) for series in panel.series]
    rounded = [replace(s, values=[None if v is None else float(f"{v:.5g}") for v in s.values]) for s in thinned]
    return asdict(replace(panel, series=rounded)) | {"thinned": thinned != panel.series}
