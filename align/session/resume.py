"""`align resume`: which command began a run, and with what, so that it can be given again."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from align.errors import UserError
from align.recipe import read_yaml
from align.run import RunDirectory, read_status

RESUME = """\
Go on with a run that was interrupted, killed or has failed, from its last checkpoint and with the recipe in its directory. It
ends with the weights, samples and numbers of a run that was never interrupted, to the last bit where the engines are exact.
The command that began the run does the same when it is given again; so does `align pipeline` for its stages.

checkpoints   every `save_every` steps, and when the run is told to stop: Ctrl-C (exit status 130) and SIGTERM (75) let the
              step end that is being made, for `run.grace_s` seconds at most, and then write one. A second signal ends at once.
damage        every file is proved by its SHA-256 before it is read; a damaged checkpoint is named and the one before taken.
changes       a key that matters must be what it was; run.allow_changes=true goes on nevertheless. Where a run goes, its
              machine, workers, time-outs and save_every may always change; learner.ranks and learner.zero_stage never.
"""


def as_begun(root: Path, overrides: Sequence[str], stages: Collection[str]) -> tuple[str, argparse.Namespace]:
    """The stage of the run in `root`, one of `stages`, and the command's options with the recipe kept there.

    Raises UserError where there is no run, or one that has finished.
    """
    status = read_status(root)
    if status is None:
        raise UserError(f"{root} holds no run; `align resume` takes the directory of one, such as runs/nano-grpo")
    if status["state"] == "finished":
        raise UserError(f"{root} has finished, so there is nothing to go on with; `align report {root}` shows it")
    file = RunDirectory(root).recipe_file
    stage = str(read_yaml(file)[0].get("stage"))
    if stage not in stages:
        raise UserError(f"{file}: stage must be one of {', '.join(stages)}, but is {stage!r}")
    given = [f"run.dir={root}", *([] if stage == "pipeline" else ["run.overwrite=false"]), *overrides]
    return stage, argparse.Namespace(recipe=file, file=file, stage=stage, overrides=given, start=None, last=None)
