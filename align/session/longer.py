"""A finished run made longer: it becomes an interrupted run with more steps, and goes on from the checkpoint of its end."""

import json
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.recipe import Recipe, TrainingRecipe, dump_recipe, kept_recipe, read_yaml
from align.run import RunDirectory, read_jsonl, read_status, write_atomically, write_jsonl
from align.run.checkpoints import PREFIX
from align.session.run import positions, refuse_changes


def make_longer(path: Path, recipe: Recipe) -> list[str]:
    """Turn the finished run in `path` into an interrupted one that `recipe`, with more steps, goes on with.

    All that was measured stays: the evaluations of its end get the step in their names, since those of the new end have the same. `final/` stays
    until the new end replaces it. Returns the stages of its pipeline that have gone on from it. Raises UserError, before anything is changed,
    where nothing can be added.
    """
    directory = RunDirectory(path.expanduser().absolute())
    before = kept_recipe(directory.recipe_file)
    if not isinstance(before, TrainingRecipe) or not isinstance(recipe, TrainingRecipe):
        raise UserError(f"{path} has finished, so there is nothing to go on with; `align report {path}` shows it")
    check_more_steps(directory, f"{recipe.stage}.steps", before.steps, recipe.steps)
    later = stages_after(directory)
    given = [f"{recipe.stage}.steps={recipe.steps}"]
    refuse_changes(directory, recipe, given)
    longer = kept_recipe(directory.recipe_file, given)
    owned = RunDirectory.reopen(path)
    try:
        name_by_step(owned, before.steps)
        record = {"step": before.steps, "positions": positions(owned)}
        write_atomically(owned.lengthened_file, json.dumps(record) + "\n")
        owned.save_recipe(dump_recipe(longer))
    finally:
        owned.interrupt()
    return later


def check_more_steps(directory: RunDirectory, key: str, done: int, steps: int) -> None:
    """Raise UserError where `steps`, from the recipe's `key`, are no more than those that are done, and where the checkpoint of the last is gone."""
    path = directory.path
    if steps <= done:
        raise UserError(
            f"{path} has finished: all of its {done} steps are done, and {key} is {steps}. More make it longer, such as "
            f"`align resume {path} {key}={2 * done}`; `align report {path}` shows it"
        )
    checkpoint = directory.checkpoints_directory / f"{PREFIX}{done:05d}"
    if not checkpoint.is_dir():
        raise UserError(
            f"{path} cannot be made longer: the checkpoint of its end, {checkpoint}, with the state of the optimizer is not there. It "
            "is written where the recipe has save_every. A new run can start from the weights alone: "
            f"model.path={directory.final_directory}"
        )


def stages_after(directory: RunDirectory) -> list[str]:
    """The stages after this one in its pipeline. Raises UserError for the stage of an `init_from`, from which its run has gone on."""
    outer = RunDirectory(directory.path.parent)
    if read_status(outer.path) is None:
        return []
    stages: list[dict[str, Any]] | None = read_yaml(outer.recipe_file)[0].get("stages")
    if stages is None:
        raise UserError(
            f"{directory.path} is the stage that {outer.path} has gone on from. Train it longer in a run of its own, whose final/ is then the "
            "model.path of another"
        )
    names = [str(stage["name"]) for stage in stages]
    return names[names.index(directory.path.name) + 1 :] if directory.path.name in names else []


def name_by_step(directory: RunDirectory, step: int) -> None:
    """Add the step to the names of the evaluations that were made after it."""
    file, suffix = directory.evaluations_file, f", step {step}"
    records = read_jsonl(file) if file.exists() else []
    for record in records:
        name = str(record["name"])
        if record["step"] == step and not name.endswith(suffix):
            record["name"] = name + suffix
            table = directory.evaluations_directory / f"{name}.parquet"
            if table.exists():
                table.rename(table.with_name(f"{name}{suffix}.parquet"))
    write_jsonl(file, records)
