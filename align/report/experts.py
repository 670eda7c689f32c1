"""The load of the experts at the beginning and at the end of each stage, layer by layer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from align.report.escape import percent, plain
from align.report.read import RunRecord, Stage, finite

OF_A_LAYER = re.compile(r"experts/layer_(\d+)/(cv|max_over_mean|dead)")
HEADS = (
    "layer",
    "variation: first step",
    "last step",
    "busiest over mean: first step",
    "last step",
    "without tokens: first step",
    "last step",
)
NOTE = (
    "Tokens of a training step that the router sent to each expert of a layer. Variation: standard deviation over mean, 0 "
    "where all experts get the same. Busiest over mean: the load of the busiest expert. Without tokens: share of experts."
)


@dataclass(frozen=True, slots=True)
class StageLoad:
    """A stage of a mixture-of-experts policy; each row is a layer, with the cells that HEADS names."""

    stage: str
    rows: list[list[str]]


def expert_loads(run: RunRecord) -> list[StageLoad]:
    """Every stage whose steps say how its experts were loaded."""
    return [StageLoad(stage.label, rows) for stage in run.stages if (rows := _rows(stage))]


def _rows(stage: Stage) -> list[list[str]]:
    steps = [found for record in stage.metrics if (found := _layers(record))]
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    rows = []
    for layer, values in sorted(last.items()):
        cells = [str(layer)]
        for name, written in (("cv", plain), ("max_over_mean", plain), ("dead", percent)):
            cells += [
                "–" if value is None else written(value) for value in (first.get(layer, {}).get(name), values.get(name))
            ]
        rows.append(cells)
    return rows


def _layers(record: Mapping[str, object]) -> dict[int, dict[str, float]]:
    layers: dict[int, dict[str, float]] = {}
    for key, raw in record.items():
        match, value = OF_A_LAYER.fullmatch(key), finite(raw)
        if match and value is not None:
            layers.setdefault(int(match[1]), {})[match[2]] = value
    return layers
