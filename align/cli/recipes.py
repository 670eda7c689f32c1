"""Commands on recipes: run one, look at it, say where it would run, go on with its run."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option
from typer.core import TyperCommand

from align.cli.arguments import EXIT_FAILED, File, Overrides, RunPath
from align.errors import UserError
from align.shipped import found

STAGES = {
    "sft": "supervised fine-tuning of a policy",
    "dpo": "direct preference optimisation of a policy on pairs of completions, after SFT where the recipe says so",
    "grpo": "reinforcement learning with GRPO, after SFT where the recipe says so",
    "reward-model": "a reward model from preferences, made of a policy",
    "preferences": "preference data from a policy's own answers, judged by the recipe's rewards",
}


class StageCommand(TyperCommand):
    """The command of a stage, whose help ends with the keys of its recipe."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from align.recipe.keys import stage_text

        formatter.write(f"\nKeys of the recipe, with their defaults:\n{stage_text(str(self.name).replace('-', '_'))}\n")


def stage_command(stage: str) -> Callable[..., None]:
    def run(recipe: File, overrides: Overrides = None) -> None:
        run_recipe(stage, recipe, overrides or [])

    return run


def run_recipe(stage: str, file: Path, overrides: Sequence[str], *, longer: bool = False) -> None:
    """Run a recipe for a stage; with `longer`, go on with a run that has finished."""
    from align.recipe import load_stage

    planned = load_stage(file, overrides)
    if planned.recipe.stage != stage:
        command = planned.recipe.stage.replace("_", "-")
        raise UserError(f"{file} is a recipe for {planned.recipe.stage}; run `align {command} {file}`")
    from align.stages.commands import run_stage

    run_stage(planned, longer=longer)


def check(
    file: File,
    overrides: Overrides = None,
    whole: Annotated[
        bool, Option("--whole", help="read all rows of the data, not the first thousand of each file")
    ] = False,
) -> None:
    """read a recipe or a pipeline and say what is wrong with it or with this machine; starts nothing

    Looks at all that a run looks at before it starts: keys, names, splits, servers, free memory, disk space and ports, the model's small
    files (configuration, tokenizer, chat template), and the data: their rows in the chat template, and the columns that rewards want.
    """
    from align.recipe import load_stages
    from align.stages.commands import check_stages

    stages = load_stages(file, overrides or [])
    found = check_stages(stages, whole=whole)
    for stage in stages:
        print(f"{stage.file}: a valid {stage.recipe.stage} recipe; its run would go to {stage.directory}")
    for text in found.warnings:
        print(f"warning: {text}")
    for note in found.notes:
        print(note)
    for hint in found.hints:
        print(f"hint: {hint}", file=sys.stderr)


def keys(
    prefix: Annotated[str, Argument(metavar="PREFIX", help="only those that begin so, for example learner.lora.")] = "",
) -> None:
    """the keys of the recipes of all stages, with their defaults and descriptions"""
    from align.recipe.keys import prefix_text

    print(prefix_text(prefix))


