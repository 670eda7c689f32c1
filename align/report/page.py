"""The report as one HTML page: everything inside it, and a policy that lets it load and run nothing else."""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from align.report import before_after, curves, samples
from align.report.escape import for_html, for_script, percent, plain, points, signed
from align.report.evaluations import Change, Row, Table, is_share
from align.report.experts import HEADS, NOTE, StageLoad, expert_loads
from align.report.published import Published
from align.report.read import RunRecord
from align.report.summary import alarms, events, last_value, settings, stage_facts

STYLES = ("page.css",)
SCRIPTS = ("page.js", "charts.js", "samples.js", "start.js")
LESS_IS_BETTER = ("truncated",)
# The tokens' colours from likely to unlikely, as samples.js chooses them.
SCALE = ("above 0.9", "0.5 to 0.9", "0.2 to 0.5", "0.05 to 0.2", "0.007 to 0.05", "below 0.007")


def html_page(run: RunRecord, table: Table, published: Published | None) -> str:
    """The whole page as text."""
    style, script = _assets(STYLES), _assets(SCRIPTS)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{_digest(style)}'",
            f"script-src 'sha256-{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    drawn, browsed = curves.as_data(run.stages), samples.as_data(run)
    sections = [
        ("stages", "Stages", _stages(run)),
        ("evaluations", "Evaluations", _evaluations(table, published)),
        ("curves", "Learning curves", _curves(drawn)),
        ("compared", "Before and after", before_after.section(run)),
        *([("experts", "Expert load", _experts(loads))] if (loads := expert_loads(run)) else []),
        ("samples", "Samples", _samples(browsed)),
        ("events", "Warnings and events", _events(run)),
        ("settings", "Settings", _settings(run)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    parts = [f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in sections]
    body = f"{_head(run, table)}<nav>{links}</nav><main>{''.join(parts)}</main>"
    return Template(_asset("page.html")).substitute(
        policy=policy,
        title=for_html(run.name),
        style=style,
        body=body,
        data=for_script({"stages": drawn, "samples": browsed}),
        script=script,
    )


def _asset(name: str) -> str:
    return resources.files("align.report").joinpath(name).read_text(encoding="utf-8")


def _assets(names: Iterable[str]) -> str:
    return "\n".join(_asset(name) for name in names)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _head(run: RunRecord, table: Table) -> str:
    facts = stage_facts(run.whole)
    tiles = [_tile(facts["took"], f"{run.whole.status['state']}, started {facts['started']}")]
    if table.rows:
        # What the hooks measured comes after it.
        last = next((row for row in reversed(table.rows) if "accuracy" in row.numbers), table.rows[-1])
        against = f" against {last.against}" if last.against else ""
        for column in [name for name in table.columns if name in last.numbers][:1] + _highest_pass_at(last):
            change = last.changes.get(column)
            told = _change(column, change, against) if change else ""
            tiles.append(_tile(_value(column, last.numbers[column]), f"{column}, {last.name}", told))
    agreement = last_value(run, "agreement/mean")
    if agreement is not None:
        tiles.append(_tile(plain(agreement), "nats a token between sampler and learner, mean of the last step"))
    tiles.append(_tile(str(alarms(run)), "warnings and errors"))
    return f'<h1>{for_html(run.name)}</h1><p class="soft mono">{for_html(run.path)}</p><div class="tiles">{"".join(tiles)}</div>'


def _tile(value: str, text: str, change: str = "") -> str:
    return f'<div class="tile"><b>{for_html(value)}</b><span>{for_html(text)}</span>{change}</div>'


def _highest_pass_at(row: Row) -> list[str]:
    return [name for name in row.numbers if name.startswith("pass@")][-1:]


def _stages(run: RunRecord) -> str:
    facts = [stage_facts(stage) for stage in run.stages]
    rows = [
        "".join(_cell(value, _state_class(value) if key == "state" else "") for key, value in fact.items())
        for fact in facts
    ]
    return _table([_heading(key) for key in facts[0]], rows, "facts")


def _state_class(state: str) -> str:
    return f"state-{state.partition(':')[0].partition(',')[0]}{' long' if len(state) > 40 else ''}"


def _evaluations(table: Table, published: Published | None) -> str:
    if not table.rows:
        return f'<p class="note">This run has no evaluations.</p>{_published(published)}'
    grouped = [f'<th class="group" colspan="{len(columns)}">{for_html(name)}</th>' for name, columns in table.groups]
    first = f'<tr><th colspan="4"></th>{"".join(grouped)}<th></th></tr>'
    names = [_heading(name) for name in ("stage", "step", "evaluation", "problems")]
    names += [_heading(column, "number") for column in table.columns] + [_heading("verdicts (greedy)")]
    body = "".join(f"<tr>{_evaluation(row, table)}</tr>" for row in table.rows)
    against = "Below each number, its change against the last evaluation of the stage before (in the first stage, against its first)"
    notes = f"{against}, shares in percentage points; in brackets its 95 % confidence interval."
    notes += "".join(f" {method[0].upper()}{method[1:]}." for method in table.methods)
    return (
        f'<div class="scroll"><table class="facts"><thead>{first}<tr>{"".join(names)}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{for_html(notes)}</p>{_published(published)}'
    )


def _evaluation(row: Row, table: Table) -> str:
    cells = [_cell(row.stage), _cell("–" if row.step is None else row.step, "number")]
    cells += [_cell(row.name), _cell("–" if row.problems is None else row.problems, "number")]
    for column in table.columns:
        value, change = row.numbers.get(column), row.changes.get(column)
        text = "" if value is None else for_html(_value(column, value))
        cells.append(f'<td class="number">{text}{_change(column, change) if change else ""}</td>')
    return "".join(cells) + f'<td class="wide">{_verdicts(row.verdicts)}</td>'


def _value(column: str, value: float) -> str:
    return percent(value) if is_share(column) else plain(value)


def _change(column: str, change: Change, against: str = "") -> str:
    share = is_share(column)
    text = points(change.difference) if share else signed(change.difference, ".4g")
    tone = ""
    if change.interval:
        low, high = change.interval
        text += f" [{points(low)}, {points(high)}]"
        better = low > 0 if column not in LESS_IS_BETTER else high < 0
        tone = " good" if better else " bad" if low > 0 or high < 0 else ""
    return f'<span class="change{tone}">{for_html(text + against)}</span>'


def _verdicts(verdicts: Mapping[str, int]) -> str:
    total = sum(verdicts.values())
    if total <= 0:
        return ""
    bars, start = [], 0.0
    for name, count in sorted(verdicts.items(), key=lambda item: (item[0] != "pass", -item[1])):
        width = 100 * count / total
        kind = name if name in ("pass", "wrong", "no_answer") else "other"
        bars.append(f'<rect class="v-{kind}" x="{start:.2f}" y="0" width="{width:.2f}" height="6"/>')
        start += width
    counts = ", ".join(f"{count} {name}" for name, count in sorted(verdicts.items(), key=lambda item: -item[1]))
    drawn = f'<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">{"".join(bars)}</svg>'
    return drawn + for_html(counts)


def _published(published: Published | None) -> str:
    if published is None:
        return ""
    names = published.benchmarks
    rows = [
        _cell(column) + "".join(_cell(figures.get(name, "–"), "number") for name in names)
        for column, figures in published.figures.items()
    ]
    return (
        f"<h3>Published for {for_html(published.model)}</h3>"
        + _table([_heading("model"), *(_heading(name, "number") for name in names)], rows, "facts")
        + f'<p class="note">{for_html(published.source)} (<a href="{for_html(published.url)}" rel="noreferrer">'
        f"{for_html(published.url)}</a>), {for_html(published.tables)}. In percent, but MT-Bench and AlignBench of 10. "
        "Prompts, shots and judges are the report's: they orient, and do not compare to a run's own problems.</p>"
    )


def _curves(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return '<p class="note">This run has no metrics yet.</p><div id="charts"></div><input id="smoothing" hidden>'
    thinned = " Of long curves, the least and the greatest value of each stretch of steps are drawn."
    if not any(panel["thinned"] for stage in stages for panel in stage["panels"]):
        thinned = ""
    return (
        '<form class="controls"><label class="inline">smoothing <input id="smoothing" type="range" min="0" max="0.98" '
        'step="0.02" value="0"></label></form><p class="note">Point at a curve, or focus it and use the arrow keys, to '
        f"read the values of a step in all curves of its stage.{thinned}</p>"
        '<div id="charts"></div><noscript><p>The curves need JavaScript.</p></noscript>'
    )


def _experts(loads: Sequence[StageLoad]) -> str:
    heads = [_heading(HEADS[0]), *(_heading(name, "number") for name in HEADS[1:])]
    tables = [
        f"<h3>{for_html(load.stage)}</h3>"
        + _table(heads, ["".join(_cell(cell, "number") for cell in row) for row in load.rows], "facts")
        for load in loads
    ]
    return f'<p class="note">{for_html(NOTE)}</p>{"".join(tables)}'


def _samples(data: Mapping[str, Any]) -> str:
    rows, sources = data["rows"], data["sources"]
    if not rows:
        return '<p class="note">This run holds no samples.</p>'
    parts = []
    for noun, kind in (("training samples", "training"), ("answers to held-out problems", "evaluation")):
        part = [source for source in sources if (source["evaluation"] is None) == (kind == "training")]
        shown, total = (sum(source[key] for source in part) for key in ("shown", "total"))
        tables = f"{len(part)} of {data['steps']} steps" if kind == "training" else f"{len(part)} evaluations"
        if part:
            parts.append(f"{shown:,} of the {total:,} {noun} of {tables}")
    said = [f"Shown are {', and '.join(parts)}."]
    if any(source["shown"] != source["total"] for source in sources):
        said.append(
            "Those of a step are masked ones, the best, the worst and others in turn; those of an evaluation are greedy "
            "answers, to the same problems each time. The run directory has all of them."
        )
    trained = [row for row in rows if sources[row["source"]]["evaluation"] is None]
    bare = sum("pieces" not in row for row in trained)
    if trained and bare == len(trained):
        said.append("Tokens are not coloured: no tokenizer.json of the run's policy could be loaded that fits them.")
    elif bare:
        said.append(f"{bare} training samples are not coloured, as their tokens do not add up to their text.")
    scale = "".join(f'<span class="p{place}">{text}</span>' for place, text in enumerate(SCALE))
    legend = f'<p class="note scale">Tokens by the probability that the sampler gave them: {scale}</p>'
    return (
        f'<p class="note">{for_html(" ".join(said))}</p>{legend if bare < len(trained) else ""}'
        '<div id="browser"></div><noscript><p>The browser of samples needs JavaScript.</p></noscript>'
    )


def _events(run: RunRecord) -> str:
    shown, left_out = events(run)
    if not shown:
        return '<p class="note">Nothing was noted.</p>'
    rows = [
        _cell(event.stage)
        + _cell(event.time)
        + _cell(event.kind, f"kind-{event.kind}" if event.kind.isalpha() else "")
        + _cell(event.message)
        for event in shown
    ]
    more = f'<p class="note">{left_out} more in events.jsonl.</p>' if left_out else ""
    return _table([_heading(name) for name in ("stage", "time", "kind", "message")], rows) + more


def _settings(run: RunRecord) -> str:
    rows = settings(run)
    body = "".join(
        f"<tr{' class=differs' if differs and len(run.stages) > 1 else ''}>{_heading(key)}"
        f"{''.join(_cell(value) for value in values)}</tr>"
        for key, values, differs in rows
    )
    heads = "".join(_heading(name) for name in ("key", *(stage.label for stage in run.stages)))
    return (
        f"<details><summary>recipe.yaml and environment.json, {len(rows)} keys</summary>"
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="note">Marked where the stages differ.</p></details>'
    )


def _table(headings: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{"".join(headings)}</tr></thead><tbody>{body}</tbody></table></div>'


def _heading(text: object, kind: str = "") -> str:
    return f'<th class="{kind}">{for_html(text)}</th>' if kind else f"<th>{for_html(text)}</th>"


def _cell(text: object, kind: str = "") -> str:
    return f'<td class="{for_html(kind)}">{for_html(text)}</td>' if kind else f"<td>{for_html(text)}</td>"
