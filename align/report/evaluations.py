"""The evaluations of a run as one table, each with its change against the stage before."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.report.read import Record, RunRecord, Stage, finite, read_columns
from align.run import RunDirectory
from align.statistics import Interval, mean_interval, paired_interval, pass_at_k, unpaired_interval

PAIRED = "paired: score interval (Tango 1998, Statistics in Medicine 17:891-908), which agrees with McNemar's test"
UNPAIRED = "unpaired: Newcombe 1998, Statistics in Medicine 17:873-890, method 10"
MEANS = "paired means over the problems, by the central limit theorem (Miller 2024, arXiv:2411.00640)"
PASS_AT = re.compile(r"pass@(\d+)")

# (group, columns): a column goes to the first group that takes it; of the others, a/b goes to a group a.
GROUPS = (
    ("right answers", r"accuracy|accuracy/.*"),
    ("sampled", r"pass@.*"),
    ("rates", r"[^/]*_(rate|share)"),
    ("answers", r"truncated|[^/]*length[^/]*"),
    ("other", r"[^/]*"),
)
SHARES = re.compile(r"(accuracy|truncated)(/.*)?|pass@.*|.*_(rate|share)|[^/]+/(acc|acc_norm|exact_match)(/.*)?")


@dataclass(frozen=True, slots=True)
class Change:
    """A difference to an earlier evaluation; `interval` holds it with 95 % confidence, where `method` gives one."""

    difference: float
    interval: Interval | None = None
    method: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One evaluation. `changes` are against the one called `against`, by column."""

    stage: str
    step: int | None
    name: str
    problems: int | None
    numbers: Mapping[str, float]
    verdicts: Mapping[str, int]
    against: str | None
    changes: Mapping[str, Change]


@dataclass(frozen=True, slots=True)
class Table:
    """All evaluations; `groups` are the numeric columns by what they measure, none of them empty."""

    groups: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[Row]

    @property
    def columns(self) -> list[str]:
        return [column for _, columns in self.groups for column in columns]

    @property
    def methods(self) -> list[str]:
        """The methods behind the intervals of the table."""
        used = [change.method for row in self.rows for change in row.changes.values() if change.method]
        return list(dict.fromkeys(used))


def evaluation_table(run: RunRecord) -> Table:
    """The evaluations of all stages in the order in which they were made.

    Each is compared with the last one of the stage that made the policy, else of the stage before, on the same problems
    where there is such a one; in the first stage, with that stage's first one. One by which checkpoints are chosen is compared with such
    ones alone. Accuracy has a 95 % interval: paired where both tables of completions
    hold the same problems, else unpaired. That of a domain, and pass@k, have one where they can be paired.
    """
    rows: list[Row] = []
    before: list[_Evaluation] = []
    by_product: dict[Path, list[_Evaluation]] = {}
    for stage in run.stages:
        made = [_Evaluation(stage, record) for record in stage.evaluations]
        before = by_product.get(stage.policy, before)
        for position, evaluation in enumerate(made):
            earlier = before or made[:position]
            candidates = [each for each in earlier if each.split == evaluation.split]
            candidates = candidates if before else candidates[:1]
            alike = [each for each in candidates if _pair(each, evaluation)] or candidates
            rows.append(_row(evaluation, alike[-1] if alike else None))
        by_product[RunDirectory(stage.path).final_directory.absolute()] = made
        before = made or before
    return Table(_grouped({column for row in rows for column in row.numbers}), rows)


def is_share(column: str) -> bool:
    """Whether a column is a share of 1, to be shown in percent."""
    return SHARES.fullmatch(column) is not None


class _Evaluation:
    """One record of evaluations.jsonl, and its completions where they are still there."""

    def __init__(self, stage: Stage, record: Record) -> None:
        self.stage = stage
        self.name = str(record.get("name", "?"))
        self.step = _whole(record.get("step"))
        self.split = record.get("split")
        self.problems = _whole(record.get("problems"))
        told = ((key, finite(value)) for key, value in record.items() if key not in ("step", "problems"))
        self.numbers = {key: value for key, value in told if value is not None}
        verdicts = record.get("verdicts")
        self.verdicts = (
            {str(name): count for name, count in verdicts.items() if isinstance(count, int)}
            if isinstance(verdicts, dict)
            else {}
        )
        self._file = stage.evaluation_file(self.name)

    @property
    def right(self) -> int | None:
        """How many answers are right, where accuracy and problems say so."""
        right = round(self.numbers.get("accuracy", -1.0) * (self.problems or 0))
        return right if self.problems and 0 <= right <= self.problems else None

    @cached_property
    def answers(self) -> "_Answers | None":
        """The answers by problem, if they are those that the record counted."""
        told = self.numbers.get("accuracy")
        if self._file is None or told is None:
            return None
        found = _read_answers(self._file)
        if not found.greedy or len(found.greedy) != self.problems:
            return None
        return found if abs(sum(found.greedy.values()) / len(found.greedy) - told) < 1e-9 else None