def resume(run: RunPath, overrides: Overrides = None) -> int | None:
    """go on with an interrupted run, or make a finished one longer, from its last checkpoint

    Go on with a run that was interrupted, killed or has failed, from its last checkpoint and with the recipe in its directory. It ends
    with the weights, samples and numbers of a run that was never interrupted, to the last bit where the engines are exact. The command
    that began the run does the same when it is given again; so does `align pipeline` for its stages.

    Checkpoints are written every `save_every` steps, when an alarm ends the run (alarms.stop), and when it is told to stop: Ctrl-C (exit status 130), SIGTERM and a closed terminal (75) let the
    step end that is being made, for `run.grace_s` seconds at most, and then write one. A second Ctrl-C ends at once.

    Damage: every file is verified against its SHA-256 before it is read; a damaged checkpoint is named and the one before taken.

    A finished run goes on where it gets more steps: grpo.steps=80 (sft.steps, dpo.steps, reward_model.steps). Its final/ stays until the longer run has
    written its own. The learning rate is that of the longer run from there on: a constant one stays, a cosine rises again.

    Changes: a key that matters must be what it was; run.allow_changes=true goes on nevertheless. Where a run goes, its machine, workers,
    time-outs and save_every may always change; learner.ranks, learner.zero_stage and learner.expert_parallel never.
    """
    from align.recipe import STAGES, read_yaml
    from align.run import RunDirectory, read_status

    status = read_status(run)
    if status is None:
        raise UserError(f"{run} holds no run; `align resume` takes the directory of one, such as runs/nano-grpo")
    file, finished = RunDirectory(run).recipe_file, status["state"] == "finished"
    stage = read_yaml(file)[0].get("stage")
    given = [f"run.dir={json.dumps(str(run), ensure_ascii=False)}", *(overrides or [])]
    if stage == "pipeline":
        if finished:
            raise UserError(
                f"{run} has finished. Its stages can be made longer: `align resume {run}/STAGE grpo.steps=N`"
            )
        return pipeline(file, given)
    if stage not in STAGES:
        raise UserError(f"{file}: stage must be one of pipeline, {', '.join(STAGES)}, but is {stage!r}")
    run_recipe(stage, file, ["run.overwrite=false", *given], longer=finished)
    return None


def plan(
    file: File,
    gpus_per_node: Annotated[int, Option(min=0, help="0 for one machine without GPUs")],
    overrides: Overrides = None,
    nodes: Annotated[int, Option(min=1)] = 1,
    gpu_memory: Annotated[float, Option(metavar="GIB", help="of each GPU, for example 80")] = 0.0,
    node_memory: Annotated[float, Option(metavar="GIB", help="of each node with GPUs, beside theirs")] = 1000.0,
) -> int:
    """where the processes of a recipe or a pipeline go on a cluster, their memory and time; starts nothing

    Each stage has the whole cluster. What an earlier stage of a pipeline makes is as large as what it is made of. The exit status is 0 where
    all stages fit, 1 where one does not.
    """
    from align.plan.placement import cluster_of
    from align.plan.plan import as_text, plan_stages
    from align.recipe import load_stages
    from align.recipe.dtype import chosen_for_gpus
    from align.session.checks import check_names

    with chosen_for_gpus() if gpus_per_node else nullcontext():
        stages = load_stages(file, overrides or [])
    for stage in stages:
        check_names(stage.recipe.data, stage.recipe.data_stage, stage.recipe.roles())
    cluster, status = cluster_of(nodes, gpus_per_node, gpu_memory, node_memory), 0
    for number, (stage, sizes, made) in enumerate(plan_stages(stages, cluster)):
        recipe = stage.recipe
        print(
            "\n" * (number > 0) + as_text(f"{recipe.name} ({stage.name})", recipe.model.dtype, sizes, cluster, made),
            flush=True,
        )
        for refusal in made.refusals:
            print(f"does not fit: {refusal}", file=sys.stderr)
        if made.advice:
            print(f"this would fit: {made.advice}", file=sys.stderr)
        status = EXIT_FAILED if made.refusals else status
    return status


def pipeline(
    file: Annotated[
        Path,
        Argument(metavar="FILE", help="pipeline file, for example recipes/nano/pipeline.yaml", callback=found),
    ],
    overrides: Overrides = None,
    start: Annotated[str | None, Option("--from", metavar="STAGE", help="run it and all after it anew")] = None,
    last: Annotated[str | None, Option("--to", metavar="STAGE", help="stop after this stage")] = None,
) -> int:
    """run the stages that a file names, one after the other"""
    from align.recipe import load_pipeline
    from align.report import write_report
    from align.stages.pipeline import run_pipeline

    chain = load_pipeline(file, overrides or [])
    status = run_pipeline(chain, start, last)
    if status == 0:
        print(f"the report is in {write_report(chain.directory)}")
    return status
