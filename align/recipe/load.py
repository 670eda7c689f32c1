"""Recipes from YAML files and `key=value` overrides, with errors that name the file, the line and the key."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from align.errors import UserError, nearest
from align.options import kept_options
from align.recipe.base import Recipe
from align.recipe.dtype import with_dtype_chosen
from align.recipe.options import ModelOptions, is_on_hub
from align.recipe.recipes import STAGES, GrpoRecipe
from align.recipe.values import not_in_json, yaml_text, yaml_value
from align.shipped import found
from reward.own.file import split as split_name

logger = logging.getLogger(__name__)

RENAMED = {
    "take_turns": "colocate",
    "grpo.drop_uniform_groups": "grpo.drop_zero_variance_groups",
    "alarms.uniform_groups": "alarms.zero_variance_groups",
}
"""Old names of keys, which are still read."""

CARDS = ("data.card", "evaluation.cards")
INPUTS = (
    *CARDS,
    "data.params.answers",
    "data.path",
    "evaluation.against.run",
    "evaluation.hooks.params.include_path",
    "evaluation.hooks.params.questions",
    "evaluation.hooks.params.references",
    "evaluation.hooks.params.start",
    "evaluation.hooks.params.template",
    "evaluation.path",
    "grpo.distill.teacher",
    "init_from",
    "model.path",
    "reference",
    "rewards.params.path",
    "stages.recipe",
)
"""The keys of what is read, in recipes and pipelines, without the places in lists."""

ANYWHERE = Path("/")
"""As `pending`: nothing that a recipe names by its whole path need be there."""

# What changes nothing of what is trained: where it runs, how often it saves, how long it waits, what ends it.
FREE = (
    "run",
    "machine",
    "trackers",
    "save_every",
    "keep_checkpoints",
    "alarms.stop",
    "weights.transport",
    "weights.bucket_mb",
    "learner.port",
    "learner.gpus",
    "learner.resources",
    "learner.start_timeout_s",
    "learner.step_timeout_s",
    "rollout.workers",
    "rollout.gpus",
    "rollout.resources",
    "rollout.start_timeout_s",
    "rollout.batch_timeout_s",
    "rollout.stall_timeout_s",
    "rollout.probe_interval_s",
    "rollout.probe_timeout_s",
    "rollout.max_restarts",
    "scoring.infra_error_limit",
    "scoring.workers",
    "scoring.timeout_s",
    "scoring.start_timeout_s",
)


def load_recipe(path: Path, overrides: Sequence[str] = (), *, pending: Path | None = None) -> Recipe:
    """Read and check a recipe. Raises UserError that names the file, the line and the key of a mistake.

    Files and directories that it reads are looked for beside it, then in the working directory, then among what comes with the package; those
    of overrides not beside it. Files below `pending` need not be there yet.
    """
    values, lines = read_yaml(path)
    rename(values, lines, path)
    for override in overrides:
        apply_override(values, override)
        rename(values, {}, override)
    return recipe_of(values, path, lines, pending)


def kept_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run keeps. What it reads may have moved since, and is not looked for."""
    with kept_options():
        return load_recipe(path, overrides, pending=ANYWHERE)


def written_recipe(text: str, path: Path) -> Recipe:
    """A recipe as `dump_recipe` gave it, with the run whose recipe is at `path`; see `kept_recipe`."""
    values = yaml_value(text)
    rename(values, {}, path)
    with kept_options():
        return recipe_of(values, path, pending=ANYWHERE)


