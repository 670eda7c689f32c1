"""A run: its directory, metrics and display, how it begins or goes on, and how it ends."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.evaluate.accuracy import Evaluation
from align.model.policy import first_line
from align.recipe import Recipe, SamplingRecipe, TrainingRecipe, differences, dump_recipe, kept_recipe, written_recipe
from align.run import (
    MetricsLog,
    Progress,
    RunDirectory,
    cut,
    environment_record,
    json_line,
    read_jsonl,
    read_status,
    synced_size,
    write_samples,
)
from align.run.checkpoints import PREFIX, Checkpoint, CheckpointDirectory, DamagedCheckpointError
from align.run.tracker_libraries import Ending
from align.run.trackers import Trackers
from align.session.disk import default_grace_s
from align.session.signals import StopRequest
from reward import RewardTerm
from reward.own.file import file_digest, files_of
from rollout import Fault

RESUMABLE = ("running", "interrupted", "failed")
PACKAGES = ("align", "rollout", "reward")
DOMAINS_OF_A_LINE = 4
"""More are not told one by one on the console: the report has them."""
SHARE_TO_TELL = 0.05
"""Of answers that were cut off: from so many on the console tells it."""


@dataclass(slots=True)
class Run:
    """Where a stage writes and what it shows. `resume` is the checkpoint from which it goes on, where there is one."""

    directory: RunDirectory
    metrics: MetricsLog
    checkpoints: CheckpointDirectory
    progress: Progress
    stop: StopRequest
    resume: Checkpoint | None = None

    def rewind(self) -> None:
        """Go back to the last whole checkpoint, or to the beginning where there is none yet, and say so.

        What was measured after it is cut off. Raises UserError when there are checkpoints and none is whole.
        """
        damages: list[str] = []
        self.checkpoints.sweep()
        try:
            self.resume = self.checkpoints.newest(damages.append)
        except DamagedCheckpointError as error:
            told = "; ".join([*damages, str(error)])
            raise UserError(
                f"{told}. What the run has measured is untouched; run.overwrite=true starts it again from the beginning"
            ) from None
        done = self.resume.step if self.resume else 0
        kept = self._kept()
        for file in logs_of(self.directory):
            cut(file, kept.get(file.name, 0))
        for file in self.directory.samples_directory.glob("step_*.parquet"):
            if int(file.stem.removeprefix("step_")) > done:
                file.unlink()
        self.metrics.trackers.rewind(done + 1)
        for damage in damages:
            self.warn(damage)
        text = f"resuming from step {done}" if self.resume else "nothing of it was saved yet, so it begins at step 0"
        self.progress.note(f"{self.directory.path.name}: {text}")
        self.metrics.event("resumed", text, step=done)

    def _kept(self) -> Mapping[str, int]:
        """How much of each log is of before `resume`; of a finished run that was made longer, everything."""
        if self.resume is None:
            return {}
        file = self.directory.lengthened_file
        ended: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return dict((ended if ended.get("step") == self.resume.step else self.resume.facts)["positions"])

    def record_step(self, stage: str, step: int, metrics: Mapping[str, float | None], shown: Sequence[str]) -> None:
        """Write the metrics of a step, without those that are None, and show some of them; tell where a bad gradient kept the weights as they were.

        Raises KeyboardInterrupt when the run was asked to stop.
        """
        known = {name: value for name, value in metrics.items() if value is not None}
        if "gradient_norm" in known:
            skipped = not isfinite(known["gradient_norm"])
            known["skipped_update"] = float(skipped)
            if skipped:
                self.warn(f"{stage} step {step}: the gradient was not finite, so that its update was left out")
        self.metrics.write(step, stage, known)
        self.progress.step(step, {name: known[name] for name in shown if name in known})
        self.stop.check()

    def record_samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the samples of a step to their file, and some to the trackers that take them."""
        write_samples(self.directory.samples_file(step), rows)
        self.metrics.trackers.table(step, f"{stage}/samples", rows)

    def warn(self, text: str, **data: Any) -> None:
        """A warning: a line on the terminal and an event of the run, with `data`."""
        self.progress.warn(text)
        self.metrics.event("warning", text, **data)

    def tell(self, kind: str, text: str, **data: Any) -> None:
        """A line on the terminal and an event of the run, of a kind of its own, with `data`."""
        self.progress.note(text)
        self.metrics.event(kind, text, **data)

    def record_fault(self, fault: Fault) -> None:
        """What happened to a rollout worker: a line, an event, and a file with its stacks where there are any."""
        file = self.directory.save_stacks(fault.stacks)
        seen = {"stacks": file} if file else {}
        self.progress.warn(fault.message)
        self.metrics.event("rollout_worker", fault.message, worker=fault.worker, state=str(fault.state), **seen)

    @contextmanager
    def logged_warnings(self) -> Iterator[None]:
        """Record what these packages log as a warning in this process: as a warning of the innermost run, where one is inside another.

        `extra={"facts": {...}}` of a logging call becomes the data of the event.
        """
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.warn(record.getMessage(), **getattr(record, "facts", {}))  # type: ignore[method-assign]
        loggers = [logging.getLogger(name) for name in PACKAGES]
        before = [logger.handlers for logger in loggers]
        for logger in loggers:
            logger.handlers = [handler]
        try:
            yield
        finally:
            for logger, handlers in zip(loggers, before, strict=True):
                logger.handlers = handlers

    def record_evaluation(self, stage: str, step: int, name: str, evaluation: Evaluation, split: str = "") -> None:
        """Write an evaluation of answers, and say what came of it; `split` where it is not the one of the stage's others."""
        facts: dict[str, Any] = {"problems": evaluation.problems, "verdicts": dict(evaluation.verdicts)}
        facts |= {"too_long": evaluation.too_long} if evaluation.too_long else {}
        facts |= {"split": split} if split else {}
        called = split or "evaluation"
        self.record_numbers(stage, step, name, evaluation.summary(), evaluation.rows, facts, called, called)
        self.progress.note(f"{name}: {describe(evaluation)}")

    def record_numbers(
        self,
        stage: str,
        step: int,
        name: str,
        numbers: Mapping[str, float],
        rows: Sequence[Mapping[str, Any]] = (),
        facts: Mapping[str, Any] | None = None,
        table: str = "",
        prefix: str = "evaluation",
    ) -> None:
        """Write what an evaluation found: its numbers, also among the metrics as `prefix`/NUMBER, its rows, and other facts about it.

        Trackers call the table of its rows `table`, or `name` where that is empty.
        """
        if rows:
            write_samples(self.directory.evaluations_directory / f"{name}.parquet", rows)
            self.metrics.trackers.table(step, f"{stage}/{table or name}", rows)
        with self.directory.evaluations_file.open("a", encoding="utf-8") as file:
            record = {"stage": stage, "step": step, "name": name, **numbers, **(facts or {})}
            file.write(json_line(record) + "\n")
        self.metrics.write(step, stage, {f"{prefix}/{key}": value for key, value in numbers.items()})


