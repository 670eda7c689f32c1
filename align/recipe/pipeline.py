"""Stages in their order: a recipe after the one that its `init_from` names, or those of a pipeline file."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from align.errors import UserError
from align.options import Options
from align.recipe.base import Recipe
from align.recipe.dtype import FASTEST
from align.recipe.load import FREE, apply_override, explain, load_recipe, read_yaml
from align.recipe.options import RunOptions
from align.recipe.recipes import DpoRecipe, GrpoRecipe, RewardModelRecipe
from align.recipe.values import not_in_json, yaml_text, yaml_value
from align.shipped import found

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
PRODUCT = re.compile(r"\$\{([^}]*)\}")
FIRST = "sft"
"""The directory, inside the run's, of the stage that `init_from` names."""
SHARED = ("seed", "run", "machine", "trackers", "model", "rollout", "colocate")
"""What a recipe shares with the stage of its `init_from`: one command trains one policy on one machine, so what is said of these, in
the recipe's file or as an override, holds for both stages. The rest makes a stage the one that it is: its data, learner, rewards
and evaluation, and how long its sequences may be (`rollout.max_length`)."""
OWN = "max_length"


class StageEntry(Options):
    """A stage: its recipe with `set` put over it, where `${NAME}` is what the stage NAME before it made (its `final/`)."""

    name: str = Field(pattern=NAME)
    recipe: Annotated[Path, AfterValidator(found)]
    set: list[str] = Field([], description="overrides, such as model.path=${sft}")


class PipelineOptions(Options):
    """What a pipeline file holds."""

    name: str = Field(pattern=NAME)
    seed: int | None = Field(
        None, ge=0, description="the seed of every stage, whatever its recipe's is, but for those that `set` another"
    )
    run: RunOptions = RunOptions()
    stages: list[StageEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _take_from_stages_before(self) -> "PipelineOptions":
        if self.run.overwrite:
            raise ValueError(
                "run.overwrite: a pipeline runs a stage and all after it anew with --from STAGE; leave it out"
            )
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
    """A stage, resolved: `overrides` over `file` give `recipe`, which runs in a directory of its own.

    `before` is the stage that its `init_from` names; `replaced` says what of its file the recipe after it has replaced.
    """

    name: str
    file: Path
    overrides: Sequence[str]
    recipe: Recipe
    before: "PlannedStage | None" = None
    replaced: Sequence[str] = ()

    @property
    def directory(self) -> Path:
        return self.recipe.directory

    @property
    def parts(self) -> "list[PlannedStage]":
        """The stage itself, after the one before it."""
        return [self.before, self] if self.before else [self]


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
        # As it says in the copy that is kept in the run's directory, where an older version also kept what it took no notice of.
        del values["stage"]
        (values.get("run") or {}).pop("overwrite", None)
    for override in overrides:
        apply_override(values, override)
    try:
        options = PipelineOptions.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, path, lines, PipelineOptions, single_data=False))) from None
    directory = (options.run.dir or Path("runs") / options.name).expanduser().absolute()
    stages = [_planned(stage, options, directory, path) for stage in options.stages]
    text = yaml_text({"stage": "pipeline"} | options.model_dump(mode="json"))
    return Pipeline(options.name, directory, stages, text)


def load_stages(path: Path, overrides: Sequence[str] = ()) -> list[PlannedStage]:
    """Every stage of a pipeline file, or of a recipe, in their order. Raises UserError as for these."""
    if {"stages", "name"} <= read_yaml(path)[0].keys():
        return [part for stage in load_pipeline(path, overrides).stages for part in stage.parts]
    return load_stage(path, overrides).parts


def _planned(entry: StageEntry, options: PipelineOptions, directory: Path, path: Path) -> PlannedStage:
    given = [with_products(override, directory) for override in entry.set]
    run = options.run.model_dump(include={"grace_s", "allow_changes"}, exclude_defaults=True)
    place = [f"run.dir={json.dumps(str(directory / entry.name), ensure_ascii=False)}", "run.overwrite=true"]
    try:
        if read_yaml(entry.recipe)[0].get("stage") == "preferences":  # which always begins anew
            run.pop("allow_changes", None)
        seed = [] if options.seed is None else [f"seed={options.seed}"]
        of_run = [f"run.{key}={json.dumps(value)}" for key, value in run.items()]
        overrides = [*seed, *of_run, *given, *place]
        return load_stage(entry.recipe, overrides, name=entry.name, pending=directory)
    except UserError as error:
        raise UserError(f"{path}: stage {entry.name!r}: {error}") from None


def with_products(override: str, directory: Path) -> str:
    """An override with the directories of what stages make in the places of `${STAGE}` in its value, whatever characters they have."""
    key, _, text = override.partition("=")
    if not PRODUCT.search(text):
        return override
    try:
        # YAML reads the marked names as they stand, in a list or object too.
        given = yaml_value(PRODUCT.sub(r"/@\1@", text))
    except yaml.YAMLError:
        return override
    for at, fault in not_in_json(given, (key,)):
        raise UserError(f"{'.'.join(at)}: {fault}")
    value = json.dumps(given, ensure_ascii=False)
    filled = re.sub(
        "/@([^@]*)@", lambda match: json.dumps(str(directory / match[1] / "final"), ensure_ascii=False)[1:-1], value
    )
    return f"{key}={filled}"


def load_stage(
    path: Path, overrides: Sequence[str] = (), *, name: str | None = None, pending: Path | None = None
) -> PlannedStage:
    """A recipe with the stage that its `init_from` names. Raises UserError as `load_recipe` does, for both."""
    recipe = load_recipe(path, overrides, pending=pending)
    init_from = recipe.init_from if isinstance(recipe, DpoRecipe | GrpoRecipe | RewardModelRecipe) else None
    before = None
    if init_from is not None:
        shared = recipe.model_dump(mode="json", include=set(SHARED), exclude={"rollout": {OWN}})
        shared["run"] |= {"dir": str(recipe.directory / FIRST), "overwrite": False}
        before = _stage_before(path, init_from, shared, pending)
    return PlannedStage(name or recipe.stage, path, overrides, recipe, before)


def _stage_before(path: Path, init_from: Path, shared: dict[str, Any], pending: Path | None) -> PlannedStage:
    """The stage of `init_from`, with the values that the recipe at `path` shares with it. Where that is a run's, so is the stage's recipe."""
    own = path.parent / FIRST / "recipe.yaml"
    file = own if own.exists() and (path.parent / "status.json").exists() else init_from
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in leaves(shared)]
    try:
        values, _ = read_yaml(file)
        if values.get("stage") != "sft":
            raise UserError(f"{file} is a recipe for {values.get('stage')}, not for sft")
        first = load_recipe(file, overrides, pending=pending)
    except UserError as error:
        raise UserError(f"{path}: init_from: {error}") from None
    theirs = dict(leaves(values))
    replaced = [
        f"{key} ({theirs[key]!r} before, {value!r} now)"
        for key, value in leaves(shared)
        if key in theirs and theirs[key] not in (value, FASTEST) and not key.startswith(FREE)
    ]
    return PlannedStage(FIRST, file, overrides, first, replaced=replaced)


def leaves(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below a mapping, with its value; what is empty is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", value
