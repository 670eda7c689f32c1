"""Experiment trackers that follow a run. Whatever a tracker does, the run goes on."""

import importlib.util
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, Self

from align.errors import UserError
from align.run.directory import RunDirectory
from align.run.files import read_jsonl_lines, redacted, without_secrets_in, write_atomically
from align.run.tensorboard import Scalars, TensorBoard
from align.run.tracker_libraries import (
    FINISH_TIMEOUT_S,
    LIBRARIES,
    START_TIMEOUT_S,
    Ending,
    Row,
    TrackedRun,
    Tracker,
    check_wandb,
)

if TYPE_CHECKING:
    from align.recipe import TrackerOptions

logger = logging.getLogger(__name__)

PROJECT = "moe-align"
PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}


def check_trackers(trackers: "Sequence[TrackerOptions]") -> None:
    """Raise UserError for a tracker that is not installed, or that nobody is logged in to."""
    for options in trackers:
        name = options.name
        spec = importlib.util.find_spec(name)
        # wandb leaves a directory of its name where it ran, which Python takes for a package without files.
        if spec is None or spec.origin is None:
            raise UserError(
                f"trackers: {name} is not installed: `pip install {name}` (`pip install 'moe-align[trackers]'` installs all), or leave it out"
            )
        if name == "wandb":
            check_wandb()


class Follower(Protocol):
    """What hears of a run step by step. Its methods may raise whatever they like; it is then heard of no more."""

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None: ...

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None: ...

    def rewind(self, step: int) -> None:
        """The run goes back: it is about to make `step` again, and has cut its own metrics to what was before."""

    def finish(self, ending: Ending) -> None: ...


