"""The evaluations of a run: their changes with intervals, answers before and after, and the figures published."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from align.report.read import Record, RunRecord, Stage, at, finite, read_table
from align.run import RunDirectory
from align.statistics import Interval, mean_interval, paired_interval, pass_at_k, unpaired_interval, wilson_interval
from reward import Verdict

PAIRED = "paired: score interval (Tango 1998, Statistics in Medicine 17:891-908), which agrees with McNemar's test"
UNPAIRED = "unpaired: Newcombe 1998, Statistics in Medicine 17:873-890, method 10"
MEANS = "paired means over the problems, by the central limit theorem (Miller 2024, arXiv:2411.00640)"
PASS_AT = re.compile(r"pass@(\d+)")

# (group, columns): a column goes to the first group that takes it; of the others, a/b goes to a group a.
GROUPS = (
    ("right answers", r"accuracy(/(?!kind/).*)?"),
    ("instructions followed, by kind", r"accuracy/kind/.*"),
    ("sampled", r"pass@.*"),
    ("rates", r"[^/]*_(rate|share)(_sampled)?|(over_)?refusals"),
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
    """One record of evaluations.jsonl; `changes` are against the evaluation `before`, by column of `numbers`.

    `hook` names the hook that measured it, "" where held-out problems were answered. `verdicts` are (verdict, how often), the
    most frequent first; `file` is the table of completions if it still exists.
    """

    def __init__(self, stage: Stage, record: Record) -> None:
        self.stage = stage
        self.name = str(record.get("name", "?"))
        self.split = record.get("split")
        self.step, self.problems = (_whole(record.get(key)) for key in ("step", "problems"))
        self.hook = "" if "problems" in record else self.name
        self.file = stage.evaluation_file(self.name)
        told = ((key, finite(value)) for key, value in record.items() if key not in ("step", "problems"))
        self.numbers = {key: value for key, value in told if value is not None}
        verdicts = record.get("verdicts")
        counts = verdicts.items() if isinstance(verdicts, dict) else ()
        self.verdicts = sorted(((str(v), n) for v, n in counts if isinstance(n, int)), key=lambda item: -item[1])
        self.before: Evaluation | None = None
        self.changes: dict[str, Change] = {}

    @property
    def judged(self) -> int:
        """How many problems the accuracy is over: those whose answer could be judged."""
        return (self.problems or 0) - dict(self.verdicts).get("infra_error", 0)

    @property
    def right(self) -> int | None:
        """How many answers are right, where accuracy and problems say so."""
        right = round(self.numbers.get("accuracy", -1.0) * self.judged)
        return right if 0 <= right <= self.judged and self.judged else None

    @cached_property
    def greedy(self) -> dict[Any, Record]:
        """The rows of the greedy answers by the id and the prompt of their problem; empty where the table does not exist."""
        return {(row["id"], row.get("prompt")): row for row in self._rows if row.get("greedy") and "id" in row}

    @cached_property
    def counted(self) -> dict[str, dict[Any, float]]:
        """By column, what its number is the mean of: a number for each problem by its id and prompt, a bool where that is a share.

        Only of columns of which the table of completions has what was recorded.
        """
        found: dict[str, dict[Any, float]] = defaultdict(dict)
        for id_, row in self.greedy.items():
            # What could not be scored has no reward; files of others need not have that column.
            if row.get("reward", 0.0) is not None:
                found["accuracy"][id_] = found[f"accuracy/{row.get('domain')}"][id_] = is_right(row)
            # A problem with too long a prompt was not asked.
            if row.get("tokens"):
                found["mean_length"][id_] = float(row["tokens"])
                found["truncated"][id_] = row.get("finish_reason") == "length"
            for column, value in (row.get("counted") or {}).items():
                if value is not None:
                    found[column][id_] = value
        sampled: dict[Any, list[bool]] = defaultdict(list)
        for row in self._rows:
            if not row.get("greedy") and row.get("reward", 0.0) is not None:
                sampled[row.get("id"), row.get("prompt")].append(is_right(row))
        for column in self.numbers:
            if (match := PASS_AT.fullmatch(column)) and (k := int(match[1])):
                found[column] = {i: pass_at_k(len(r), sum(r), k) for i, r in sampled.items() if len(r) >= k}
        return {
            column: found[column]
            for column, number in self.numbers.items()
            if found.get(column) and abs(fmean(found[column].values()) - number) < 1e-9
        }

    def share(self, column: str) -> tuple[int, int] | None:
        """Of a column that is a share of problems: how many of them, and of how many. None where that is not known."""
        if values := [value for value in self.counted.get(column, {}).values() if isinstance(value, bool)]:
            return sum(values), len(values)
        return (self.right, self.judged) if column == "accuracy" and self.right is not None else None

    def interval(self, column: str) -> Interval | None:
        """The 95 % confidence interval of the number in a column, where the answers give one."""
        if share := self.share(column):
            return wilson_interval(*share)
        low, high = (self.numbers.get(f"{column}_{end}") for end in ("low", "high"))
        if low is not None and high is not None:
            return low, high
        found = mean_interval([*self.counted.get(column, {}).values()])
        return (max(found[0], 0.0), min(found[1], 1.0)) if found and PASS_AT.fullmatch(column) else found

    @cached_property
    def _rows(self) -> list[Record]:
        columns = ("id", "domain", "greedy", "prompt", "completion", "verdict", "detail")
        more = ("reward", "tokens", "finish_reason", "counted")
        return read_table(self.file, (*columns, *more)).to_pylist() if self.file else []

    def comparable(self, others: Iterable["Evaluation"]) -> list["Evaluation"]:
        """Those of the others that measured the same kind of thing: of the same split or by the same hook, and some of the same numbers."""
        alike = [each for each in others if (each.split, each.hook) == (self.split, self.hook)]
        return [each for each in alike if each.numbers.keys() & self.numbers.keys()]

    def pairs_with(self, before: "Evaluation") -> bool:
        """Whether both have the greedy answers to the same problems, which are those that their records counted."""
        return bool(self.counted and before.counted) and self.greedy.keys() == before.greedy.keys()


def is_scored(row: Record) -> bool:
    """Whether there were rewards to score the answer in a row of a table of completions by."""
    return row.get("verdict") != Verdict.UNSCORED


def is_right(row: Record) -> bool:
    """Whether the answer in a row of a table of completions is right."""
    return row.get("verdict") == "pass"


def compared_evaluations(run: RunRecord) -> list[Evaluation]:
    """The evaluations of all stages in the order in which they were made, each with its changes.

    Each is compared with one of the same problems: the last one of the stage that made the policy, else of the stage before, or the first one of its
    own stage. Where there is none, it is compared with the last one of that earlier stage, or else the first one of its own. Evaluations by which checkpoints
    are chosen are compared with one another alone, and so is what a hook measured. What the tables of completions count has a
    95 % interval: paired where both hold the same problems; else shares have an unpaired one.
    """
    evaluations: list[Evaluation] = []
    before: list[Evaluation] = []
    by_product: dict[Path, list[Evaluation]] = {}
    for stage in run.stages:
        made = [Evaluation(stage, record) for record in stage.evaluations]
        before = by_product.get(Path(stage.model_path).absolute(), before)
        for position, evaluation in enumerate(made):
            earlier, own = evaluation.comparable(before), evaluation.comparable(made[:position])[:1]
            paired = [list(filter(evaluation.pairs_with, candidates)) for candidates in (earlier, own)]
            alike = paired[0] or paired[1] or earlier or own
            if alike:
                evaluation.before = alike[-1]
                shared = [column for column in evaluation.numbers if column in alike[-1].numbers]
                evaluation.changes = {column: _change(column, alike[-1], evaluation) for column in shared}
        # Where it is now, and where it was when others started from it.
        for place in filter(None, (stage.path, at(stage.recipe, "run", "dir"))):
            by_product[RunDirectory(Path(place)).final_directory.absolute()] = made
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
    these problems, as (before, after): of those with rewards, or else of all. None without two such evaluations of problems."""
    everything = [each for each in evaluations if not each.hook and each.greedy]
    for found in ([each for each in everything if "accuracy" in each.numbers], everything):
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
    was, now = before.counted.get(column, {}), after.counted.get(column, {})
    shares = before.share(column), after.share(column)
    if now and was.keys() == now.keys():
        pairs = [(was[id_], value) for id_, value in now.items()]
        if shares[0] and shares[1]:
            interval = paired_interval(pairs.count((False, True)), pairs.count((True, False)), len(pairs))
            return Change(difference, interval, PAIRED)
        means = mean_interval([new - old for old, new in pairs])
        return Change(difference, means, MEANS if means else "")
    if shares[0] and shares[1]:
        return Change(difference, unpaired_interval(*shares[0], *shares[1]), UNPAIRED)
    return Change(difference)


def _config(stage: Stage, whole_run: Path) -> Record:
    """The policy's configuration; empty where none can be read."""
    for directory in stage.model_directories(whole_run):
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return config if isinstance(config, dict) else {}
    return {}
