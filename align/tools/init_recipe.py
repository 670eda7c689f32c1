"""A recipe for one's own data and model: what the data and the machine allow, each choice with its reason."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from align.data import cards
from align.data.cards import OwnSource, require_stage
from align.data.entries import card_of
from align.data.own import read_source
from align.data.types import Example
from align.errors import UserError
from align.model.policy import load_tokenizer
from align.model.sizes import GIB, gib, model_sizes, shapes_of
from align.plan.placement import Cluster
from align.plan.plan import make_plan
from align.recipe import DataOptions, ModelOptions, PlannedStage, Recipe
from align.recipe.load import apply_override, collect_lines, recipe_of
from align.recipe.values import yaml_text
from align.run import read_status, write_atomically
from align.stages.commands import check_stages
from align.tools.recipe_choices import Choice, Facts, Machine, Stage, Thrift, chosen
from align.tools.show_data import (
    Seen,
    encoded,
    loaded,
    show_form,
    show_lengths,
    show_refused,
    show_splits,
    some_of,
    table,
)

MOST_TRAINED_WHOLE = 10**9
"""Larger models get adapters where nobody says otherwise."""
FILLED = 0.9
"""The share of the memory that is free now which a recipe may need."""
ALL_ENCODED = 10_000
"""Up to so many rows are all encoded before the recipe is written, of more the first thousand of each file."""


def init_recipe(
    stage: Stage,
    data: str,
    model: str,
    out: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    reward: str | None = None,
    lora: bool | None = None,
    overwrite: bool = False,
) -> None:
    """Write a recipe that trains `model` on `data` on this machine, and print what was read and chosen.

    `reward` is what GRPO learns by; `lora` says whether adapters are trained, None leaves it to the size of the model. Raises UserError for all
    that a run of the recipe would refuse; then nothing is written.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already: name another file with --out, or replace it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.parent}")
    named = [
        Choice("stage", stage),
        Choice("name", re.sub(r"[^A-Za-z0-9-]+", "-", out.stem).strip("-") or "mine"),
        Choice("model.path", from_(out, model)),
        Choice("data.path", from_(out, data)),
        *([Choice("rewards", [{"name": from_(out, reward)}])] if reward else []),
    ]
    machine, start = Machine.here(), recipe_of(values_of([*named, *REQUIRED[stage]], overrides), out)
    console.print(f"{data}, by {model}, on {machine}", markup=False, highlight=False, soft_wrap=True)
    facts = read(start.data[0], start.data_stage, start.model, machine, console)
    recipe, choices = fitting(stage, named, facts, overrides, out, lora)
    found = check_stages([PlannedStage(stage, out, [], recipe)], whole=facts.rows <= ALL_ENCODED)
    command = f"align {stage.replace('_', '-')} {out}"
    given = tuple(override.partition("=")[0] + "." for override in overrides)
    whys = [choice for choice in choices if choice.why and not f"{choice.key}.".startswith(given)]
    write_atomically(out, written(f"{stage} of {model} on {data}", command, values_of(choices, overrides), whys))
    table(console, "key", [[choice.key, plain_yaml(choice.value), choice.why] for choice in whys], ["value", "why"])
    for warning in found.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    if read_status(recipe.directory) is not None:
        command += f" run.overwrite=true  # {recipe.directory} holds a run"
    console.print(f"{out} is written. Next:\n  {command}", markup=False, highlight=False, soft_wrap=True)


RATE, ROOM = Choice("learner.optimizer.learning_rate", 1.0), Choice("rollout.max_length", 2**20)
REQUIRED: Mapping[Stage, Sequence[Choice]] = {
    "sft": [RATE, ROOM, Choice("sft.steps", 1)],
    "grpo": [RATE, ROOM, Choice("grpo.steps", 1), Choice("grpo.prompts_per_step", 1), Choice("grpo.group_size", 2)],
    "dpo": [RATE, ROOM, Choice("dpo.steps", 1), Choice("dpo.pairs_per_step", 1)],
    "reward_model": [RATE, Choice("reward_model.steps", 1)],
}
"""What a recipe must have, to be read before anything is chosen; with room for whatever the user wants sampled."""


def from_(out: Path, name: str) -> str:
    """What the recipe at `out` calls a file that is named from the working directory; what is no file, such as a name on the hub, stays."""
    file, colon, function = name.partition(":") if ".py:" in name else (name, "", "")
    if "://" in name or not Path(file).expanduser().exists() or out.absolute().parent == Path.cwd():
        return name
    return f"{Path(file).expanduser().absolute()}{colon}{function}"


