"""What a report says of a run: sections of notes and tables, which the templates set as a page and as Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, zip_longest
from math import isfinite
from textwrap import shorten
from typing import Any, Literal

from align.report import curves, samples
from align.report.evaluations import Evaluation, column_groups, compared_evaluations, find_pairs, published_figures
from align.report.habits import Told, evaluation_habits, step_habits
from align.report.read import Record, RunRecord, Stage, at, finite, number
from align.run.progress import compact

EVENTS_OF_A_STAGE = 200
ALARMS = ("warning", "error")
SHOWN_PAIRS = 16
# (right before, right after): newly right, newly wrong, wrong both times, right both times.
OUTCOMES = ((False, True), (True, False), (False, False), (True, True))
CHARACTERS_OF_AN_ANSWER = 1200
CHARACTERS_OF_A_NOTE = 120
VERDICTS = ("pass", "wrong", "no_answer")
SHARES = re.compile(r"(accuracy|truncated)(/.*)?|pass@.*|.*_(rate|share)|[^/]+/(acc|acc_norm|exact_match)(/.*)?")
LAYER_METRICS = {"cv": "variation", "max_over_mean": "busiest over mean", "dead": "without tokens"}
LAYER_METRIC = re.compile(rf"experts/layer_(\d+)/({'|'.join(LAYER_METRICS)})")

Tone = Literal["", "good", "bad"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A text with a note behind it, which is good or bad news or neither.

    `kind` are CSS classes of the page, `bar` the segments (class, start, width in percent) of a bar over the text.
    """

    text: str
    kind: str = ""
    note: str = ""
    tone: Tone = ""
    bar: Sequence[tuple[str, float, float]] = ()

    def __str__(self) -> str:
        return self.text


# What stands in a table: None for a value that is not known.
Value = Cell | str | int | None


