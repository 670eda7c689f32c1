"""The figures of a report: evaluations in short, all that was measured before and after a stage, answers before and after."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

from align.report.evaluations import (
    Change,
    Evaluation,
    column_groups,
    find_pairs,
    is_right,
    is_scored,
    published_figures,
)
from align.report.habits import Told
from align.report.parts import Cell, Section, Table, Tone, Value, percent, plain, points, signed
from align.report.read import Record, RunRecord, Stage

SHOWN_PAIRS = 16
# (right before, right after): newly right, newly wrong, wrong both times, right both times.
OUTCOMES = ((False, True), (True, False), (False, False), (True, True))
CHARACTERS_OF_AN_ANSWER = 1200
VERDICTS = ("pass", "wrong", "no_answer")
SHARES = re.compile(
    r"(accuracy|truncated)(/.*)?|pass@.*|.*_(rate|share)(_sampled)?|(over_)?refusals|preference/(accuracy.*|longer|shorter|calibration_error)"
    r"|[^/]+/(acc|acc_norm|exact_match)(/.*)?"
)
GAINS, LOSSES = r"accuracy(/.*)?|pass@.*", r"truncated|degenerate_share"
"""Columns of which more is good news, and bad news."""


def evaluations_section(run: RunRecord, evaluations: Sequence[Evaluation], habits: Sequence[Told]) -> Section:
    """All evaluations of held-out problems in short, and then all figures of the last one of each stage."""
    answered = [each for each in evaluations if not each.hook]
    groups = column_groups(answered)
    columns = [*groups.get("right answers", ())[:1], *groups.get("sampled", ())]
    table = Table(
        ["stage", "evaluation", "step", "problems", *columns, "verdicts (greedy)"],
        [
            [
                *(each.stage.label, each.name, each.step, each.problems),
                *(figure(each, column) for column in columns),
                _verdicts(each.verdicts),
            ]
            for each in answered
        ],
        note="Each number has its change against the last evaluation of the same problems in the stage before, or else the first one in its own "
        "stage (where there is none, against one of other problems), shares in percentage points, with the 95 % confidence interval in parentheses.",
        kind="facts",
        numbers=range(2, 4 + len(columns)),
    )
    model = published_figures(run)
    tables = [
        *([table] if columns else []),
        *(each for stage in run.stages if (each := _figures(run, stage, evaluations, habits))),
        *([_published(model)] if model else []),
    ]
    return Section("evaluations", "Evaluations", "" if evaluations else "This run has no evaluations.", tables)


def _figures(run: RunRecord, stage: Stage, evaluations: Sequence[Evaluation], habits: Sequence[Told]) -> Table | None:
    """Every figure of the last evaluation of a stage, of what its hooks measured and of the habits, before and after; None without one."""
    made = [each for each in evaluations if each.stage is stage]
    answered = [each for each in made if not each.hook]
    # Those by which a checkpoint is chosen are only the last resort.
    last = [each for each in answered if each.split is None][-1:] or answered[-1:]
    shown = [*last, *{each.hook: each for each in made if each.hook}.values()]
    if not shown:
        return None
    before, after = (last[0].before if last else None), (last[0].name if last else "after")
    heads = ["", "n", before.name if before else "before", after, "change"]
    rows: list[Sequence[Value]] = []
    for each in shown:
        for group, columns in {each.hook: list(each.numbers)}.items() if each.hook else column_groups([each]).items():
            rows.append([group])
            rows += [_figure_row(each, column) for column in columns]
    told = [each for each in habits for one in last if each.name == run.title_of(stage, one.name)]
    rows += [row for each in told for row in _habit_figures(each)]
    methods = dict.fromkeys(c.method for each in shown for c in each.changes.values() if c.method)
    note = (
        "n: of how many problems. Below each number stands its 95 % confidence interval, where the answers give one; changes of "
        "shares are in percentage points."
    )
    note += "".join(f" {method[0].upper()}{method[1:]}." for method in methods)
    if not told and not any(each.before for each in shown):
        heads, rows = [*heads[:2], after], [[*row[:2], *row[3:4]] for row in rows]
    title = f"{run.title_of(stage, after)}{f', against {before.name}' if before else ''}"
    return Table(heads, rows, title=title, note=note, kind="figures", numbers=range(1, len(heads)))


def _figure_row(evaluation: Evaluation, column: str) -> list[Value]:
    """A column of an evaluation as a row: what it is, of how many problems, before, after, and the change."""
    name = column if evaluation.hook else column.removeprefix("accuracy/").removeprefix("kind/")
    before, change = evaluation.before, evaluation.changes.get(column)
    share = evaluation.share(column)
    count = share[1] if share else len(evaluation.counted.get(column, ())) or None
    return [
        Cell("all problems", "total") if name == "accuracy" else name,
        count,
        _with_interval(before, column) if before else None,
        _with_interval(evaluation, column),
        _changed(column, change) if change else None,
    ]


def _with_interval(evaluation: Evaluation, column: str) -> Cell | None:
    value, interval, form = evaluation.numbers.get(column), evaluation.interval(column), _form(column)
    if value is None:
        return None
    return Cell(form(value), note=" to ".join(form(end).rstrip("%") for end in interval) if interval else "")


def _changed(column: str, change: Change) -> Cell:
    """A change with its interval, which is good or bad news where that does not hold 0 and it is known which way is better."""
    by = points if _form(column) is percent else lambda value: signed(value, ".4g")
    if change.interval is None:
        return Cell(by(change.difference))
    low, high = change.interval
    tones: tuple[Tone, Tone] = ("good", "bad") if re.fullmatch(GAINS, column) else ("bad", "good")
    is_told = re.fullmatch(f"{GAINS}|{LOSSES}", column) and not low <= 0 <= high
    tone: Tone = tones[low < 0] if is_told else ""
    return Cell(by(change.difference), note=f"{by(low)} to {by(high)}", tone=tone)


def _form(column: str) -> Callable[[float | None], str]:
    return percent if SHARES.fullmatch(column) else plain


def _habit_figures(told: Told) -> list[list[Value]]:
    """The habits of an evaluation as rows of the table of its figures."""
    length = told.found.length
    rows: list[list[Value]] = [[f"habits, against {told.against}"]]
    difference = signed(length.after - length.before, ".3g")
    rows.append(
        ["words an answer", told.found.after, plain(round(length.before, 1)), plain(round(length.after, 1)), difference]
    )
    for habit in told.found.habits:
        change = Cell(points(habit.after - habit.before), note=" to ".join(map(points, habit.interval)))
        rows.append([Cell(habit.what, "long"), habit.answers, percent(habit.before), percent(habit.after), change])
    return rows


def figure(evaluation: Evaluation, column: str, *, name_baseline: bool = False) -> Cell | None:
    """A number of an evaluation, with its change as the note; `name_baseline` adds what the change is against."""
    value, change = evaluation.numbers.get(column), evaluation.changes.get(column)
    if value is None:
        return None
    if change is None or evaluation.before is None:
        return Cell(_form(column)(value))
    found = _changed(column, change)
    note = f"{found.text} ({found.note})" if found.note else found.text
    return Cell(
        _form(column)(value),
        note=f"{note} against {evaluation.before.name}" if name_baseline else note,
        tone=found.tone,
    )


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


def answers_section(run: RunRecord, evaluations: Sequence[Evaluation]) -> Section:
    """Problems that were answered twice: newly right, newly wrong, wrong and right both times, in turn; of those that nothing scored, some."""
    key, title = "compared", "Before and after"
    found = find_pairs(evaluations)
    if found is None:
        return Section(key, title, "No two evaluations of this run answered the same problems.", only="page")
    first, last, pairs = found
    if all(map(is_scored, chain(*pairs))):
        chosen, told = _in_turn(pairs)
    else:
        chosen = pairs[:: -(-len(pairs) // SHOWN_PAIRS)]
        told = f"Not all of them were scored. Shown are {len(chosen)} of {len(pairs)}, evenly taken."
    note = f"Greedy answers to the same held-out problems. {told}"
    names = [run.title_of(each.stage, each.name) for each in (first, last)]
    rows = [[Cell(_cut(after.get("prompt")), "text"), _answer(before), _answer(after)] for before, after in chosen]
    return Section(key, title, note, [Table(["prompt", *names], rows, kind="compared")], only="page")


def _in_turn(pairs: Sequence[tuple[Record, Record]]) -> tuple[list[tuple[Record, Record]], str]:
    """The pairs that are shown, by what became of them in turn, and a sentence on all of them."""
    by_outcome: dict[Any, list[tuple[Record, Record]]] = {outcome: [] for outcome in OUTCOMES}
    for pair in pairs:
        by_outcome[tuple(map(is_right, pair))].append(pair)
    chosen = [pair for pair in chain(*zip_longest(*by_outcome.values())) if pair is not None][:SHOWN_PAIRS]
    gained, lost, _, kept = map(len, by_outcome.values())
    return chosen, (
        f"Of {len(pairs)}, {gained} became right and {lost} "
        f"wrong; {kept} were right both times. Shown are {len(chosen)}, newly right, newly wrong and unchanged ones in turn."
    )


def _answer(row: Record) -> Cell:
    if not is_scored(row):
        return Cell(_cut(row.get("completion")), "text")
    verdict, detail = str(row.get("verdict") or ""), row.get("detail")
    note = _cut(f"{verdict}: {detail}" if detail else verdict)
    return Cell(_cut(row.get("completion")), "text", note, "good" if verdict == "pass" else "bad")


def _cut(text: object) -> str:
    given = "" if text is None else str(text)
    return given if len(given) <= CHARACTERS_OF_AN_ANSWER else f"{given[:CHARACTERS_OF_AN_ANSWER]} […]"
