"""A recipe for one's own data and model: what the data and the machine allow, each choice with its reason."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from rich.console import Console

from align.data.cards import OwnSource, require_stage
from align.data.entries import card_of
from align.data.own import read_source
from align.data.types import Example
from align.errors import UserError
from align.model.policy import load_tokenizer
from align.model.sizes import GIB, ModelSizes, gib, model_sizes, shapes_of
from align.plan.placement import Cluster
from align.plan.plan import make_plan
from align.recipe import DataOptions, ModelOptions, PlannedStage, Recipe
from align.recipe.load import apply_override, collect_lines, recipe_of
from align.recipe.values import yaml_text
from align.run import read_status, write_atomically
from align.run.machine import gpu_bytes, memory_bytes, threads_available
from align.stages.commands import check_stages
from align.tools.show_data import (
    Seen,
    encoded,
    loaded,
    nearest_rank,
    show_form,
    show_lengths,
    show_refused,
    show_splits,
    some_of,
    table,
)
from rollout import FleetOptions

Stage = Literal["sft", "grpo", "reward_model"]
MOST_TRAINED_WHOLE = 10**9
"""Larger models get adapters where nobody says otherwise."""
LORA_TARGETS = "all-linear"
FILLED = 0.9
"""The share of the memory that is free now which a recipe may need."""
ALL_ENCODED = 10_000
"""Up to so many rows are all encoded before the recipe is written, of more the first thousand of each file."""
LENGTH_STEP = 32
EPOCHS, MOST_STEPS = 2, 2000


class Choice(NamedTuple):
    """A key of the recipe, its value, and why it has it; empty where that goes without saying."""

    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to run on; memory in bytes, what is free of it now."""

    cores: int
    memory: float
    gpus: int
    gpu_memory: float

    @classmethod
    def here(cls) -> "Machine":
        """This machine, or what a container leaves of it."""
        gpus = gpu_bytes()
        return cls(threads_available(), memory_bytes()[1], len(gpus), min(gpus, default=0))

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPUs with {gib(self.gpu_memory)} each" if self.gpus else "no GPU"
        return f"{self.cores} cores, {gib(self.memory)} of memory free, {gpus}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What recipes are made of: `rows` of the training split, and of those measured the tokens of whole `sequences`, of `prompts` alone, and
    of `answers` alone. The model reads `positions` tokens at most, None where nothing says so."""

    rows: int
    sequences: Sequence[int]
    prompts: Sequence[int]
    answers: Sequence[int]
    sizes: ModelSizes
    positions: int | None
    machine: Machine


@dataclass(frozen=True, slots=True)
class Thrift:
    """What saves memory, and why it was taken."""

    lora: str = ""
    checkpointing: str = ""
    bfloat16: str = ""


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
    "reward_model": [RATE, Choice("reward_model.steps", 1)],
}
"""What a recipe must have, to be read before anything is chosen; with room for whatever the user wants sampled."""


def from_(out: Path, name: str) -> str:
    """What the recipe at `out` calls a file that is named from the working directory; what is no file, such as a name on the hub, stays."""
    file, colon, function = name.partition(":") if ".py:" in name else (name, "", "")
    if "://" in name or not Path(file).expanduser().exists() or out.absolute().parent == Path.cwd():
        return name
    return f"{Path(file).expanduser().absolute()}{colon}{function}"


def read(data: DataOptions, stage: Stage, model: ModelOptions, machine: Machine, console: Console) -> Facts:
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


def settled(choice: Choice, given: Mapping[str, Any]) -> Choice:
    """The choice with the value that the user gave it, where there is one: what is chosen after it goes by that."""
    value: Any = given
    for name in choice.key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return choice if value is None else choice._replace(value=value)


def chosen(stage: Stage, facts: Facts, thrift: Thrift, given: Mapping[str, Any]) -> list[Choice]:
    """All keys of a recipe but those that the user named, which fit what the user has `given`."""
    machine = facts.machine
    processes = max(1, machine.gpus)
    wanted = Choice("model.dtype", "float32", "which every CPU computes, and alike in all engines")
    if machine.gpus or thrift.bfloat16:
        wanted = Choice("model.dtype", "bfloat16", thrift.bfloat16 or "on a GPU")
    found = [settled(wanted, given), *stage_choices(stage, facts, given)]
    dtype = found[0].value
    length = next(c.value for c in found if c.key.endswith("max_length"))
    if stage != "reward_model":
        workers = settled(Choice("rollout.workers", processes), given)
        found += [workers, *batch_for_each(workers.value, {choice.key: choice.value for choice in found}, given)]
        if machine.gpus:
            found.append(Choice("colocate", True, "learner ranks and rollout workers have the GPUs in turn"))
        else:
            found.append(Choice("rollout.threads", machine.cores, "workers and learners work in turn"))
        found.append(kv_cache(facts, length, 2 if dtype == "bfloat16" else 4))
    found.append(Choice("learner.ranks", processes))
    if machine.gpus:
        found.append(Choice("learner.zero_stage", 2))
    else:
        found.append(Choice("learner.threads", machine.cores))
    found.append(
        Choice("learner.micro_batch_tokens", max(length, 4096 if machine.gpus else 1024), "tokens of a forward pass")
    )
    if thrift.checkpointing:
        found.append(Choice("learner.gradient_checkpointing", True, thrift.checkpointing))
    if thrift.lora:
        found.append(Choice("learner.lora.targets", LORA_TARGETS, f"adapters are trained: {thrift.lora}"))
        found.append(Choice("learner.lora.rank", 16))
    whole = f"usual for all parameters: the model has {facts.sizes.total:,} parameters, which fit"
    rate, why = RATES[stage][bool(thrift.lora)], "usual for adapters" if thrift.lora else whole
    found.append(Choice("learner.optimizer.learning_rate", rate, why))
    steps = next(c.value for c in found if c.key.endswith(".steps"))
    found.append(Choice("learner.optimizer.warmup_steps", steps // 20))
    if stage == "grpo":
        found.append(Choice("learner.optimizer.schedule", "constant"))
    if dtype == "bfloat16" and not machine.gpus and stage != "reward_model":
        found += [
            Choice("agreement.warn_mean", 0.08),
            Choice("agreement.stop_mean", 0.15, "how far engines differ in bfloat16"),
        ]
    found.append(Choice("save_every", -(-steps // 4), "to go on after an interruption"))
    return [*found, *([] if machine.gpus else [Choice("machine.cores", machine.cores)])]


def batch_for_each(workers: int, values: Mapping[str, Any], given: Mapping[str, Any]) -> list[Choice]:
    """Smaller engine batches, where a step of GRPO has not one of the usual size for each worker."""
    sequences = values.get("grpo.prompts_per_step", 0) * values.get("grpo.group_size", 0)
    if not 0 < -(-sequences // FleetOptions().batch_sequences) < workers:
        return []
    why = f"of {sequences} sequences in a step, a batch for each worker"
    least = settled(Choice("rollout.concurrent_sequences", 1), given).value
    return [Choice("rollout.batch_sequences", max(-(-sequences // workers), least), why)]


def kv_cache(facts: Facts, length: int, element: int) -> Choice:
    """A cache for many sequences of so many tokens at once; of a GPU, no more than a quarter of what the weights leave."""
    machine, at_once = facts.machine, 128 if facts.machine.gpus else 16
    size = length * facts.sizes.kv_a_token * element * at_once / GIB
    room = (machine.gpu_memory - facts.sizes.total * element) / 4 / GIB
    if machine.gpus and size > room:
        return Choice("rollout.kv_cache_gb", max(1.0, math.floor(room)), "a quarter of what the weights leave of a GPU")
    return Choice("rollout.kv_cache_gb", max(0.25, math.ceil(size * 4) / 4), f"for {at_once} sequences at once")


RATES: Mapping[Stage, tuple[float, float]] = {"sft": (1e-5, 2e-4), "grpo": (1e-6, 2e-5), "reward_model": (1e-5, 1e-4)}
"""The learning rate for all parameters, and for adapters."""


def stage_choices(stage: Stage, facts: Facts, given: Mapping[str, Any]) -> Iterator[Choice]:
    """How long sequences are, how many make a step, how many steps there are, and what is evaluated."""
    gpus = bool(facts.machine.gpus)
    if stage == "reward_model":
        pairs = settled(batch("reward_model.pairs_per_step", facts, 64 if gpus else 16), given)
        yield settled(length("reward_model.max_length", facts.sequences, facts.positions), given)
        yield pairs
        yield settled(steps("reward_model", pairs.value, facts), given)
        return
    if stage == "sft":
        answer = up(nearest_rank(facts.answers, 0.95), 16)
        new, why = min(answer, 512 if gpus else 128), "as long as most answers of the data, within reason"
    else:
        new, why = (1024, "room to reason") if gpus else (128, "short, for a CPU: raise it for answers that reason")
    room = settled(Choice("rollout.max_length", facts.positions), given).value
    if room is not None:
        new = min(new, max(16, room - up(nearest_rank(facts.prompts, 0.99))))
    answers = settled(Choice(f"{'evaluation' if stage == 'sft' else 'sampling'}.max_new_tokens", new, why), given)
    asked = settled(Choice("evaluation.max_new_tokens", answers.value, why if stage == "sft" else ""), given)
    longest = max(answers.value, asked.value)
    needed = [*(facts.sequences if stage == "sft" else ()), *(prompt + longest for prompt in facts.prompts)]
    yield settled(length("rollout.max_length", needed, facts.positions), given)
    if stage == "sft":
        sequences = settled(batch("sft.sequences_per_step", facts, 64 if gpus else 32), given)
        yield sequences
        made = settled(steps("sft", sequences.value, facts), given)
        yield made
        yield Choice("sft.validate_every", max(1, made.value // 10))
        yield Choice("evaluation.limit", 256 if gpus else 32)
    else:
        prompts = settled(batch("grpo.prompts_per_step", facts, 32 if gpus else 8), given)
        yield answers
        yield prompts
        yield settled(Choice("grpo.group_size", 8), given)
        yield settled(steps("grpo", prompts.value, facts), given)
        yield Choice("evaluation.limit", 256 if gpus else 64)
    yield asked


def length(key: str, counts: Sequence[int], positions: int | None) -> Choice:
    """Room for all of the token counts, or for 99 % of them where a few are much longer; and for no more than the model reads."""
    longest, most = max(counts), nearest_rank(counts, 0.99)
    room, why = up(longest), f"the longest needs {longest} tokens"
    if longest > 2 * most:
        room, why = up(most), f"99 % need at most {most} tokens; longer ones, up to {longest}, are left out"
    if positions is not None and room > positions:
        room, why = (
            positions,
            f"the model reads no more; the longest needs {longest} tokens, and longer ones are left out",
        )
    return Choice(key, max(room, 2 * LENGTH_STEP), why)


def up(count: int, step: int = LENGTH_STEP) -> int:
    """The next multiple of `step`."""
    return -(-count // step) * step


def batch(key: str, facts: Facts, most: int) -> Choice:
    """What a step takes: a power of two, so that an epoch has eight steps at least where the data allow that; each rank has one at least."""
    count = int(2 ** math.floor(math.log2(max(1, min(most, facts.rows / 8)))))
    return Choice(key, max(count, min(facts.machine.gpus, facts.rows)), f"of {facts.rows} rows in the training split")


def steps(section: str, a_step: int, facts: Facts) -> Choice:
    """Two passes over the data, or as many steps as are made in a reasonable time."""
    count = -(-EPOCHS * facts.rows // a_step)
    if count <= MOST_STEPS:
        return Choice(f"{section}.steps", count, f"{EPOCHS} passes over the data")
    return Choice(f"{section}.steps", MOST_STEPS, f"{MOST_STEPS * a_step / facts.rows:.1f} passes over the data")


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
