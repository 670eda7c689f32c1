"""What the page and the Markdown file both tell of a run: states, settings, last metrics, warnings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

from align.report.curves import panels
from align.report.escape import plain
from align.report.read import RunRecord, Stage, number

EVENTS_OF_A_STAGE = 200
ALARMS = ("warning", "error")


@dataclass(frozen=True, slots=True)
class Event:
    """One line of events.jsonl, or a remark of the reader."""

    stage: str
    time: str
    kind: str
    message: str


def stage_facts(stage: Stage) -> dict[str, str]:
    """A stage in a row of a table."""
    recipe = stage.recipe
    steps = [step for record in stage.metrics if isinstance(step := record.get("step"), int)]
    planned = _at(recipe, str(recipe.get("stage")), "steps")
    done = str(max(steps, default=0))
    return {
        "stage": stage.label,
        "state": state(stage),
        "started": _moment(stage.status.get("started")),
        "took": _took(stage),
        "steps": f"{done} of {planned}" if planned is not None else done,
        "model": str(_at(recipe, "model", "path") or "–"),
        "data": _cards(recipe.get("data")),
        "learning rate": _number(_at(recipe, "learner", "optimizer", "learning_rate")),
        "seed": str(recipe.get("seed", "–")),
    }


def state(stage: Stage) -> str:
    """How the stage ended, with its error; a run that is killed still says that it is running."""
    said = str(stage.status.get("state"))
    if said == "running":
        times = [time for record in stage.metrics if (time := number(record.get("time"))) is not None]
        last = datetime.fromtimestamp(times[-1], UTC).isoformat(timespec="seconds") if times else None
        return f"running, or killed (last metrics: {_moment(last) if last else 'none'})"
    error = stage.status.get("error")
    return f"{said}: {error}" if error else said


def settings(run: RunRecord) -> list[tuple[str, list[str], bool]]:
    """(key, the value in each stage, whether stages differ) of the recipes and then of the environments.

    A stage whose file has no such key has an empty value, which is no difference.
    """
    rows = []
    for name, mappings in (
        ("", [stage.recipe for stage in run.stages]),
        ("environment.", [stage.environment for stage in run.stages]),
    ):
        flat = [dict(flatten(mapping)) for mapping in mappings]
        for key in dict.fromkeys(key for each in flat for key in each):
            values = [each.get(key, "") for each in flat]
            rows.append((name + key, values, len({value for value in values if value}) > 1))
    return rows


def flatten(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested mappings and lists by dotted key; a list of plain values is one leaf."""
    nested = isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{at}.{key}" if at else str(key))
    elif nested:
        for index, item in enumerate(value):
            yield from flatten(item, f"{at}.{index}")
    elif at:
        yield at, _text(value)


def last_metrics(stage: Stage) -> list[tuple[str, str, str]]:
    """(panel, metric, last value) of every metric."""
    return [
        (panel.title, series.name, plain(series.last))
        for panel in panels(stage)
        for series in panel.series
        if series.last is not None
    ]


def last_value(run: RunRecord, metric: str) -> float | None:
    """The last value of `metric` in the last stage that has it."""
    for stage in reversed(run.stages):
        for record in reversed(stage.metrics):
            value = number(record.get(metric))
            if value is not None:
                return value
    return None


def events(run: RunRecord) -> tuple[list[Event], int]:
    """The events and remarks of all stages, and how many more there are that are left out here."""
    shown: list[Event] = []
    left_out = 0
    for stage in run.stages:
        shown += [Event(stage.label, "", "remark", remark) for remark in stage.remarks]
        # Alarms first, should there be too many to show.
        ordered = sorted(stage.events, key=lambda event: event.get("kind") not in ALARMS)
        left_out += max(0, len(ordered) - EVENTS_OF_A_STAGE)
        kept = sorted(ordered[:EVENTS_OF_A_STAGE], key=lambda event: number(event.get("time")) or 0.0)
        shown += [_event(stage, record) for record in kept]
    return shown, left_out


def alarms(run: RunRecord) -> int:
    """How many warnings and errors the run has."""
    return sum(event.get("kind") in ALARMS for stage in run.stages for event in stage.events)


def duration(seconds: float) -> str:
    """A time in its two greatest units."""
    rest = round(seconds)
    for (size, unit), (smaller, small_unit) in pairwise(((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))):
        if rest >= size:
            return f"{rest // size} {unit} {rest % size // smaller} {small_unit}"
    return f"{rest} s"


def _event(stage: Stage, record: Mapping[str, Any]) -> Event:
    told = number(record.get("time"))
    time = (
        datetime.fromtimestamp(told, UTC).isoformat(timespec="seconds") if told is not None and abs(told) < 1e11 else ""
    )
    more = {key: value for key, value in record.items() if key not in ("time", "kind", "message")}
    extra = "; ".join(f"{key}: {value}" for key, value in more.items())
    message = str(record.get("message", ""))
    return Event(stage.label, _moment(time), str(record.get("kind", "")), f"{message} ({extra})" if extra else message)


def _took(stage: Stage) -> str:
    try:
        started, ended = (datetime.fromisoformat(str(stage.status.get(key))) for key in ("started", "ended"))
        return duration((ended - started) / timedelta(seconds=1))
    except (ValueError, TypeError):
        return "–"


def _moment(iso: object) -> str:
    """A moment as people write it; "" for none."""
    return str(iso or "").replace("T", " ").replace("+00:00", " UTC")


def _cards(data: Any) -> str:
    entries = data if isinstance(data, list) else [data]
    return ", ".join(str(card) for entry in entries if (card := _at(entry, "card"))) or "–"


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _number(value: Any) -> str:
    found = number(value)
    return "–" if found is None else plain(found)


def _text(value: Any) -> str:
    if isinstance(value, list | Mapping):
        items: Sequence[Any] = list(value)
        return ", ".join(map(_text, items)) if items else "none"
    return (
        {None: "none", True: "yes", False: "no"}.get(value, str(value)) if value in (None, True, False) else str(value)
    )
