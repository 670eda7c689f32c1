"""A pipeline: one stage after the other, each a process and a run of its own inside the pipeline's directory.

What is done is skipped. A stage that was cut short goes on from its last checkpoint, and so ends as it would have.
"""

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

from align.errors import Terminated, UserError
from align.recipe import Pipeline, PlannedStage
from align.recipe.load import read_yaml
from align.run import RunDirectory, environment_record, read_status
from align.run.checkpoints import CheckpointDirectory
from align.run.directory import LAYOUT
from align.session.checks import check, check_rewards_ready
from align.session.run import changes
from align.session.signals import StopRequest

COMMANDS = {"sft": "sft", "reward_model": "reward-model", "dpo": "dpo", "preferences": "preferences", "grpo": "grpo"}
INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 75}
"""The exit status of a stage that was stopped by a signal."""
PR_SET_PDEATHSIG = 1


def run_pipeline(pipeline: Pipeline, start: str | None, last: str | None = None) -> int:
    """Run what is not done yet, or everything from the stage `start` on, up to `last`. Returns the exit status.

    The pipeline has finished when all its stages have, and is paused when those after `last` are still to run. Raises
    UserError when the pipeline has no such stage or `last` is before `start`, when a finished stage was run with another
    recipe, or one to go on with was cut short with another, and when an evaluation of a stage to come could not be run, such as one whose
    judge is down.
    """
    check_place(pipeline)
    due = stages_to_run(pipeline, start)
    goes_on = start is None and bool(due) and was_cut_short(due[0])
    if goes_on and (changed := changed_keys(due[0])) and not due[0].recipe.run.allow_changes:
        raise UserError(
            f"stage {due[0].name!r} was cut short with another recipe ({due[0].directory / 'recipe.yaml'}): {', '.join(changed)}; go on with that "
            f"recipe, run the stage anew with --from {due[0].name}, or go on with this one with run.allow_changes=true"
        )
    end = place(pipeline, "--to", last) if last is not None else len(pipeline.stages)
    if start is not None and end < place(pipeline, "--from", start):
        raise UserError(f"--to {last} comes before --from {start}: nothing would be run")
    parts = [part for stage in pipeline.stages[: end + 1] if stage in due for part in stage.parts]
    check(parts)
    check_rewards_ready(parts)
    directory = RunDirectory.reopen(pipeline.directory)
    directory.save_recipe(pipeline.text)
    directory.save_environment(environment_record())
    for stage in due:
        if not (goes_on and stage is due[0]):
            forget(stage)
    with StopRequest():
        for number, stage in enumerate(pipeline.stages):
            now = stage in due and number <= end
            what = "not now" if stage in due else "done before"
            if now:
                directory.enter(stage.name)
                what = f"align {COMMANDS[stage.recipe.stage]} {stage.file}"
            say(directory, f"[{number + 1}/{len(pipeline.stages)}] {stage.name}: {what}")
            if now and (status := run_stage(stage)):
                stopped(directory, stage, status)
                return status
    if any(stage in due for stage in pipeline.stages[end + 1 :]):
        say(directory, f"paused after stage {last}; the same command without --to goes on there")
        directory.pause()
    else:
        directory.finish()
    return 0


def check_place(pipeline: Pipeline) -> None:
    """Raise UserError where the pipeline's directory holds another run, and for a stage that is called like a part of a run."""
    if named := [stage.name for stage in pipeline.stages if stage.name in LAYOUT and not read_status(stage.directory)]:
        raise UserError(
            f"stage {named[0]!r}: {pipeline.directory} has something else of that name; call the stage otherwise"
        )
    kept = RunDirectory(pipeline.directory).recipe_file
    if kept.exists() and "stages" not in read_yaml(kept)[0]:
        raise UserError(f"{pipeline.directory} holds a run of a single recipe: give the pipeline another run.dir")


