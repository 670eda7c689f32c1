"""The evaluations of a run: their changes with intervals, answers before and after, and the figures published."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from align.report.read import Record, RunRecord, Stage, finite, read_table
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
# They share sizes with a model of the report, and are others.
OTHER_MODELS = re.compile(r"coder|v2\.5|vl2", re.I)


@dataclass(frozen=True, slots=True)
class Change:
    """A difference to an earlier evaluation, with its 95 % confidence `interval` where `method` gives one."""

    difference: float
    interval: Interval | None = None
    method: str = ""


class Evaluation:
    """One record of evaluations.jsonl; `changes` are against the evaluation called `against`, by column of `numbers`.

    `verdicts` are (verdict, how often), the most frequent first; `file` is the table of completions if it still exists.
    """

    def __init__(self, stage: Stage, record: Record) -> None:
        self.stage = stage
        self.name = str(record.get("name", "?"))
        self.split = record.get("split")
        self.step, self.problems = (_whole(record.get(key)) for key in ("step", "problems"))
        self.file = stage.evaluation_file(self.name)
        told = ((key, finite(value)) for key, value in record.items() if key not in ("step", "problems"))
        self.numbers = {key: value for key, value in told if value is not None}
        verdicts = record.get("verdicts")
        counts = verdicts.items() if isinstance(verdicts, dict) else ()
        self.verdicts = sorted(((str(v), n) for v, n in counts if isinstance(n, int)), key=lambda item: -item[1])
        self.against: str | None = None
        self.changes: dict[str, Change] = {}

    @property
    def right(self) -> int | None:
        """How many answers are right, where accuracy and problems say so."""
        right = round(self.numbers.get("accuracy", -1.0) * (self.problems or 0))
        return right if self.problems and 0 <= right <= self.problems else None

    @cached_property
    def greedy(self) -> dict[Any, Record]:
        """The rows of the greedy answers by the id of their problem; empty where the table does not exist."""
        return {row["id"]: row for row in self._rows if row.get("greedy") and "id" in row}

    @cached_property
    def sampled(self) -> dict[Any, list[bool]]:
        """Which sampled answers are right, by the id of their problem."""
        found: dict[Any, list[bool]] = {}
        for row in self._rows:
            if not row.get("greedy"):
                found.setdefault(row.get("id"), []).append(is_right(row))
        return found

    @cached_property
    def _rows(self) -> list[Record]:
        columns = ("id", "domain", "greedy", "prompt", "completion", "verdict", "detail")
        return read_table(self.file, columns).to_pylist() if self.file else []

    def pairs_with(self, before: "Evaluation") -> bool:
        """Whether both have the greedy answers to the same problems, which are those that their records counted."""
        return self._is_counted and before._is_counted and self.greedy.keys() == before.greedy.keys()

    @cached_property
    def _is_counted(self) -> bool:
        if "accuracy" not in self.numbers or not self.greedy or len(self.greedy) != self.problems:
            return False
        return abs(sum(map(is_right, self.greedy.values())) / self.problems - self.numbers["accuracy"]) < 1e-9


def is_right(row: Record) -> bool:
    """Whether the answer in a row of a table of completions is right."""
    return row.get("verdict") == "pass"


def compared_evaluations(run: RunRecord) -> list[Evaluation]:
    """The evaluations of all stages in the order in which they were made, each with its changes.

    Each is compared with the last one of the stage that made the policy, else of the stage before, on the same problems
    where there is such a one; in the first stage, with that stage's first one. Evaluations by which checkpoints are
    chosen are compared with one another alone. Accuracy has a 95 % interval: paired where both tables of completions
    hold the same problems, else unpaired. That of a domain, and pass@k, have one where they can be paired.
    """
    evaluations: list[Evaluation] = []
    before: list[Evaluation] = []
    by_product: dict[Path, list[Evaluation]] = {}
    for stage in run.stages:
        made = [Evaluation(stage, record) for record in stage.evaluations]
        before = by_product.get(Path(stage.model_path).absolute(), before)
        for position, evaluation in enumerate(made):
            earlier = before or made[:position]
            candidates = [each for each in earlier if each.split == evaluation.split]
            candidates = candidates if before else candidates[:1]
            alike = [each for each in candidates if evaluation.pairs_with(each)] or candidates
            if alike:
                evaluation.against = alike[-1].name
                shared = [column for column in evaluation.numbers if column in alike[-1].numbers]
                evaluation.changes = {column: _change(column, alike[-1], evaluation) for column in shared}
        by_product[RunDirectory(stage.path).final_directory.absolute()] = made
        before = made or before
        evaluations += made
    return evaluations


def column_groups(evaluations: Iterable[Evaluation]) -> dict[str, list[str]]:
    """The numeric columns of all evaluations, in groups by what they measure."""

    def rank(column: str) -> tuple[int, str]:
        match = PASS_AT.fullmatch(column)
        return (int(match[1]) if match else 0, column)

    groups: dict[str, list[str]] = {name: [] for name, _ in GROUPS}
    for column in sorted({column for evaluation in evaluations for column in evaluation.numbers}, key=rank):
        known = next((name for name, pattern in GROUPS if re.fullmatch(pattern, column)), None)
        groups.setdefault(known or column.partition("/")[0], []).append(column)
    return {name: found for name, found in groups.items() if found}


def find_pairs(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, Evaluation, list[tuple[Record, Record]]] | None:
    """The first evaluation that has problems in common with the last one, that one, and the greedy answers of both to
    these problems, as (before, after). None without two such evaluations of problems."""
    found = [each for each in evaluations if "accuracy" in each.numbers and each.file]
    for first in found[:-1]:
        if shared := [(first.greedy[id_], row) for id_, row in found[-1].greedy.items() if id_ in first.greedy]:
            return first, found[-1], shared
    return None


def published_figures(run: RunRecord) -> Mapping[str, Any] | None:
    """The entry of published.yaml (name, tables, figures, source, url) for the run's model; None if it has none.

    The model is known by the sizes in a config.json of the run or of the recipe's model.path; where there is none, by
    the name in model.path.
    """
    models = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
    for stage in reversed(run.stages):
        config, called = _config(stage, run.path), stage.model_path.rstrip("/").rpartition("/")[2]
        if OTHER_MODELS.search(f"{stage.model_path} {config.get('_name_or_path')}"):
            continue
        for model in models:
            sizes: Mapping[str, Any] = {"model_type": "deepseek_v2"} | model["sizes"]
            fits = all(config.get(key) == value for key, value in sizes.items())
            if fits or (not config and re.fullmatch(rf"{re.escape(model['name'])}(-chat)?", called, re.I)):
                return dict(model)
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _change(column: str, before: Evaluation, after: Evaluation) -> Change:
    difference = after.numbers[column] - before.numbers[column]
    paired = after.pairs_with(before)
    name, _, domain = column.partition("/")
    shared = [id_ for id_, row in after.greedy.items() if paired and domain in ("", row.get("domain"))]
    if name == "accuracy" and shared:
        right = [(is_right(before.greedy[id_]), is_right(after.greedy[id_])) for id_ in shared]
        return Change(
            difference, paired_interval(right.count((False, True)), right.count((True, False)), len(right)), PAIRED
        )
    was, is_ = before.right, after.right
    if column == "accuracy" and was is not None and is_ is not None and before.problems and after.problems:
        return Change(difference, unpaired_interval(was, before.problems, is_, after.problems), UNPAIRED)
    match = PASS_AT.fullmatch(column)
    interval = mean_interval(_solved(before, after, int(match[1]))) if match and paired else None
    return Change(difference, interval, MEANS if interval else "")


def _solved(old: Evaluation, new: Evaluation, k: int) -> list[float]:
    """By problem, how much pass@k changed; empty where a problem has fewer than k samples."""
    counts = [len(right) for each in (old, new) for right in each.sampled.values()]
    if new.sampled.keys() != old.sampled.keys() or k > min(counts, default=0):
        return []
    was, now = ({id_: pass_at_k(len(r), sum(r), k) for id_, r in each.sampled.items()} for each in (old, new))
    return [now[id_] - rate for id_, rate in was.items()]


def _config(stage: Stage, whole_run: Path) -> Record:
    """The policy's configuration; empty where none can be read."""
    for directory in stage.model_directories(whole_run):
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return config if isinstance(config, dict) else {}
    return {}
