"""A run: its directory, metrics and display, and how it ends."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from align.config import Recipe, dump_recipe
from align.errors import UserError
from align.evaluate.problems import Evaluation
from align.run import (
    MetricsLog,
    Progress,
    RunDirectory,
    check_machine,
    environment_record,
    json_line,
    write_samples,
)


@dataclass(frozen=True, slots=True)
class Run:
    """Where a stage writes and what it shows."""

    directory: RunDirectory
    metrics: MetricsLog
    progress: Progress

    def warn(self, text: str) -> None:
        """A warning: a line on the terminal and an event of the run."""
        self.progress.warn(text)
        self.metrics.event("warning", text)

    def record_evaluation(self, stage: str, step: int, name: str, evaluation: Evaluation) -> None:
        """Write an evaluation: its summary, its completions, and its numbers among the metrics."""
        write_samples(self.directory.evaluations_directory / f"{name}.parquet", evaluation.rows)
        with self.directory.evaluations_file.open("a", encoding="utf-8") as file:
            record = {"stage": stage, "step": step, "name": name, "problems": evaluation.problems}
            file.write(json_line(record | evaluation.summary() | {"verdicts": dict(evaluation.verdicts)}) + "\n")
        self.metrics.write(step, stage, {f"evaluation/{key}": value for key, value in evaluation.summary().items()})
        self.progress.note(f"{name}: {describe(evaluation)}")


def describe(evaluation: Evaluation) -> str:
    """An evaluation in a line."""
    sampled = "".join(f", pass@{k} {value:.1%}" for k, value in evaluation.pass_at.items())
    return f"{evaluation.accuracy:.1%} of {evaluation.problems} held-out problems right (greedy){sampled}"


def compare_stages(progress: Progress, evaluations: Mapping[str, Evaluation]) -> None:
    """Print the evaluations of a run one below the other."""
    ks: Sequence[int] = sorted({k for evaluation in evaluations.values() for k in evaluation.pass_at})
    rows = [
        [
            name,
            f"{e.accuracy:.1%}",
            *(f"{e.pass_at[k]:.1%}" if k in e.pass_at else "" for k in ks),
            f"{e.mean_length:.1f}",
        ]
        for name, e in evaluations.items()
    ]
    columns = ["policy", "greedy accuracy", *(f"pass@{k}" for k in ks), "tokens an answer"]
    progress.table("held-out problems", columns, rows)


@contextmanager
def open_run(recipe: Recipe, directory: RunDirectory | None = None, progress: Progress | None = None) -> Iterator[Run]:
    """Create the run of a recipe and own it; note how it ended. Ctrl-C and SIGTERM end it cleanly.

    With `directory` and `progress` it is a stage inside another run. Raises UserError before anything is written when
    the machine is too small or the directory is taken. A UserError before the first metrics takes the run back.
    """
    check_machine(
        cores=recipe.machine.cores,
        memory_gb=recipe.machine.memory_gb,
        hint="rollout.workers, rollout.kv_cache_gb and learner.ranks lower what is needed; then lower machine.cores and "
        "machine.memory_gb to match",
    )
    directory = directory or RunDirectory.create(recipe.directory, overwrite=recipe.run.overwrite)
    directory.save_recipe(dump_recipe(recipe))
    directory.save_environment(environment_record())
    directory.enter(recipe.stage)
    metrics = MetricsLog(directory)
    own = progress or Progress(log=directory.log_file)
    try:
        if progress is not None:
            yield Run(directory, metrics, own)
        else:
            with own, terminate_as_interrupt():
                yield Run(directory, metrics, own)
    except KeyboardInterrupt:
        directory.interrupt()
        raise
    except UserError as error:
        metrics.close()
        if directory.has_metrics:
            directory.fail(error)
        else:
            directory.discard()
        raise
    except BaseException as error:
        metrics.event("error", str(error), type=type(error).__name__)
        directory.fail(error)
        raise
    else:
        directory.finish()
    finally:
        metrics.close()


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> Any:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