def forget(stage: PlannedStage) -> None:
    """A stage that is to run again, and that of its `init_from`, are no longer done: their inputs may change before their turn, which may never come."""
    for part in stage.parts:
        if read_status(part.directory) is not None:
            directory = RunDirectory.reopen(part.directory)
            CheckpointDirectory(directory.checkpoints_directory).clear()
            directory.note_checkpoint(None)
            directory.interrupt()


def was_cut_short(stage: PlannedStage) -> bool:
    """Whether the stage has a checkpoint to go on from, or the stage of its `init_from` is done."""
    before = read_status(stage.before.directory) if stage.before else None
    begun = checkpoints_in(stage) or (before is not None and before["state"] == "finished")
    return RunDirectory(stage.directory).recipe_file.exists() and bool(begun)


def changed_keys(stage: PlannedStage) -> list[str]:
    """What has changed of its recipe and its reward files since the stage was run, and of those of its `init_from`."""
    parts = [(RunDirectory(part.directory), part.recipe) for part in stage.parts]
    return [key for there, recipe in parts if there.recipe_file.exists() for key in changes(there, recipe)]


def checkpoints_in(stage: PlannedStage) -> list[Path]:
    """The checkpoints of a stage and of the SFT inside it, where it has one."""
    return [path for pattern in ("", "*/") for path in stage.directory.glob(f"{pattern}checkpoints/step_*")]


def say(directory: RunDirectory, text: str) -> None:
    """A line on the terminal and in the pipeline's log. The stages draw their own progress between such lines."""
    print(text, flush=True)
    with directory.log_file.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def stopped(directory: RunDirectory, stage: PlannedStage, status: int) -> None:
    """Note where the pipeline stopped."""
    say(directory, f"stopped in stage {stage.name}; the same command goes on there")
    if status in INTERRUPTED.values():
        directory.interrupt()
    else:
        directory.fail(f"stage {stage.name} ended with exit status {status}")


def stages_to_run(pipeline: Pipeline, start: str | None) -> list[PlannedStage]:
    """The stages from the first that is not done, or from `start`, to the end: what was made after it is out of date.

    Raises UserError as `run_pipeline` says.
    """
    first = place(pipeline, "--from", start) if start is not None else len(pipeline.stages)
    for number, stage in enumerate(pipeline.stages[:first]):
        if not is_done(stage):
            if start is not None:
                raise UserError(f"--from {start}: stage {stage.name!r} before it is not done yet")
            return list(pipeline.stages[number:])
    return list(pipeline.stages[first:])


def place(pipeline: Pipeline, option: str, name: str) -> int:
    """Which stage has the name. Raises UserError where none has."""
    names = [stage.name for stage in pipeline.stages]
    if name not in names:
        raise UserError(f"{option} {name}: the pipeline has no such stage; its stages are {', '.join(names)}")
    return names.index(name)


def is_done(stage: PlannedStage) -> bool:
    """Whether the stage has finished with this recipe. Raises UserError where it has with another."""
    status = read_status(stage.directory)
    if status is None or status["state"] != "finished":
        return False
    if changed := changed_keys(stage):
        raise UserError(
            f"stage {stage.name!r} was run with another recipe ({stage.directory / 'recipe.yaml'}): {', '.join(changed)}; "
            f"run it anew with --from {stage.name}, or give another run.dir"
        )
    return True


def stop_with_the_pipeline() -> None:
    """Ask the kernel to tell a stage to stop when the pipeline's process is gone: by SIGINT, which ends one at once that was told to stop before."""
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which Ray blocks in what it starts, such as a job
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def run_stage(stage: PlannedStage) -> int:
    """Run a stage in a process of its own; returns its exit status. Ctrl-C and SIGTERM are handed on, once."""
    # -P: not with what the working directory has for our packages, such as a reward.py.
    command = [sys.executable, "-P", "-m", "align.cli", COMMANDS[stage.recipe.stage], str(stage.file), *stage.overrides]
    if was_cut_short(stage):
        command.append("run.overwrite=false")
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=stop_with_the_pipeline)
    try:
        return process.wait()
    except KeyboardInterrupt as stopped:
        number = signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT
        process.send_signal(number)
        process.wait()
        return INTERRUPTED[number]
