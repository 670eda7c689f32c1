"""The same held-out prompts answered before and after: side by side, with what was found in each answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from align.report.escape import for_html
from align.report.read import RunRecord, read_columns

SHOWN = 16
CHARACTERS = 1200
COLUMNS = ("id", "greedy", "prompt", "completion", "verdict", "detail")

Answers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Greedy answers of two evaluations to the problems that both have, `before` and `after` by the problem's id."""

    names: tuple[str, str]
    before: Answers
    after: Answers

    @property
    def ids(self) -> list[str]:
        return [id_ for id_ in self.after if id_ in self.before]

    def chosen(self) -> list[str]:
        """Problems to show: newly right, newly wrong, wrong and right both times, in turn."""
        kinds: dict[tuple[bool, bool], list[str]] = {
            (False, True): [],
            (True, False): [],
            (False, False): [],
            (True, True): [],
        }
        for id_ in self.ids:
            kinds[self.right(id_)].append(id_)
        in_turn = chain.from_iterable(zip_longest(*kinds.values()))
        return [id_ for id_ in in_turn if id_ is not None][:SHOWN]

    def right(self, id_: str) -> tuple[bool, bool]:
        return self.before[id_].get("verdict") == "pass", self.after[id_].get("verdict") == "pass"


def section(run: RunRecord) -> str:
    """The section's HTML; a note where no two evaluations answered the same problems."""
    pairs = find_pairs(run)
    if pairs is None:
        return '<p class="note">No two evaluations of this run answered the same problems.</p>'
    chosen = pairs.chosen()
    before, after = (for_html(name) for name in pairs.names)
    changed = [pairs.right(id_) for id_ in pairs.ids]
    note = (
        f"Greedy answers to the same held-out problems. Of {len(changed)}, {changed.count((False, True))} became right and "
        f"{changed.count((True, False))} wrong; {changed.count((True, True))} were right both times. Shown are "
        f"{len(chosen)}, newly right, newly wrong and unchanged ones in turn."
    )
    rows = "".join(
        f'<tr><td class="text">{for_html(_cut(pairs.after[id_].get("prompt")))}</td>{_answer(pairs.before[id_])}{_answer(pairs.after[id_])}</tr>'
        for id_ in chosen
    )
    return (
        f'<p class="note">{for_html(note)}</p><div class="scroll"><table class="compared"><thead><tr><th>prompt</th>'
        f"<th>{before}</th><th>{after}</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def find_pairs(run: RunRecord) -> Pairs | None:
    """The run's last evaluation of problems, and the first that has problems in common with it; None without two such."""
    found = [
        (f"{stage.label}: {record['name']}" if len(run.stages) > 1 else str(record["name"]), file)
        for stage in run.stages
        for record in stage.evaluations
        if "accuracy" in record and (file := stage.evaluation_file(str(record.get("name")))) is not None
    ]
    if len(found) < 2:
        return None
    name, after = found[-1][0], _greedy(found[-1][1])
    for first, file in found[:-1]:
        before = _greedy(file)
        if before.keys() & after.keys():
            return Pairs((first, name), before, after)
    return None


def _greedy(file: Path) -> Answers:
    return {str(row["id"]): row for row in read_columns(file, COLUMNS) if row.get("greedy") and "id" in row}


def _answer(row: Mapping[str, Any]) -> str:
    verdict, detail = str(row.get("verdict") or ""), str(row.get("detail") or "")
    tone = "good" if verdict == "pass" else "bad"
    told = f"{verdict}: {detail}" if detail else verdict
    return (
        f'<td class="text">{for_html(_cut(row.get("completion")))}'
        f'<span class="change {tone}">{for_html(_cut(told))}</span></td>'
    )


def _cut(text: object) -> str:
    given = "" if text is None else str(text)
    return given if len(given) <= CHARACTERS else f"{given[:CHARACTERS]} […]"
