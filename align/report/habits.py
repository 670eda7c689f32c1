"""The habits of a run: its evaluations against the first, its steps against the first ones, all read from the files of the run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from align.habits import Answer, Comparison, Found, answer_of_row, compare
from align.report.read import RunRecord, Stage, at, read_run, read_table
from align.run import RunDirectory, read_status

COLUMNS = ("id", "domain", "prompt", "completion", "metadata", "finish_reason", "greedy")
START_PROMPTS, PROMPTS = 24, 36
"""Prompts that the steps at the start, and the last steps, have together at least; one that comes in two steps counts twice."""
STEP_ANSWERS = 512
"""Answers of a step that are looked at."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the answers called `name` have that those called `against` did not."""

    name: str
    against: str
    found: Comparison


@dataclass(frozen=True)
class Answered:
    """The table of the answers of an evaluation."""

    stage: Stage
    name: str
    split: str
    file: Path

    @cached_property
    def answers(self) -> list[Answer]:
        """The greedy answers."""
        rows = read_table(self.file, COLUMNS).to_pylist()
        return [answer_of_row(row) for row in rows if row.get("greedy", True)]

    @cached_property
    def found(self) -> Found:
        return Found.of(self.answers)

    def is_like(self, other: "Answered") -> bool:
        """Whether both are of one split, and half of the prompts in both."""
        mine, others = ({answer.prompt for answer in each.answers} for each in (self, other))
        return self.split == other.split and 2 * len(mine & others) >= max(len(mine), len(others), 1)


def evaluation_habits(run: RunRecord, *, only: tuple[Path, str] | None = None, last: bool = False) -> Iterator[Told]:
    """Each evaluation of a run against the first one of the same problems; an evaluation of randomly initialised weights is left out.

    With `only`, that of a stage's directory with this name; with `last`, the last of each stage and split.
    """
    made = [
        Answered(stage, name, str(record.get("split") or ""), file)
        for stage in run.stages
        for record in stage.evaluations
        if "verdicts" in record and (file := stage.evaluation_file(name := str(record.get("name"))))
        if record.get("step") or at(stage.recipe, "model", "init") != "random"
    ]
    for place, now in enumerate(made):
        later = [each for each in made[place + 1 :] if each.stage is now.stage and each.split == now.split]
        wanted = only in (None, (now.stage.path, now.name)) and not (last and later)
        start = next((each for each in made[:place] if wanted and each.is_like(now)), None)
        if start is not None:
            name, against = (run.title_of(e.stage, e.name) for e in (now, start))
            yield Told(name, against, compare(start.found, now.found))


def last_evaluation_habits(directory: Path, name: str) -> Told | None:
    """An evaluation of the run in `directory` against the first one, which the run around it may have; None without such a one."""
    around = directory.parent if read_status(directory.parent) is not None else directory
    return next(evaluation_habits(read_run(around), only=(directory, name)), None)


def step_habits(stage: Stage, *, start: Found | None = None, last: bool = False) -> Iterator[Told]:
    """The samples of the last steps, step by step, against those of the first (or against `start`); or only those of the `last` steps."""
    windows = StepWindows(start)
    steps = list(stage.samples.items())
    for place, (step, file) in enumerate(steps):
        if last and windows.can_skip(len(steps) - place):
            continue
        windows.add(found_in(file))
        before, now = windows.start, windows.now
        if before and now and (step == max(stage.samples) or not last):
            against = "the start given" if start else f"the first {windows.first_steps} steps"
            yield Told(f"{stage.label}, step {step}", against, compare(before, now))


def step_found(run: RunDirectory, step: int) -> Found:
    """What is in the samples of a step, nothing where they are not there."""
    file = run.samples_file(step)
    return found_in(file) if file.exists() else Found.of([])


def found_in(file: Path) -> Found:
    """What is in the samples of a step's file."""
    return Found.of([answer_of_row(row) for row in read_table(file, COLUMNS).to_pylist()], STEP_ANSWERS)


class StepWindows:
    """Of the steps that were added: the first ones, until they have `START_PROMPTS`, and the last ones after these, with `PROMPTS`.

    With a `start`, this is in the place of the first ones.
    """

    def __init__(self, start: Found | None = None) -> None:
        self._given = start is not None
        self._first: list[Found] = [start] if start is not None else []
        self._last: list[Found] = []

    def add(self, step: Found) -> None:
        if not self._given and _prompts(self._first) < START_PROMPTS:
            self._first.append(step)
            return
        self._last.append(step)
        while _prompts(self._last[1:]) >= PROMPTS:
            del self._last[0]

    def can_skip(self, steps: int) -> bool:
        """Whether the next step will have left the window when so many more, itself among them, have been added."""
        return steps > PROMPTS and (self._given or _prompts(self._first) >= START_PROMPTS)

    @property
    def first_steps(self) -> int:
        return len(self._first)

    @property
    def start(self) -> Found | None:
        return Found.together(self._first) if self._first else None

    @property
    def now(self) -> Found | None:
        return Found.together(self._last) if self._last else None


def _prompts(steps: Sequence[Found]) -> int:
    return sum(len({answer.prompt for answer in step.answers}) for step in steps)