@dataclass(frozen=True, slots=True)
class _Answers:
    """By the id of the problem: whether the greedy answer is right, which sampled answers are, and its domain."""

    greedy: Mapping[Any, bool]
    sampled: Mapping[Any, Sequence[bool]]
    domains: Mapping[Any, Any]

    def within(self, domain: str | None) -> dict[Any, bool]:
        """The greedy answers to the problems of a domain; for None, all of them."""
        return {id_: right for id_, right in self.greedy.items() if domain is None or self.domains[id_] == domain}


def _read_answers(path: Path) -> _Answers:
    greedy: dict[Any, bool] = {}
    sampled: dict[Any, list[bool]] = {}
    domains: dict[Any, Any] = {}
    for row in read_columns(path, ("id", "domain", "greedy", "verdict")):
        domains[row.get("id")] = row.get("domain")
        right = row.get("verdict") == "pass"
        if row.get("greedy"):
            greedy[row.get("id")] = right
        else:
            sampled.setdefault(row.get("id"), []).append(right)
    return _Answers(greedy, sampled, domains)


def _row(evaluation: _Evaluation, baseline: _Evaluation | None) -> Row:
    changes = {
        column: _change(column, baseline, evaluation)
        for column in (evaluation.numbers if baseline else ())
        if baseline and column in baseline.numbers
    }
    return Row(
        stage=evaluation.stage.label,
        step=evaluation.step,
        name=evaluation.name,
        problems=evaluation.problems,
        numbers=evaluation.numbers,
        verdicts=evaluation.verdicts,
        against=baseline.name if baseline else None,
        changes=changes,
    )


def _change(column: str, before: _Evaluation, after: _Evaluation) -> Change:
    difference = after.numbers[column] - before.numbers[column]
    pair = _pair(before, after)
    name, _, domain = column.partition("/")
    old, new = (answers.within(domain or None) for answers in pair) if pair else ({}, {})
    if name == "accuracy" and new:
        gained = sum(new[id_] and not old[id_] for id_ in new)
        lost = sum(old[id_] and not new[id_] for id_ in new)
        return Change(difference, paired_interval(gained, lost, len(new)), PAIRED)
    was, is_ = before.right, after.right
    if column == "accuracy" and was is not None and is_ is not None and before.problems and after.problems:
        return Change(difference, unpaired_interval(was, before.problems, is_, after.problems), UNPAIRED)
    match = PASS_AT.fullmatch(column)
    interval = mean_interval(_solved(*pair, int(match[1]))) if match and pair else None
    return Change(difference, interval, MEANS if interval else "")


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _pair(before: _Evaluation, after: _Evaluation) -> tuple[_Answers, _Answers] | None:
    """The answers of both where they are to the same problems."""
    old, new = before.answers, after.answers
    return (old, new) if old and new and old.greedy.keys() == new.greedy.keys() else None


def _solved(old: _Answers, new: _Answers, k: int) -> list[float]:
    """By problem, how much pass@k changed; empty where a problem has fewer than k samples."""
    counts = [len(right) for each in (old, new) for right in each.sampled.values()]
    if new.sampled.keys() != old.sampled.keys() or k > min(counts, default=0):
        return []
    rates = [{id_: pass_at_k(len(right), sum(right), k) for id_, right in each.sampled.items()} for each in (old, new)]
    return [rates[1][id_] - rate for id_, rate in rates[0].items()]


def _grouped(columns: set[str]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {name: [] for name, _ in GROUPS}
    for column in sorted(columns, key=_rank):
        known = next((name for name, pattern in GROUPS if re.fullmatch(pattern, column)), None)
        groups.setdefault(known or column.partition("/")[0], []).append(column)
    return [(name, found) for name, found in groups.items() if found]


def _rank(column: str) -> tuple[int, str]:
    match = PASS_AT.fullmatch(column)
    return (int(match[1]) if match else 0, column)