def recipe_of(
    values: Mapping[str, Any],
    path: Path,
    lines: Mapping[tuple[str, ...], int] = MappingProxyType({}),
    pending: Path | None = None,
) -> Recipe:
    """The recipe that has these values in the file at `path`. Raises UserError as `load_recipe` does."""
    values = with_dtype_chosen(with_inputs_found(values, "", path.parent), path, in_pipeline=pending is not None)
    stage = values.get("stage")
    if stage not in STAGES:
        raise UserError(f"{path}: stage must be one of {', '.join(STAGES)}, but is {stage!r}")
    for at, fault in not_in_json(values):
        line = next((f", line {lines[at[:n]]}" for n in range(len(at), 0, -1) if at[:n] in lines), "")
        raise UserError(f"{path}{line}: {'.'.join(at)}: {fault}")
    single = isinstance(values.get("data"), dict)
    find_reward_files(values, path, lines, pending)
    try:
        recipe = STAGES[stage].model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, path, lines, STAGES[stage], single_data=single))) from None
    check_files(recipe, path, lines, pending)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml_text(recipe.model_dump(mode="json"))


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The mapping in a YAML file, with whole paths in the place of `INPUTS`, and the line of each of its keys by path."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such recipe" + (f"; there are {', '.join(near)}" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    lines: dict[tuple[str, ...], int] = {}
    collect_lines(node, (), lines, path)
    return with_inputs_found(values, "", path.parent), lines


def with_inputs_found(value: Any, at: str, directory: Path) -> Any:
    """What is at the key `at`, with whole paths in the place of those below it that name an input: in `directory`, or else in the working
    directory, or else among what comes with the package. A path that is nowhere, and a name on the hub, stay as they are."""
    if isinstance(value, dict):
        return {
            name: with_inputs_found(item, f"{at}.{name}" if at else str(name), directory)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [with_inputs_found(item, at, directory) for item in value]
    if not isinstance(value, str):
        return value
    if at == "stages.set":
        return override_with_inputs_found(value, directory)
    if at not in INPUTS or "://" in value or (at in CARDS and not value.endswith(".md")):
        return value
    path = Path(value).expanduser()
    places = (directory / path, path, found(path))
    there = (place for place in places if place.exists() or any(glob(str(place), recursive=True)))
    return str(next((place.absolute() for place in there), value))


def override_with_inputs_found(override: str, directory: Path) -> str:
    """An override with whole paths; one that names no input, or is not valid, as it is."""
    key, _, text = override.partition("=")
    try:
        value = yaml_value(text)
    except yaml.YAMLError:
        return override
    whole = with_inputs_found(value, key_of(key), directory)
    if whole == value:
        return override
    return f"{key}={yaml_text(whole, default_flow_style=True, width=math.inf).removesuffix('...' + chr(10)).strip()}"


def key_of(path: str) -> str:
    """A dotted path without its places in lists: "rewards.0.params.path" is one of the `INPUTS`."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def collect_lines(node: yaml.Node | None, at: tuple[str, ...], lines: dict[tuple[str, ...], int], path: Path) -> None:
    """Note the line of every key below `node`; a key given twice is refused."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            if here in lines:
                raise UserError(
                    f"{path}, line {key.start_mark.line + 1}: {'.'.join(here)} is given twice "
                    f"(first on line {lines[here]})"
                )
            lines[here] = key.start_mark.line + 1
            collect_lines(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*at, str(index))] = item.start_mark.line + 1
            collect_lines(item, (*at, str(index)), lines, path)


def rename(values: dict[str, Any], lines: dict[tuple[str, ...], int], where: Path | str) -> None:
    """Give keys that `where` has by an old name their new one, with a warning. Raises UserError for one that has both."""
    for old, new in RENAMED.items():
        *parents, last = old.split(".")
        at: Any = values
        for parent in parents:
            at = at.get(parent) if isinstance(at, dict) else None
        if not isinstance(at, dict) or last not in at:
            continue
        value, name = at.pop(last), new.rpartition(".")[2]
        if isinstance(where, Path) and name in at:
            raise UserError(f"{where}: {new} is given twice, once by its old name {old}")
        at[name] = value
        logger.warning("%s: %s is called %s now", where, old, new)
        if (place := tuple(old.split("."))) in lines:
            lines[tuple(new.split("."))] = lines.pop(place)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` (the value is read as YAML) in a nested mapping; files that it names are looked for in the working directory.

    `data.KEY` is also a key of the only entry of a list, as which a run keeps its `data`.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r}: an override has the form key=value, for example grpo.steps=20")
    try:
        value = yaml_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {error}") from None
    value = with_inputs_found(value, key_of(key), Path())
    at: Any = values
    parts = key.split(".")
    data = values.get("data")
    if isinstance(data, list) and len(data) == 1 and key.startswith("data.") and not parts[1].isdigit():
        parts.insert(1, "0")
    for number, part in enumerate(parts, start=1):
        place = _place_of(part, at, ".".join(parts[: number - 1]), override)
        if number == len(parts):
            at[place] = value
        elif isinstance(at, dict) and at.get(place) is None:
            at[place] = {}
        at = at[place]


def _place_of(part: str, at: Any, name: str, override: str) -> str | int:
    """Where the `part` of an override's key is in `at`, what the parts before it name. Raises UserError where it is nowhere."""
    if isinstance(at, dict):
        return part
    if isinstance(at, list) and part.isdigit() and int(part) < len(at):
        return int(part)
    if isinstance(at, list):
        entries = f"{name}.0 to {name}.{len(at) - 1}" if at else "none"
        raise UserError(f"{override!r}: {name} is a list and has no entry {part!r}; its entries are {entries}")
    raise UserError(f"{override!r}: {name} is a single value and has no key {part!r}")


def find_reward_files(
    values: Mapping[str, Any], path: Path, lines: Mapping[tuple[str, ...], int], pending: Path | None
) -> None:
    """Give rewards that are functions in files whole paths: a file is beside the recipe at `path`, or else in the working directory.

    Raises UserError for one that is in neither, unless it is below `pending`.
    """
    terms = values.get("rewards")
    for index, term in enumerate(terms if isinstance(terms, list) else ()):
        name = term.get("name") if isinstance(term, dict) else None
        if not isinstance(name, str) or (found := split_name(name)) is None:
            continue
        file, function = found
        if pending is not None and Path(file).is_relative_to(pending):
            continue
        places = [(place / file).absolute() for place in (path.parent, Path())]
        there = next((place for place in places if place.is_file()), None)
        if there is None:
            key = ("rewards", str(index), "name")
            line = f", line {lines[key]}" if key in lines else ""
            tried = " and ".join(dict.fromkeys(map(str, places)))
            raise UserError(
                f"{path}{line}: {'.'.join(key)} names the file {file}, which does not exist ({tried} were tried)"
            )
        term["name"] = f"{there}:{function}"


def explain(
    error: ValidationError,
    path: Path,
    lines: Mapping[tuple[str, ...], int],
    model: type[BaseModel],
    *,
    single_data: bool,
) -> list[str]:
    """One line for each mistake: where it is, what is wrong, and the nearest known key."""
    messages = []
    for problem in error.errors():
        at = tuple(str(part) for part in problem["loc"])
        if single_data and at[:2] == ("data", "0"):
            at = ("data", *at[2:])
        line = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), None)
        where = f"{path}, line {line}: " if at and at in lines else f"{path}: "
        key = ".".join(at)
        if problem["type"] == "extra_forbidden":
            known = known_keys(model, at[:-1])
            hint = nearest(at[-1], known) or f"; known keys: {', '.join(known)}"
            messages.append(f"{where}unknown key {key!r}{hint}")
        elif problem["type"] == "missing":
            after = f" (the section begins on line {line})" if line else ""
            messages.append(f"{path}: missing key {key!r}{after}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], dict | BaseModel) else f", not {problem['input']!r}"
            messages.append(f"{where}{key + ': ' if key else ''}{message}{given}")
    return messages


def known_keys(model: type[BaseModel], at: Sequence[str]) -> list[str]:
    """The keys of the section at a path."""
    for part in at:
        if part.isdigit():
            continue
        section = section_in(model.model_fields[part].annotation)
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The options that a value of this type holds, in a list or not; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part)) is not None), None)


def check_files(recipe: Recipe, path: Path, lines: Mapping[tuple[str, ...], int], pending: Path | None) -> None:
    """Refuse files and directories that a recipe names and that are not there."""
    named = {key: file for key, file in paths_in(recipe, ()) if key[0] != "run"}
    if len(recipe.data) == 1:
        named = {("data", *key[2:]) if key[0] == "data" else key: file for key, file in named.items()}
    models: dict[tuple[str, ...], ModelOptions] = {("model", "path"): recipe.model}
    if isinstance(recipe, GrpoRecipe) and recipe.grpo.distill is not None:
        models["grpo", "distill", "teacher"] = ModelOptions(path=recipe.grpo.distill.teacher)
    named |= {key: Path(model.path) for key, model in models.items() if is_local(model.path)}
    for key, file in named.items():
        if pending is not None and file.is_relative_to(pending):
            continue
        if key[-1] == "path" and key[0] in ("data", "evaluation") and is_on_hub(file):
            continue
        if not file.exists() and not any(glob(str(file), recursive=True)):
            line = f", line {lines[key]}" if key in lines else ""
            raise UserError(f"{path}{line}: {'.'.join(key)} names {file}, which does not exist")
    for key, model in models.items():
        directory = Path(model.path)
        if directory.is_dir() and not (pending is not None and directory.is_relative_to(pending)):
            check_model_directory(directory, model, ".".join(key))


def is_local(path: str) -> bool:
    """Whether a model's path is a directory of this machine, there or not, and not a name on the hub."""
    model = Path(path)
    return model.is_absolute() or path.startswith((".", "~")) or (model.parent.is_dir() and len(model.parts) > 2)


def paths_in(options: Any, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Every path among options, with its key."""
    if isinstance(options, Path):
        yield at, options
    elif isinstance(options, list):
        for index, item in enumerate(options):
            yield from paths_in(item, (*at, str(index)))
    elif isinstance(options, BaseModel):
        for name in type(options).model_fields:
            yield from paths_in(getattr(options, name), (*at, name))


def check_model_directory(directory: Path, options: ModelOptions, key: str = "model.path") -> None:
    """Refuse a model directory, named by `key`, that lacks its configuration, tokenizer or weights."""
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{key}: {directory} is an adapter, not a model; give the checkpoint that it lies in, into which it is merged "
            "already, or make one with `align merge ADAPTER OUT`"
        )
    if not (directory / "config.json").is_file():
        raise UserError(f"{key}: {directory} has no config.json; give a Hugging Face model directory")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{key}: {directory} has no tokenizer (tokenizer.json); copy the tokenizer files of the model beside "
            "its weights"
        )
    if options.init == "pretrained" and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"{key}: {directory} has no weights (*.safetensors); give a trained model"
            + (", or set model.init=random to draw new weights from the seed" if key == "model.path" else "")
        )


def differences(before: Recipe, now: Recipe) -> list[str]:
    """The keys whose values matter and differ, such as "sft.steps (800 before, 900 now)". What a pipeline made stays the same where it is moved."""
    first, second = (with_inputs_found(recipe.model_dump(mode="json"), "", Path()) for recipe in (before, now))
    was, here = before.directory.absolute(), now.directory.absolute()
    while was != here and was.name == here.name:  # a stage, or the SFT inside it
        was, here = was.parent, here.parent
        if (file := here / "recipe.yaml").exists() and "stages" in read_yaml(file)[0]:
            first = _moved(first, f"{was}/", f"{here}/")
    return list(_differences(first, second, ""))


def _moved(value: Any, was: str, here: str) -> Any:
    """A value with paths that begin with `here` in place of those that begin with `was`."""
    if isinstance(value, dict):
        return {name: _moved(item, was, here) for name, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, was, here) for item in value]
    return here + value.removeprefix(was) if isinstance(value, str) and value.startswith(was) else value


def _differences(before: Any, now: Any, key: str) -> Iterator[str]:
    if before == now or key in FREE:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    else:
        yield f"{key} ({before!r} before, {now!r} now)"