def logs_of(directory: RunDirectory) -> list[Path]:
    """What a run appends to."""
    return [directory.metrics_file, directory.events_file, directory.evaluations_file]


def positions(directory: RunDirectory) -> dict[str, int]:
    """How long the logs of a run are, once they are on the disk."""
    return {file.name: synced_size(file) for file in logs_of(directory)}


def recorded_evaluations(directory: RunDirectory, domains: Sequence[str]) -> dict[str, Evaluation]:
    """The evaluations of answers that a run has recorded, by name; without their rows."""
    file = directory.evaluations_file
    records = read_jsonl(file) if file.exists() else []
    return {r["name"]: Evaluation.of_record(r, domains) for r in records if "verdicts" in r}


def describe(evaluation: Evaluation) -> str:
    """An evaluation in a line."""
    domains = evaluation.by_domain
    told = ", ".join(f"{name} {value:.1%}" for name, value in domains.items())
    if len(domains) > DOMAINS_OF_A_LINE:
        told = f"{min(domains.values()):.1%} to {max(domains.values()):.1%} in {len(domains)} domains"
    by_domain = f" ({told})" if len(domains) > 1 else ""
    sampled = "".join(f", pass@{k} {value:.1%}" for k, value in evaluation.pass_at.items())
    rates = "".join(f", {name} {value:.1%}" for name, value in main_rates(evaluation).items())
    if evaluation.truncated >= SHARE_TO_TELL:
        rates += f", {evaluation.truncated:.0%} of the answers cut off"
    too_long = evaluation.too_long
    not_asked = f"; {too_long} have prompts that are too long, and count as not right" if too_long else ""
    unjudged = evaluation.problems - evaluation.judged
    left_out = f"; {unjudged} could not be judged, and do not count" if unjudged else ""
    if not evaluation.scored:
        return (
            f"{evaluation.problems} held-out prompts answered in {evaluation.mean_length:.1f} tokens on average{rates}"
        )
    return f"{evaluation.accuracy:.1%} of {evaluation.judged} held-out problems right{by_domain}{sampled}{rates}{not_asked}{left_out}"


