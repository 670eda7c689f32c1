"""A pipeline: stages in their order, each with its recipe and what it takes from stages before it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, model_validator

from align.errors import UserError
from align.options import Options
from align.recipe.load import apply_override, explain, load_recipe, read_yaml
from align.recipe.options import RunOptions
from align.recipe.recipes import Recipe

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
PRODUCT = re.compile(r"\$\{([^}]*)\}")


class StageEntry(Options):
    """A stage: its recipe with `set` put over it, where `${NAME}` is what the stage NAME before it made (its `final/`)."""

    name: str = Field(pattern=NAME)
    recipe: Path
    set: list[str] = Field([], description="overrides, such as model.path=${sft}")


class PipelineOptions(Options):
    """What a pipeline file holds."""

    name: str = Field(pattern=NAME)
    seed: int = Field(0, ge=0, description="the seed of every stage that sets none of its own")
    run: RunOptions = RunOptions()
    stages: list[StageEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _take_from_stages_before(self) -> "PipelineOptions":
        known: list[str] = []
        for stage in self.stages:
            for product in PRODUCT.findall(" ".join(stage.set)):
                if product not in known:
                    raise ValueError(
                        f"stage {stage.name!r} takes ${{{product}}}, but before it there is only {', '.join(known) or 'no stage'}"
                    )
            if stage.name in known:
                raise ValueError(f"two stages are named {stage.name!r}")
            known.append(stage.name)
        return self


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage of a pipeline, resolved: `overrides` over the file of `entry` give `recipe`, which runs in `directory`."""

    entry: StageEntry
    overrides: Sequence[str]
    recipe: Recipe
    directory: Path


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline whose recipes are all valid; `text` is what it was made of, as YAML."""

    name: str
    directory: Path
    stages: Sequence[PlannedStage]
    text: str


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline and all its recipes. Raises UserError that names the file, the stage and the key."""
    values, lines = read_yaml(path)
    if values.get("stage") == "pipeline":
        # As it says in the copy that is kept in the run's directory.
        del values["stage"]
    for override in overrides:
        apply_override(values, override)
    try:
        options = PipelineOptions.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, path, lines, PipelineOptions, single_data=False))) from None
    directory = (options.run.dir or Path("runs") / options.name).expanduser().absolute()
    stages = [_planned(stage, options, directory, path) for stage in options.stages]
    text = yaml.safe_dump({"stage": "pipeline"} | options.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return Pipeline(options.name, directory, stages, text)


def _planned(entry: StageEntry, options: PipelineOptions, directory: Path, path: Path) -> PlannedStage:
    own = directory / entry.name
    given = [PRODUCT.sub(lambda match: str(directory / match[1] / "final"), override) for override in entry.set]
    overrides = [f"seed={options.seed}", *given, f"run.dir={own}", "run.overwrite=true"]
    try:
        recipe = load_recipe(entry.recipe, overrides, pending=directory)
    except UserError as error:
        raise UserError(f"{path}: stage {entry.name!r}: {error}") from None
    return PlannedStage(entry, overrides, recipe, own)
