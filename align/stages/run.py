"""A run: its directory, metrics and display, and how it ends."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

from align.config import Recipe, SamplingRecipe, dump_recipe
from align.errors import UserError
from align.evaluate.problems import Evaluation
from align.run import (
    MetricsLog,
    Progress,
    RunDirectory,
    check_machine,
    environment_record,
    json_line,
    save_stacks,
    write_samples,
)
from align.stages.preflight import check_ready


@dataclass(frozen=True, slots=True)
class Run:
    """Where a stage writes and what it shows."""

    directory: RunDirectory
    metrics: MetricsLog
    progress: Progress
    stop: "StopRequest"

    def record_step(self, stage: str, step: int, metrics: Mapping[str, float], shown: Sequence[str]) -> None:
        """Write the metrics of a step and show some of them. Raises KeyboardInterrupt when the run was asked to stop."""
        self.metrics.write(step, stage, metrics)
        self.progress.step(step, {name: metrics[name] for name in shown if name in metrics})
        self.stop.check()

    def warn(self, text: str) -> None:
        """A warning: a line on the terminal and an event of the run."""
        self.progress.warn(text)
        self.metrics.event("warning", text)

    def record_evaluation(self, stage: str, step: int, name: str, evaluation: Evaluation) -> None:
        """Write an evaluation of answers, and say what came of it."""
        facts = {"problems": evaluation.problems, "verdicts": dict(evaluation.verdicts)}
        self.record_numbers(stage, step, name, evaluation.summary(), evaluation.rows, facts)
        self.progress.note(f"{name}: {describe(evaluation)}")

    def record_numbers(
        self,
        stage: str,
        step: int,
        name: str,
        numbers: Mapping[str, float],
        rows: Sequence[Mapping[str, Any]] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what an evaluation found: its numbers, also among the metrics, its rows, and other facts about it."""
        if rows:
            write_samples(self.directory.evaluations_directory / f"{name}.parquet", rows)
        with self.directory.evaluations_file.open("a", encoding="utf-8") as file:
            record = {"stage": stage, "step": step, "name": name, **numbers, **(facts or {})}
            file.write(json_line(record) + "\n")
        self.metrics.write(step, stage, {f"evaluation/{key}": value for key, value in numbers.items()})


def describe(evaluation: Evaluation) -> str:
    """An evaluation in a line."""
    domains = ", ".join(f"{name} {value:.1%}" for name, value in evaluation.by_domain.items())
    by_domain = f" ({domains})" if len(evaluation.by_domain) > 1 else ""
    sampled = "".join(f", pass@{k} {value:.1%}" for k, value in evaluation.pass_at.items())
    rates = "".join(f", {name} {value:.1%}" for name, value in main_rates(evaluation).items())
    return f"{evaluation.accuracy:.1%} of {evaluation.problems} held-out problems right{by_domain}{sampled}{rates}"


def main_rates(evaluation: Evaluation) -> dict[str, float]:
    """The rates that a line has room for: those of every single kind, such as "accuracy/kind/title", are in the report."""
    return {name: value for name, value in evaluation.rates.items() if name.count("/") < 2}


def compare_stages(progress: Progress, evaluations: Mapping[str, Evaluation]) -> None:
    """Print the evaluations of a run one below the other."""
    domains = list(dict.fromkeys(name for e in evaluations.values() for name in e.by_domain if len(e.by_domain) > 1))
    ks: Sequence[int] = sorted({k for evaluation in evaluations.values() for k in evaluation.pass_at})
    rates = list(dict.fromkeys(name for e in evaluations.values() for name in main_rates(e)))
    rows = [
        [
            name,
            f"{e.accuracy:.1%}",
            *(f"{e.by_domain[name]:.1%}" if name in e.by_domain else "" for name in domains),
            *(f"{e.pass_at[k]:.1%}" if k in e.pass_at else "" for k in ks),
            *(f"{e.rates[name]:.1%}" if name in e.rates else "" for name in rates),
            f"{e.mean_length:.1f}",
        ]
        for name, e in evaluations.items()
    ]
    columns = ["policy", "greedy accuracy", *domains, *(f"pass@{k}" for k in ks), *rates, "tokens an answer"]
    progress.table("held-out problems", columns, rows)


@contextmanager
def open_run(recipe: Recipe, directory: RunDirectory | None = None, outer: Run | None = None) -> Iterator[Run]:
    """Create the run of a recipe and own it; note how it ended. Ctrl-C and SIGTERM end it cleanly.

    With `directory` and `outer` it is a stage inside another run. Raises UserError before anything is written when the
    machine is too small, an evaluation's server does not answer or the directory is taken. A UserError before the first
    metrics takes the run back.
    """
    check_machine(
        cores=recipe.machine.cores,
        memory_gb=recipe.machine.memory_gb,
        hint="rollout.workers, rollout.kv_cache_gb and learner.ranks lower what is needed; then lower machine.cores and "
        "machine.memory_gb to match",
    )
    check_ready(recipe)
    directory = directory or RunDirectory.create(recipe.directory, overwrite=recipe.run.overwrite)
    directory.save_recipe(dump_recipe(recipe))
    directory.save_environment(environment_record())
    directory.enter(recipe.stage)
    metrics = MetricsLog(directory)
    try:
        if outer is not None:
            yield begun(Run(directory, metrics, outer.progress, outer.stop), recipe)
        else:
            with Progress(log=directory.log_file) as progress, StopRequest() as stop:
                yield begun(Run(directory, metrics, progress, stop), recipe)
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
        file = save_stacks(directory, getattr(error, "stacks", ""))
        metrics.event("error", str(error), type=type(error).__name__, **({"stacks": file} if file else {}))
        directory.fail(error)
        raise
    else:
        directory.finish()
    finally:
        metrics.close()


def begun(run: Run, recipe: Recipe) -> Run:
    """The run, once it has on record what its user took upon himself."""
    for term in recipe.rewards if isinstance(recipe, SamplingRecipe) else ():
        if term.params.get("unsafe_no_isolation"):
            run.warn(f"reward {term.component} runs model-written code with this user's rights (unsafe_no_isolation)")
    return run


class StopRequest:
    """Ctrl-C and SIGTERM, as KeyboardInterrupt where they come and, should that be lost, at the end of the step.

    Python loses an exception that is raised inside a destructor or a callback of native code.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt when a signal has come."""
        if self._asked:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        raise KeyboardInterrupt