def main_rates(evaluation: Evaluation) -> dict[str, float]:
    """The rates that a line has room for: those of every single kind, such as "accuracy/kind/title", are in the report."""
    return {name: value for name, value in evaluation.rates.items() if name.count("/") < 2}


def compare_stages(progress: Progress, evaluations: Mapping[str, Evaluation]) -> None:
    """Print the evaluations of a run one below the other."""
    shown = [e.by_domain for e in evaluations.values() if 1 < len(e.by_domain) <= DOMAINS_OF_A_LINE]
    domains = list(dict.fromkeys(name for by_domain in shown for name in by_domain))
    ks: Sequence[int] = sorted({k for evaluation in evaluations.values() for k in evaluation.pass_at})
    rates = list(dict.fromkeys(name for e in evaluations.values() for name in main_rates(e)))
    rows = [
        [
            name,
            f"{e.accuracy:.1%}" if e.scored else "",
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
def open_run(recipe: Recipe) -> Iterator[Run]:
    """Own the run of a recipe, a new one or one that was interrupted; note how it ended. Ctrl-C and SIGTERM end it cleanly.

    Raises UserError before anything is written when the directory holds another run. A UserError before the first metrics takes
    a new run back.
    """
    directory, changed = own_directory(recipe, recipe.directory)
    goes_on = changed is not None
    if not goes_on:
        keep_recipe(directory, recipe)
    directory.save_environment(environment_record() | {"rewards_sha256": reward_digests(recipe.roles().rewards)})
    directory.enter(recipe.stage)
    keep = recipe.keep_checkpoints if isinstance(recipe, TrainingRecipe) else 1
    trackers = Trackers.of(recipe.trackers, recipe.name, recipe.model_dump(mode="json"), directory)
    metrics = MetricsLog(directory, trackers)
    checkpoints = CheckpointDirectory(directory.checkpoints_directory, keep=keep)
    try:
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(log=directory.log_file))
            grace_s = recipe.run.grace_s
            if grace_s is None:
                grace_s = default_grace_s(recipe.model, recipe.roles().learner)
            stop = stack.enter_context(StopRequest(grace_s))
            run = Run(directory, metrics, checkpoints, progress, stop)
            stack.enter_context(run.logged_warnings())
            stack.push(lambda kind, *_: trackers.finish(ending_of(kind)))
            if changed is not None and isinstance(recipe, TrainingRecipe):
                go_on(run, recipe, changed)
            for term in recipe.rewards if isinstance(recipe, SamplingRecipe) else ():
                if term.params.get("unsafe_no_isolation"):
                    run.warn(
                        f"reward {term.component} runs model-written code with this user's rights (unsafe_no_isolation)"
                    )
            yield run
    except KeyboardInterrupt:
        directory.interrupt()
        raise
    except UserError as error:
        metrics.close()
        if goes_on or directory.has_metrics:
            directory.fail(error)
        else:
            directory.discard()
        raise
    except BaseException as error:
        with suppress(OSError):  # of a full disk, which may be what ended it
            file = directory.save_stacks(getattr(error, "stacks", ""))
            metrics.event("error", str(error), type=type(error).__name__, **({"stacks": file} if file else {}))
        directory.fail(error)
        raise
    else:
        directory.finish()
    finally:
        metrics.close()


def go_on(run: Run, recipe: TrainingRecipe, changed: Sequence[str]) -> None:
    """Go back to the last checkpoint, and say what has `changed` of the recipe, also since that was written.

    The recipe is kept when the checkpoint is restored, which may refuse it; without one at once. Raises UserError for fewer steps than were made.
    """
    run.rewind()
    refuse_fewer_steps(f"{recipe.stage}.steps", recipe.steps, run.resume)
    if changed:
        run.metrics.trackers.begin_anew()
    for key in dict.fromkeys([*changed, *changes_since(run.resume, run.directory, recipe)]):
        run.warn(f"going on with another recipe: {key}")
    run.directory.note_checkpoint(run.resume.step if run.resume else None)
    if run.resume is None:
        keep_recipe(run.directory, recipe)


def ending_of(kind: type[BaseException] | None) -> Ending:
    """How a run ended, by the kind of the exception that ended it."""
    if kind is None:
        return "finished"
    return "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"


def own_directory(recipe: Recipe, path: Path) -> tuple[RunDirectory, list[str] | None]:
    """The directory of a run; and for one that goes on what has changed of its recipe, None for a new one.

    An interrupted run of a stage that trains goes on; one of another stage begins anew. Raises UserError where the directory
    holds another run, finished or of another recipe.
    """
    status, there = read_status(path), RunDirectory(path.expanduser().absolute())
    interrupted = status is not None and status["state"] in RESUMABLE and there.recipe_file.exists()
    if not isinstance(recipe, TrainingRecipe):
        # It holds nothing to go on from.
        anew = not recipe.run.overwrite and interrupted and not changes(there, recipe)
        return RunDirectory.create(path, overwrite=recipe.run.overwrite or anew), None
    if recipe.run.overwrite or not interrupted:
        return RunDirectory.create(path, overwrite=recipe.run.overwrite), None
    changed = refuse_changes(there, recipe)
    refuse_lost_checkpoints(there)
    return RunDirectory.reopen(path), changed


def keep_recipe(directory: RunDirectory, recipe: Recipe) -> None:
    """Write the recipe that a run is made with; consent to changes is given anew each time."""
    asked = recipe.model_copy(update={"run": recipe.run.model_copy(update={"allow_changes": False})})
    directory.save_recipe(dump_recipe(asked))


def refuse_lost_checkpoints(directory: RunDirectory) -> None:
    """Raise UserError where a run has none of the checkpoints that it has written: from its beginning it would measure all again."""
    step = (read_status(directory.path) or {}).get("checkpoint")
    if step and not any(directory.checkpoints_directory.glob(f"{PREFIX}*")):
        raise UserError(
            f"{directory.path} has written a checkpoint of step {step}, and there is none in {directory.checkpoints_directory} any more: put it back. "
            "What the run has measured is untouched; run.overwrite=true starts it again from the beginning"
        )


def changes_since(checkpoint: Checkpoint | None, directory: RunDirectory, recipe: TrainingRecipe) -> list[str]:
    """What has changed of the recipe since a checkpoint was written, but for the number of steps: what was told of it afterwards is cut off."""
    if checkpoint is None:
        return []
    try:
        found = differences(written_recipe(checkpoint.facts["recipe"], directory.recipe_file), recipe)
    except UserError as error:  # of an earlier version, and no longer valid
        return [f"that of step {checkpoint.step} could not be compared ({first_line(error)})"]
    return [key for key in found if not key.startswith(f"{recipe.stage}.steps ")]


def refuse_fewer_steps(key: str, steps: int, checkpoint: Checkpoint | None) -> None:
    """Raise UserError where `steps`, from the recipe's `key`, are fewer than had been made when the checkpoint was written."""
    if checkpoint is not None and checkpoint.step > steps:
        raise UserError(f"{key} is {steps}, and {checkpoint.path} is of step {checkpoint.step}: give as many or more")


def refuse_changes(directory: RunDirectory, recipe: Recipe, allowed: Sequence[str] = ()) -> list[str]:
    """What has changed of a run's recipe but for the overrides `allowed`. Raises UserError where anything has and the recipe does not allow it."""
    changed = changes(directory, recipe, allowed)
    if changed and not recipe.run.allow_changes:
        raise UserError(
            f"{directory.path} holds a run of another recipe: {'; '.join(changed)}. Go on with that recipe "
            f"(`align resume {directory.path}`), replace the run with run.overwrite=true, or go on with this recipe with "
            "run.allow_changes=true"
        )
    return changed


def changes(directory: RunDirectory, recipe: Recipe, allowed: Sequence[str] = ()) -> list[str]:
    """What has changed since the run in a directory began: keys of its recipe, and the content of its reward files.

    The overrides `allowed` are no changes.
    """
    before: Mapping[str, str] = {}
    if directory.environment_file.exists():
        before = json.loads(directory.environment_file.read_text(encoding="utf-8")).get("rewards_sha256", {})
    digests = reward_digests(recipe.roles().rewards)
    files = [file for file, digest in digests.items() if before.get(file, digest) != digest]
    try:
        keys = differences(kept_recipe(directory.recipe_file, allowed), recipe)
    except UserError as error:  # of an earlier version, and no longer valid
        keys = [f"that of the run could not be compared ({first_line(error)})"]
    return [*keys, *(f"rewards (the content of {file} has changed)" for file in files)]


def reward_digests(rewards: Sequence[RewardTerm]) -> dict[str, str]:
    """The SHA-256 of every file that has one of the rewards, and of those beside it that it imports, by its path."""
    named = [term.file for term in rewards if term.file is not None]
    return {str(each): file_digest(each) for file in named for each in files_of(file)}