@dataclass(frozen=True, slots=True)
class Table:
    """`heads` [N], of which those in `numbers` are numeric, over `rows` [M][N]; `note` and `url` stand below.

    `groups` are (name, number of columns) over the heads.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Value]]
    title: str = ""
    note: str = ""
    url: str = ""
    kind: str = ""
    numbers: range = range(0)
    groups: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report; `only` names the one medium that has it, if not both."""

    key: str
    title: str
    note: str = ""
    tables: Sequence[Table] = ()
    only: Literal["", "page", "markdown"] = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The whole report. `tiles` are the key figures with their labels; `curves` and `samples` are the script's data.

    `live` says how the run is, in a page that follows it; such a page has of the samples only which there are. Else it is empty.
    """

    name: str
    path: str
    live: str
    tiles: Sequence[tuple[Value, str]]
    sections: Sequence[Section]
    curves: Sequence[Mapping[str, Any]]
    samples: Mapping[str, Any]


def build_report(run: RunRecord, *, live: bool = False) -> Report:
    """Everything that the report on a run says."""
    evaluations = compared_evaluations(run)
    sections = [
        Section("stages", "Stages", tables=[_stages(run)]),
        _evaluations(run, evaluations),
        *_habits(run),
        Section("curves", "Learning curves", only="page"),
        _before_and_after(run, evaluations),
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


def percent(value: float | None) -> str:
    """A share of 1 in percent; a dash for None and what is not finite."""
    return f"{value:.1%}" if value is not None and isfinite(value) else "–"


def plain(value: float | None) -> str:
    """Any other number in a few digits; a dash for None and what is not finite."""
    return compact(value) if value is not None and isfinite(value) else "–"


def signed(value: float, form: str) -> str:
    """A difference with its sign, a true minus; zero has none."""
    text = f"{abs(value):{form}}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return signed(100 * value, ".1f")


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
    since = f"{run.whole.status['state']}, started {facts['started']}"
    # A run that goes on has taken no time yet that is known.
    tiles: list[tuple[Value, str]] = (
        [(facts["took"], since)] if facts["took"] else [(facts["steps"], f"steps; {since}")]
    )
    if evaluations:
        # What the hooks measured comes after the accuracy.
        last = next((each for each in reversed(evaluations) if "accuracy" in each.numbers), evaluations[-1])
        columns = list(chain(*column_groups([last]).values()))
        for column in dict.fromkeys(columns[:1] + [name for name in columns if name.startswith("pass@")][-1:]):
            tiles.append((_figure(last, column, name_baseline=True), f"{column}, {last.name}"))
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
    cards = [str(card) for entry in (data if isinstance(data, list) else [data]) if (card := at(entry, "card"))]
    return {
        "stage": stage.label,
        "state": _state(stage),
        "started": str(stage.status.get("started") or "").replace("T", " ").replace("+00:00", " UTC"),
        "took": _took(stage.status),
        "steps": f"{done} of {planned}" if planned is not None else done,
        "model": stage.model_path or None,
        "data": ", ".join(cards) or None,
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


def _evaluations(run: RunRecord, evaluations: Sequence[Evaluation]) -> Section:
    groups = column_groups(evaluations)
    columns = list(chain(*groups.values()))
    note = (
        "Each number has its change against the last evaluation of the stage before (in the first stage, against its "
        "first), shares in percentage points, with the 95 % confidence interval in parentheses."
    )
    methods = dict.fromkeys(c.method for each in evaluations for c in each.changes.values() if c.method)
    table = Table(
        ["stage", "evaluation", "step", "problems", *columns, "verdicts (greedy)"],
        [
            [
                *(each.stage.label, each.name, each.step, each.problems),
                *(_figure(each, column) for column in columns),
                _verdicts(each.verdicts),
            ]
            for each in evaluations
        ],
        note=note + "".join(f" {method[0].upper()}{method[1:]}." for method in methods),
        kind="facts",
        numbers=range(2, 4 + len(columns)),
        groups=[("", 4), *((name, len(group)) for name, group in groups.items()), ("", 1)],
    )
    model = published_figures(run)
    tables = ([table] if evaluations else []) + ([_published(model)] if model else [])
    return Section("evaluations", "Evaluations", "" if evaluations else "This run has no evaluations.", tables)


def _figure(evaluation: Evaluation, column: str, *, name_baseline: bool = False) -> Cell | None:
    """A number of an evaluation, with its change as the note; `name_baseline` adds what the change is against."""
    value, change = evaluation.numbers.get(column), evaluation.changes.get(column)
    if value is None:
        return None
    share = SHARES.fullmatch(column) is not None
    text = percent(value) if share else plain(value)
    if change is None:
        return Cell(text)
    note = points(change.difference) if share else signed(change.difference, ".4g")
    tone: Tone = ""
    if change.interval:
        low, high = change.interval
        note += f" ({points(low)} to {points(high)})"
        tone = "good" if low > 0 else "bad" if high < 0 else ""
    return Cell(text, note=f"{note} against {evaluation.against}" if name_baseline else note, tone=tone)


def _verdicts(verdicts: Sequence[tuple[str, int]]) -> Cell:
    total = sum(count for _, count in verdicts)
    bar, start = [], 0.0
    for name, count in sorted(verdicts, key=lambda item: item[0] != "pass") if total > 0 else ():
        bar.append((name if name in VERDICTS else "other", start, 100 * count / total))
        start += 100 * count / total
    return Cell(", ".join(f"{count} {name}" for name, count in verdicts), "wide", bar=bar)


def _published(model: Mapping[str, Any]) -> Table:
    columns: Mapping[str, Mapping[str, float]] = model["figures"]
    benchmarks = dict.fromkeys(name for figures in reversed(list(columns.values())) for name in figures)
    return Table(
        ["benchmark", *columns],
        [[name, *(plain(figures.get(name)) for figures in columns.values())] for name in benchmarks],
        title=f"Published for {model['name']}",
        note=f"{model['source']}. {model['note']}",
        url=model["url"],
        kind="narrow",
        numbers=range(1, 1 + len(columns)),
    )


def _before_and_after(run: RunRecord, evaluations: Sequence[Evaluation]) -> Section:
    """Problems that were answered twice: newly right, newly wrong, wrong and right both times, in turn."""
    key, title = "compared", "Before and after"
    found = find_pairs(evaluations)
    if found is None:
        return Section(key, title, "No two evaluations of this run answered the same problems.", only="page")
    first, last, pairs = found
    by_outcome: dict[Any, list[tuple[Record, Record]]] = {outcome: [] for outcome in OUTCOMES}
    for pair in pairs:
        by_outcome[tuple(answer.get("verdict") == "pass" for answer in pair)].append(pair)
    chosen = [pair for pair in chain(*zip_longest(*by_outcome.values())) if pair is not None][:SHOWN_PAIRS]
    gained, lost, _, kept = map(len, by_outcome.values())
    note = (
        f"Greedy answers to the same held-out problems. Of {len(pairs)}, {gained} became right and {lost} "
        f"wrong; {kept} were right both times. Shown are {len(chosen)}, newly right, newly wrong and unchanged ones in turn."
    )
    names = [f"{each.stage.label}: {each.name}" if len(run.stages) > 1 else each.name for each in (first, last)]
    rows = [[Cell(_cut(after.get("prompt")), "text"), _answer(before), _answer(after)] for before, after in chosen]
    return Section(key, title, note, [Table(["prompt", *names], rows, kind="compared")], only="page")


def _answer(row: Record) -> Cell:
    verdict, detail = str(row.get("verdict") or ""), row.get("detail")
    note = _cut(f"{verdict}: {detail}" if detail else verdict)
    return Cell(_cut(row.get("completion")), "text", note, "good" if verdict == "pass" else "bad")


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


def _habits(run: RunRecord) -> list[Section]:
    """What each evaluation has that the first had not, and the last steps of each stage against its first ones."""
    told = [
        *evaluation_habits(run, last=True),
        *(each for stage in run.stages for each in step_habits(stage, last=True)),
    ]
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


def _cut(text: object) -> str:
    given = "" if text is None else str(text)
    return given if len(given) <= CHARACTERS_OF_AN_ANSWER else f"{given[:CHARACTERS_OF_AN_ANSWER]} […]"