def read(data: DataOptions, stage: cards.Stage, model: ModelOptions, machine: Machine, console: Console) -> Facts:
    """Read the data and the model's small files, and print what they are. Raises UserError for what a run refuses."""
    card = card_of(data)
    require_stage(card, stage)
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    skeleton = shapes_of(model)
    items = {split: loaded(card, split) for split in card.splits}
    if isinstance(card.source, OwnSource):
        show_form(card.source, console)
        tables = read_source(card.source).values()
        bad = [why for rows in tables for why in rows.bad]
        show_refused(bad, "cannot be used, and are left out", console, sum(rows.bad_count for rows in tables))
    show_splits(card, items, console)
    every = [item for found in items.values() for item in some_of(found)]
    if stage == "grpo":
        every = [replace(item, response=None) for item in every if isinstance(item, Example)]
    if not tokenizer.chat_template:
        encoded(every[0], tokenizer)  # says what to do
    seen = show_lengths(every, tokenizer, console)
    if not seen:
        encoded(every[0], tokenizer)
    answers = [last_answer(one.trained_on) for one in seen]
    # A conversation that ends by asking is evaluated on more than SFT learns from.
    longer = [item for item in every if isinstance(item, Example) and len(item.messages) > len(item.conversation) > 0]
    asked: list[Seen] = []
    for item in longer:
        with suppress(UserError):  # a row that a run leaves out, or never asks
            asked += encoded(replace(item, response=None, conversation=()), tokenizer)
    return Facts(
        rows=len(items["train"]),
        sequences=[len(one.token_ids) for one in seen],
        prompts=[
            *(answer.start for answer in answers),
            *(len(one.token_ids) for one in asked),
        ],
        answers=[len(answer) for answer in answers],
        sizes=model_sizes(skeleton),
        positions=getattr(skeleton.config.get_text_config(), "max_position_embeddings", None),
        machine=machine,
    )


def last_answer(trained_on: Sequence[bool]) -> range:
    """The places of the last stretch of tokens that are trained on; of a prompt alone, the empty one behind it."""
    end = max((place + 1 for place, trained in enumerate(trained_on) if trained), default=len(trained_on))
    start = max((place + 1 for place, trained in enumerate(trained_on[:end]) if not trained), default=0)
    return range(start, end)


def as_read(values: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a user gave, as the recipe has them: numbers that were texts, and the dtype that is the fastest."""
    return {
        key: as_read(value, recipe[key])
        if isinstance(value, Mapping) and isinstance(recipe[key], Mapping)
        else recipe[key]
        for key, value in values.items()
    }


def fitting(
    stage: Stage, named: Sequence[Choice], facts: Facts, overrides: Sequence[str], out: Path, lora: bool | None
) -> tuple[Recipe, list[Choice]]:
    """The first recipe, of those that save more and more memory, which fits the machine. Raises UserError where none does, and where what the user
    gave is refused although there is memory."""
    sizes, machine = facts.sizes, facts.machine
    how_many = f"the model has {sizes.total:,} parameters"
    tried = [Thrift()]
    if lora or (lora is None and sizes.total > MOST_TRAINED_WHOLE):
        tried = [Thrift(lora="asked for" if lora else how_many)]
    elif lora is None:
        tried.append(Thrift(lora=f"{how_many}, and not all of them can be trained in the memory that is free"))
    tried.append(replace(tried[-1], checkpointing="less memory, more time"))
    if not machine.gpus:
        tried.append(replace(tried[-1], bfloat16="float32 takes more memory than is free"))
    cluster, start = Cluster(1, machine.gpus, machine.gpu_memory), values_of([*named, *REQUIRED[stage]], overrides)
    given = as_read(values_of([], overrides), recipe_of(start, out).model_dump(mode="json"))
    refused: Sequence[str] = []
    for attempt in tried:
        choices = [*named, *chosen(stage, facts, attempt, given)]
        recipe = recipe_of(values_of(choices, overrides), out)
        plan = make_plan(recipe, sizes, cluster)
        need = sum(role.count * role.total for role in plan.roles)
        refused = plan.refusals
        if not machine.gpus and need > FILLED * machine.memory:
            refused = [f"it needs {gib(need)} at least, on {machine}"]
        elif not machine.gpus:
            choices.append(Choice("machine.memory_gb", math.ceil(need / GIB * 10) / 10, "what `align plan` counts"))
            recipe = recipe_of(values_of(choices, overrides), out)
            if refused := make_plan(recipe, sizes, cluster).refusals:
                break
        if not refused:
            return recipe, choices
    raise UserError(f"the model cannot be trained on this machine: {'; '.join(refused)}")


def values_of(choices: Sequence[Choice], overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe as nested mappings; overrides go before choices. Raises UserError for an override that cannot be read."""
    values: dict[str, Any] = {}
    for choice in choices:
        at = values
        *parents, last = choice.key.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = choice.value
    for override in overrides:
        apply_override(values, override)
    return values


def written(what: str, command: str, values: Mapping[str, Any], whys: Sequence[Choice]) -> str:
    """The text of a recipe, with the reasons of choices behind their keys."""
    lines = plain_yaml(values, flow=False).splitlines()
    places: dict[tuple[str, ...], int] = {}
    collect_lines(yaml.compose("\n".join(lines)), (), places, Path())
    for choice in whys:
        lines[places[tuple(choice.key.split("."))] - 1] += f"  # {choice.why}"
    head = [
        f"# {what}, written by `align init`: yours to change. Run it with `{command}`.",
        "# `align keys` explains every key.",
    ]
    return "\n".join([*head, *lines, ""])


def plain_yaml(value: Any, *, flow: bool = True) -> str:
    """A value as YAML."""
    text = yaml_text(value, default_flow_style=flow, width=math.inf)
    return text.removesuffix("\n...\n").strip()
