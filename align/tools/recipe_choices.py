"""What a recipe of `align init` says, by data, model and machine: each choice with its reason."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from align.model.sizes import GIB, ModelSizes, gib
from align.run.machine import gpu_bytes, memory_bytes, threads_available
from align.tools.show_data import nearest_rank
from rollout import FleetOptions

Stage = Literal["sft", "grpo", "dpo", "reward_model"]
LORA_TARGETS = "all-linear"
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
    least = 2 * length if stage in ("dpo", "reward_model") else length  # a pair is not divided
    tokens = max(least, 4096 if machine.gpus else 1024)
    found.append(Choice("learner.micro_batch_tokens", tokens, "tokens of a forward pass"))
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


RATES: Mapping[Stage, tuple[float, float]] = {
    "sft": (1e-5, 2e-4),
    "grpo": (1e-6, 2e-5),
    "dpo": (1e-6, 1e-5),
    "reward_model": (1e-5, 1e-4),
}
"""The learning rate for all parameters, and for adapters."""
A_STEP: Mapping[Stage, tuple[str, int, int]] = {
    "sft": ("sequences_per_step", 64, 32),
    "grpo": ("prompts_per_step", 32, 8),
    "dpo": ("pairs_per_step", 64, 16),
    "reward_model": ("pairs_per_step", 64, 16),
}
"""What a step takes, and how many at most on GPUs and on a CPU."""


def stage_choices(stage: Stage, facts: Facts, given: Mapping[str, Any]) -> Iterator[Choice]:
    """How long sequences are, how many make a step, how many steps there are, and what is evaluated."""
    gpus = bool(facts.machine.gpus)
    taken, on_gpus, on_cpu = A_STEP[stage]
    a_step = settled(batch(f"{stage}.{taken}", facts, on_gpus if gpus else on_cpu), given)
    made = settled(steps(stage, a_step.value, facts), given)
    if stage == "reward_model":
        yield settled(length("reward_model.max_length", facts.sequences, facts.positions), given)
        yield from (a_step, made)
        return
    samples = stage == "grpo"
    if samples:
        new, why = (1024, "room to reason") if gpus else (128, "short, for a CPU: raise it for answers that reason")
    else:
        answer = up(nearest_rank(facts.answers, 0.95), 16)
        new, why = min(answer, 512 if gpus else 128), "as long as most answers of the data, within reason"
    room = settled(Choice("rollout.max_length", facts.positions), given).value
    if room is not None:
        new = min(new, max(16, room - up(nearest_rank(facts.prompts, 0.99))))
    answers = settled(Choice(f"{'sampling' if samples else 'evaluation'}.max_new_tokens", new, why), given)
    asked = settled(Choice("evaluation.max_new_tokens", answers.value, "" if samples else why), given)
    longest = max(answers.value, asked.value)
    needed = [*(() if samples else facts.sequences), *(prompt + longest for prompt in facts.prompts)]
    yield settled(length("rollout.max_length", needed, facts.positions), given)
    yield from (answers, settled(Choice("grpo.group_size", 8), given)) if samples else ()
    yield from (a_step, made)
    if not samples:
        yield Choice(f"{stage}.validate_every", max(1, made.value // 10))
    yield Choice("evaluation.limit", 256 if gpus else 64 if samples else 32)
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