class Trackers:
    """The trackers of a run. One that fails is left alone from then on, with one warning."""

    def __init__(
        self, followers: Mapping[str, Follower] | None = None, samples: Mapping[str, int] | None = None
    ) -> None:
        """`samples`: how many rows of a table each follower gets; none where it is not named."""
        self._followers = dict(followers or {})
        self._samples = dict(samples or {})

    @classmethod
    def of(
        cls, trackers: "Sequence[TrackerOptions]", name: str, recipe: Mapping[str, Any], directory: RunDirectory
    ) -> Self:
        """The trackers of the run `name` in `directory`, whose `recipe` is ready for JSON. Nothing is started before the first metrics."""
        run = TrackedRun(name, without_secrets_in(recipe), directory.trackers_directory)
        followers: dict[str, Follower] = {}
        for options in trackers:
            if options.name == "tensorboard":
                followers[options.name] = TensorBoard(
                    directory.tensorboard_directory,
                    run.recipe,
                    lambda: _scalars_in(directory.metrics_file, 0, _lines_of(directory.metrics_file)),
                )
            else:
                library = LIBRARIES[options.name](_project(options))
                followers[options.name] = Background(options.name, library, run, directory.metrics_file)
        return cls(followers, {options.name: options.samples for options in trackers})

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        """Pass on what was measured in a step, `time` in seconds since 1970."""
        self._tell(lambda _, follower: follower.scalars(step, values, time))

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Pass on some rows of a table, evenly spread, to the followers that take any: of each row the cells with a single value."""

        def tell(tracker: str, follower: Follower) -> None:
            if (count := min(self._samples.get(tracker, 0), len(rows))) > 0:
                chosen = [rows[place * len(rows) // count] for place in range(count)]
                follower.table(step, name, [_shown(row) for row in chosen])

        self._tell(tell)

    def rewind(self, step: int) -> None:
        """Tell that `step` and what follows it is made again."""
        self._tell(lambda _, follower: follower.rewind(step))

    def begin_anew(self) -> None:
        """Have a run that goes on with another recipe followed as one of its own by trackers that have more of it than it has itself: they take no
        number back."""
        self._tell(lambda _, follower: follower.begin_anew() if isinstance(follower, Background) else None)

    def finish(self, ending: Ending) -> None:
        """End the trackers; the second time it does nothing."""
        self._tell(lambda _, follower: follower.finish(ending))
        self._followers.clear()

    def _tell(self, what: Callable[[str, Follower], None]) -> None:
        for name, follower in list(self._followers.items()):
            try:
                what(name, follower)
            except Exception as error:
                del self._followers[name]
                logger.warning(
                    "tracker %s failed and is left alone from here on (%s: %s); metrics.jsonl has everything, and where the run is "
                    "resumed the tracker gets what it has missed",
                    name,
                    type(error).__name__,
                    error,
                )


@dataclass
class Sent:
    """What a tracker has of a run: the id of its run there, how many lines of metrics.jsonl, up to which step each table, and of the run in which
    directory."""

    run: str | None = None
    lines: int = 0
    tables: dict[str, int] = field(default_factory=dict)
    directory: str = ""

    @classmethod
    def read(cls, file: Path) -> Self:
        with suppress(FileNotFoundError):
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        return cls()


class Background:
    """Follows a run for a tracker, from a thread of its own: a tracker that is slow or hangs holds nothing up.

    The lines of metrics.jsonl are counted, and the count of those sent is kept beside the run. So a step that a resumed run makes
    again is not sent twice, and what was measured while the tracker was down is sent when the run goes on.
    """

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, metrics_file: Path) -> None:
        self._name, self._tracker, self._run, self._metrics_file = name, tracker, run, metrics_file
        self._state_file = run.directory / f"{name}.json"
        self._lines = _lines_of(metrics_file)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._began, self._started = 0.0, threading.Event()
        self._failure: Exception | None = None
        self._sent = Sent()

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        line = self._lines
        self._lines += 1
        self._do(lambda: self._send_scalars(line, step, values, time))

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        self._do(lambda: self._send_table(step, name, rows))

    def rewind(self, step: int) -> None:
        self._lines = _lines_of(self._metrics_file)

    def begin_anew(self) -> None:
        """Called before the thread starts."""
        if Sent.read(self._state_file).lines > self._lines:
            self._state_file.unlink()

    def finish(self, ending: Ending) -> None:
        """Raises TimeoutError where the tracker takes too long."""
        if self._thread is None:
            return
        self._queue.put(lambda: self._tracker.finish(ending))
        self._queue.put(None)
        end = monotonic() + FINISH_TIMEOUT_S
        if not self._started.wait(max(0.0, self._began + START_TIMEOUT_S - monotonic())):
            self._tracker.abandon()
            raise TimeoutError(f"it has not answered for {monotonic() - self._began:.0f} seconds")
        self._thread.join(max(0.0, end - monotonic()))
        if self._failure is not None:
            raise self._failure
        if self._thread.is_alive():
            self._tracker.abandon()
            raise TimeoutError(f"it was still sending {FINISH_TIMEOUT_S:.0f} seconds after the end of the run")

    def _do(self, work: Callable[[], None]) -> None:
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"tracker {self._name}", daemon=True)
            self._began = monotonic()
            self._thread.start()
        self._queue.put(work)

    def _work(self) -> None:
        try:
            self._sent = Sent.read(self._state_file)
            here, before = self._state_file.parent.absolute(), Path(self._sent.directory or self._state_file.parent)
            original = Sent.read(before / self._state_file.name)
            if before.is_dir() and not before.samefile(here) and original.run == self._sent.run:
                # This run is a copy, and would write into the original's.
                self._sent = Sent()
            self._sent.directory = str(here)
            self._sent.run = self._tracker.start(self._run, self._sent.run)
            self._save()
            self._started.set()
            while (work := self._queue.get()) is not None:
                work()
        except Exception as error:
            self._failure = error
            self._started.set()
            self._tracker.abandon()

    def _send_scalars(self, line: int, step: int, values: Mapping[str, float], time: float) -> None:
        if line < self._sent.lines:
            return
        for missed in _scalars_in(self._metrics_file, self._sent.lines, line):
            self._tracker.scalars(*missed)
        self._tracker.scalars(step, values, time)
        self._sent.lines = line + 1
        self._save()

    def _send_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        if step <= self._sent.tables.get(name, -1):
            return
        self._tracker.table(step, name, rows)
        self._sent.tables[name] = step
        self._save()

    def _save(self) -> None:
        write_atomically(self._state_file, json.dumps(asdict(self._sent)))


def _lines_of(file: Path) -> int:
    """The whole lines of a file; that of a killed run may end in part of one."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _scalars_in(file: Path, first: int, end: int) -> Iterator[Scalars]:
    """(step, values, time) of lines `first` to `end` of metrics.jsonl, the end excluded."""
    for _, row in islice(read_jsonl_lines(file), first, end) if first < end else ():
        step, stage, time = row.pop("step"), row.pop("stage"), row.pop("time")
        yield step, {f"{stage}/{name}": float(value) for name, value in row.items()}, time


def _shown(row: Mapping[str, Any]) -> Row:
    """The cells of a row that have a single value; without secrets."""
    return {
        name: redacted(value) if isinstance(value, str) else value
        for name, value in row.items()
        if isinstance(value, str | int | float | None)
    }


def _project(options: "TrackerOptions") -> str:
    return options.project or os.environ.get(PROJECT_VARIABLES.get(options.name, "")) or PROJECT
