"""What a report says of a run: sections of notes and tables, which the templates set as a page and as Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from textwrap import shorten
from typing import Any

from align.report import curves, samples
from align.report.evaluations import Evaluation, column_groups, compared_evaluations
from align.report.figures import answers_section, evaluations_section, figure
from align.report.habits import Told, evaluation_habits, step_habits
from align.report.parts import Cell, Report, Section, Table, Value, percent, plain, points
from align.report.read import Record, RunRecord, Stage, at, finite, number

EVENTS_OF_A_STAGE = 200
ALARMS = ("warning", "error")
CHARACTERS_OF_A_NOTE = 120
LAYER_METRICS = {"cv": "variation", "max_over_mean": "busiest over mean", "dead": "without tokens"}
LAYER_METRIC = re.compile(rf"experts/layer_(\d+)/({'|'.join(LAYER_METRICS)})")


def build_report(run: RunRecord, *, live: bool = False) -> Report:
    """Everything that the report on a run says."""
    evaluations = compared_evaluations(run)
    habits = list(evaluation_habits(run, last=True))
    sections = [
        Section("stages", "Stages", tables=[_stages(run)]),
        evaluations_section(run, evaluations, habits),
        *_habits(run, habits),
        Section("curves", "Learning curves", only="page"),
        answers_section(run, evaluations),
        *_experts(run),
        Section("samples", "Samples", only="page"),
        *([] if live else [Section("metrics", "Last metrics", tables=_last_metrics(run), only="markdown")]),
        _events(run),
        Section("settings", "Settings", tables=[_settings(run)], only="page"),
    ]
    tiles = _tiles(run, evaluations)
    shown = {"sources": [source.named for source in samples.sources(run)]} if live else samples.as_data(run)
    state = str(run.whole.status["state"])
    told = "" if not live else "Following the run." if state == "running" else f"The run is {state}."
    return Report(run.name, str(run.path), told, tiles, sections, curves.as_data(run.stages), shown)


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested mappings and lists by dotted key; a list of plain values is one leaf."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from flatten(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{key}.{index}")
    elif key:
        yield key, _setting(value)


def _tiles(run: RunRecord, evaluations: Sequence[Evaluation]) -> list[tuple[Value, str]]:
    facts = _stage_facts(run.whole)
    resumed = any(event.get("kind") == "resumed" for stage in run.stages for event in stage.events)
    since = f"{run.whole.status['state']}, started {facts['started']}{', with interruptions' if resumed else ''}"
    # A run that goes on has taken no time yet that is known.
    tiles: list[tuple[Value, str]] = (
        [(facts["took"], since)] if facts["took"] else [(facts["steps"], f"steps; {since}")]
    )
    if evaluations:
        # What the hooks measured comes after the accuracy.
        last = next((each for each in reversed(evaluations) if "accuracy" in each.numbers), evaluations[-1])
        columns = list(chain(*column_groups([last]).values()))
        for column in dict.fromkeys(columns[:1] + [name for name in columns if name.startswith("pass@")][-1:]):
            tiles.append((figure(last, column, name_baseline=True), f"{column}, {last.name}"))
    told = [record["agreement/mean"] for stage in run.stages for record in stage.metrics if "agreement/mean" in record]
    if told:
        tiles.append((plain(number(told[-1])), "nats a token between sampler and learner, mean of the last step"))
    alarms = [event for stage in run.stages for event in stage.events if event.get("kind") in ALARMS]
    latest = max(alarms, key=lambda event: number(event.get("time")) or 0.0, default={})
    message = shorten(str(latest.get("message", "")), CHARACTERS_OF_A_NOTE, placeholder=" […]")
    note = f"the last: {message}" if message else ""
    return [*tiles, (Cell(str(len(alarms)), note=note, tone="bad"), "warnings and errors")]


def _stages(run: RunRecord) -> Table:
    facts = [_stage_facts(stage) for stage in run.stages]
    return Table(list(facts[0]), [list(fact.values()) for fact in facts], kind="facts")


def _stage_facts(stage: Stage) -> dict[str, Value]:
    """A stage as a row of a table."""
    recipe = stage.recipe
    done = max((step for record in stage.metrics if isinstance(step := record.get("step"), int)), default=0)
    planned = at(recipe, str(recipe.get("stage")), "steps")
    data = recipe.get("data")
    entries = data if isinstance(data, list) else [data]
    names = [str(name) for entry in entries if (name := at(entry, "card") or at(entry, "path"))]
    return {
        "stage": stage.label,
        "state": _state(stage),
        "started": str(stage.status.get("started") or "").replace("T", " ").replace("+00:00", " UTC"),
        "took": _took(stage.status),
        "steps": f"{done} of {planned}" if planned is not None else done,
        "model": stage.model_path or None,
        "data": ", ".join(names) or None,
        "learning rate": plain(number(at(recipe, "learner", "optimizer", "learning_rate"))),
        "seed": str(recipe.get("seed", "–")),
    }


def _state(stage: Stage) -> Cell:
    """How the stage ended, with its error; a run that was killed still calls itself running."""
    state, error = str(stage.status["state"]), stage.status.get("error")
    text = f"{state}: {error}" if error else state
    if state == "running":
        times = [time for record in stage.metrics if (time := number(record.get("time"))) is not None]
        text = f"running, or killed (last metrics: {_time(times[-1]) if times else 'none'})"
    return Cell(text, f"state-{state}{' long' if len(text) > 40 else ''}")


def _experts(run: RunRecord) -> list[Section]:
    """The load of the experts at the first and at the last step of each stage, layer by layer, where it was measured."""
    heads = ["layer", *chain(*((f"{told}: first step", "last step") for told in LAYER_METRICS.values()))]
    tables = []
    for stage in run.stages:
        if steps := [found for record in stage.metrics if (found := _layers(record))]:
            rows: list[list[Value]] = []
            for layer in sorted({layer for layer, _ in steps[-1]}):
                measured = [(name, step.get((layer, name))) for name in LAYER_METRICS for step in (steps[0], steps[-1])]
                rows.append([layer, *((percent if name == "dead" else plain)(value) for name, value in measured)])
            tables.append(Table(heads, rows, title=stage.label, kind="facts", numbers=range(len(heads))))
    note = (
        "Tokens of a training step that the router sent to each expert of a layer. Variation: standard deviation over mean, 0 "
        "where all experts get the same. Busiest over mean: the load of the busiest expert. Without tokens: share of experts."
    )
    return [Section("experts", "Expert load", note, tables)] if tables else []


def _habits(run: RunRecord, of_evaluations: Sequence[Told]) -> list[Section]:
    """What each evaluation has that the first had not, and the last steps of each stage against its first ones."""
    told = [*of_evaluations, *(each for stage in run.stages for each in step_habits(stage, last=True))]
    if not told:
        return []
    note = (
        "What the answers took up or lost against the start, found in the texts, with two examples each: of the later answers where it was taken up, of the "
        "earlier where it was lost. The change of the share is in percentage points, with its 95 % confidence interval."
    )
    heads = ["habit", "change", "examples"]
    return [
        Section(
            "habits",
            "Habits",
            note,
            [Table(heads, _habit_rows(each), title=f"{each.name}, against {each.against}") for each in told],
        )
    ]


def _habit_rows(told: Told) -> list[list[Value]]:
    length = told.found.length
    rows: list[list[Value]] = [[length.sentence, None, None]] if length.changed else []
    for habit in told.found.habits:
        interval = f"{points(habit.after - habit.before)} ({' to '.join(map(points, habit.interval))})"
        rows.append([habit.sentence, interval, Cell("\n".join(habit.examples), "text")])
    return rows or [["no habit taken up or lost", None, None]]


def _last_metrics(run: RunRecord) -> list[Table]:
    rows = {
        stage.label: [
            (panel.title, series.name, plain(series.last))
            for panel in curves.panels(stage)
            for series in panel.series
            if series.last is not None
        ]
        for stage in run.stages
    }
    return [Table(["group", "metric", "last"], found, title=label) for label, found in rows.items() if found]


def _events(run: RunRecord) -> Section:
    """The events and remarks of all stages; where a stage has too many, alarms are kept first."""
    rows: list[list[Value]] = []
    left_out = 0
    for stage in run.stages:
        rows += [[stage.label, "", "remark", remark] for remark in stage.remarks]
        alarms_first = sorted(stage.events, key=lambda event: event.get("kind") not in ALARMS)
        left_out += len(alarms_first[EVENTS_OF_A_STAGE:])
        for event in sorted(alarms_first[:EVENTS_OF_A_STAGE], key=lambda event: number(event.get("time")) or 0.0):
            kind, message = str(event.get("kind", "")), str(event.get("message", ""))
            more = "; ".join(
                f"{key}: {value}" for key, value in event.items() if key not in ("time", "kind", "message")
            )
            kind_class = f"kind-{kind}" if kind.isalpha() else ""
            time = _time(number(event.get("time")))
            rows.append([stage.label, time, Cell(kind, kind_class), f"{message} ({more})" if more else message])
    note = f"{left_out} more in events.jsonl." if left_out else "" if rows else "Nothing was noted."
    tables = [Table(["stage", "time", "kind", "message"], rows)] if rows else []
    return Section("events", "Warnings and events", note, tables)


def _settings(run: RunRecord) -> Table:
    """The recipes and then the environments, key by key; a value that a stage lacks is empty, and no difference."""
    rows = []
    for prefix, name in (("", "recipe"), ("environment.", "environment")):
        flat = [dict(flatten(getattr(stage, name))) for stage in run.stages]
        for key in dict.fromkeys(chain(*flat)):
            values = [each.get(key, "") for each in flat]
            kind = "differs" if len({value for value in values if value}) > 1 else ""
            rows.append([Cell(prefix + key, f"key {kind}"), *(Cell(value, kind) for value in values)])
    return Table(["key", *(stage.label for stage in run.stages)], rows)


def _layers(record: Record) -> dict[tuple[int, str], float]:
    matches = ((LAYER_METRIC.fullmatch(key), finite(value)) for key, value in record.items())
    return {(int(match[1]), match[2]): value for match, value in matches if match and value is not None}


def _setting(value: Any) -> str:
    if isinstance(value, list | Mapping):
        return ", ".join(map(_setting, value)) or "none"
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _took(status: Record) -> str | None:
    try:
        started, ended = (datetime.fromisoformat(str(status.get(key))) for key in ("started", "ended"))
        return str(ended - started)
    except (ValueError, TypeError):
        return None


def _time(seconds: float | None) -> str:
    """A time in seconds since 1970 as people write it; "" for none and for one that is no time."""
    known = seconds is not None and abs(seconds) < 1e11
    return f"{datetime.fromtimestamp(seconds or 0.0, UTC):%Y-%m-%d %H:%M:%S} UTC" if known else ""
