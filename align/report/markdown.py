"""The report as Markdown: stages, evaluations, last metrics, warnings."""

from collections.abc import Iterable, Sequence

from align.report.escape import for_markdown, percent, plain, points, signed
from align.report.evaluations import Row, Table, is_share
from align.report.experts import HEADS, NOTE, expert_loads
from align.report.published import Published
from align.report.read import RunRecord
from align.report.summary import events, last_metrics, stage_facts


def markdown_page(run: RunRecord, table: Table, published: Published | None) -> str:
    """The whole file as text."""
    parts = [f"# {for_markdown(run.name)}", "## Stages", _stages(run), "## Evaluations", _evaluations(table)]
    if published:
        parts += [f"### Published for {for_markdown(published.model)}", _published(published)]
    if loads := expert_loads(run):
        parts += ["## Expert load", NOTE]
        parts += [text for load in loads for text in (f"### {for_markdown(load.stage)}", _table(HEADS, load.rows))]
    parts += ["## Last metrics", *_metrics(run), "## Warnings and events", _events(run)]
    return "\n\n".join(parts) + "\n"


def _stages(run: RunRecord) -> str:
    facts = [stage_facts(stage) for stage in run.stages]
    return _table(list(facts[0]), [list(fact.values()) for fact in facts])


def _evaluations(table: Table) -> str:
    if not table.rows:
        return "This run has no evaluations."
    heads = ["stage", "step", "evaluation", "problems", *table.columns, "verdicts"]
    rows = [
        [
            row.stage,
            "–" if row.step is None else str(row.step),
            row.name,
            "–" if row.problems is None else str(row.problems),
            *(_number(row, column) for column in table.columns),
            ", ".join(f"{count} {name}" for name, count in sorted(row.verdicts.items(), key=lambda item: -item[1])),
        ]
        for row in table.rows
    ]
    note = (
        "In parentheses the change against the last evaluation of the stage before (in the first stage, against its "
        "first), shares in percentage points, and its 95 % confidence interval."
    )
    methods = "".join(f" {method[0].upper()}{method[1:]}." for method in table.methods)
    return f"{_table(heads, rows)}\n\n{note}{methods}"


def _number(row: Row, column: str) -> str:
    value, change = row.numbers.get(column), row.changes.get(column)
    if value is None:
        return ""
    text = percent(value) if is_share(column) else plain(value)
    if change is None:
        return text
    told = points(change.difference) if is_share(column) else signed(change.difference, ".4g")
    if change.interval:
        low, high = change.interval
        told += f"; {points(low)} to {points(high)}"
    return f"{text} ({told})"


def _published(published: Published) -> str:
    columns = list(published.figures)
    rows = [
        [name, *(str(published.figures[column].get(name, "–")) for column in columns)] for name in published.benchmarks
    ]
    return f"{_table(['benchmark', *columns], rows)}\n\n{published.source}, {published.tables}. <{published.url}>"


def _metrics(run: RunRecord) -> Iterable[str]:
    for stage in run.stages:
        found = last_metrics(stage)
        if found:
            yield f"### {for_markdown(stage.label)}"
            yield _table(["group", "metric", "last"], found)


def _events(run: RunRecord) -> str:
    shown, left_out = events(run)
    if not shown:
        return "Nothing was noted."
    rows = [[event.stage, event.time, event.kind, event.message] for event in shown]
    more = f"\n\n{left_out} more in events.jsonl." if left_out else ""
    return _table(["stage", "time", "kind", "message"], rows) + more


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    written = [f"| {' | '.join(for_markdown(cell) for cell in heads)} |", f"|{'---|' * len(heads)}"]
    written += [f"| {' | '.join(for_markdown(cell) for cell in row)} |" for row in rows]
    return "\n".join(written)
