"""What the GRPO benchmark compares. `grpo_step.py` runs each side in a process of its own:

python benchmarks/sides.py ours|trl|floor TASK.json RESULT.json
"""

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil

import reward
import rollout.worker
from align.data.cards import load_card
from align.data.chat import encode_prompt
from align.data.loader import load_split
from align.data.types import Example
from align.model.policy import DTYPES, load_policy, load_tokenizer
from align.recipe import GrpoRecipe, ModelOptions
from align.run import MetricsLog
from rollout import EngineOptions

SEED = 0
LEARNING_RATE = 1e-5
CORES = 2
MICRO_BATCH_TOKENS = 4096
SPLITS = ((2, 1), (1, 2))  # processes x threads in which the floor may use two cores


@dataclass(frozen=True)
class Task:
    """The work of one side: `steps` timed GRPO steps after `warmup` steps, every completion `new_tokens` long.

    `card` has the prompts. `processes` is how many workers and ranks of ours share the cores.
    """

    policy: str
    dtype: str
    share_prompts: bool
    card: str
    processes: int
    scratch: str
    prompts: int
    group_size: int
    new_tokens: int
    warmup: int
    steps: int

    @property
    def completions(self) -> int:
        return self.prompts * self.group_size

    def timed(self, readings: Sequence["Reading"]) -> dict[str, list[float]]:
        """What each timed step took, from readings at the ends of all steps, warm-up included."""
        steps = list(pairwise(readings))[self.warmup - 1 :]
        return {
            "step_seconds": [b.clock - a.clock for a, b in steps],
            "cpu_seconds": [b.own - a.own for a, b in steps],
            "other_cpu_seconds": [(b.machine - a.machine) - (b.own - a.own) for a, b in steps],
        }


class Reading(NamedTuple):
    """The clock, and the CPU seconds so far of a side's processes and of the whole machine (what a host stole included)."""

    clock: float
    own: float
    machine: float


def read(root: int | None = None) -> Reading:
    """A reading now, for the process `root` (this one when not given) and all below it."""
    own = 0.0
    process = psutil.Process(root)
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            times = member.cpu_times()
            own += times.user + times.system
    every = psutil.cpu_times()
    busy = every.user + every.nice + every.system + every.irq + every.softirq + every.steal
    return Reading(time.perf_counter(), own, busy)


# What `Task.timed` returns, and "parts": seconds by name, "note": str.
Result = dict[str, Any]


@reward.register("coin")
def coin(sample: reward.Sample) -> reward.Score:
    """Heads or tails by the completion's hash: without variance in the groups there would be no gradient."""
    heads = hashlib.sha256(sample.completion.encode()).digest()[0] % 2
    return reward.Score(float(heads), reward.Verdict.PASS if heads else reward.Verdict.WRONG)


def ours(task: Task) -> Result:
    """This project's stage as `align grpo` runs it, samples and metrics written: two workers, two learner ranks."""
    from align.stages.commands import run_grpo

    # Ray runs its workers at niceness 15; on a machine that has other work to do, the sides would not be equals.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (its name)
    directory = Path(task.scratch) / "run"
    both = {"threads": CORES // task.processes}
    recipe = GrpoRecipe.model_validate(
        {
            "stage": "grpo",
            "name": "bench",
            "seed": SEED,
            "run": {"dir": directory},
            "model": {"path": task.policy, "dtype": task.dtype},
            "data": {"card": task.card, "limit": task.prompts},
            "rewards": [{"name": "coin"}],
            "rollout": {
                **both,
                "workers": task.processes,
                "max_length": longest_prompt(task) + task.new_tokens,
                "batch_sequences": -(-task.completions // task.processes),
            },
            "learner": {
                **both,
                "ranks": task.processes,
                "micro_batch_tokens": MICRO_BATCH_TOKENS,
                "share_prompts": task.share_prompts,
                "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
            },
            "sampling": {"max_new_tokens": task.new_tokens},
            "grpo": {
                "steps": task.warmup + task.steps,
                "prompts_per_step": task.prompts,
                "group_size": task.group_size,
            },
            "evaluation": {"limit": 1, "samples": 0, "max_new_tokens": 1},
        }
    )
    with patch("align.session.session.stop_token_ids", return_value=[]), noted_steps() as ends:
        run_grpo(recipe, None)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "step_seconds" in row]
    check_lengths(task, [row["length"] for row in rows])
    timed = rows[task.warmup :]
    parts = {
        name: median(row[f"seconds/{name}"] for row in timed) for name in ("sampling", "scoring", "training", "weights")
    }
    # From one step's line of metrics to the next, so that what a step does outside its own clock counts too.
    return task.timed(ends) | {
        "parts": parts,
        "note": f"train_grpo: {task.processes} rollout workers and learner ranks of {CORES // task.processes} threads",
    }


@contextmanager
def noted_steps() -> Iterator[list[Reading]]:
    """A reading at the end of each step that a run in the block makes; what an evaluation writes is no step."""
    ends: list[Reading] = []
    write = MetricsLog.write

    def write_and_note(log: MetricsLog, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        if "step_seconds" in metrics:
            ends.append(read())
        write(log, step, stage, metrics)

    with patch.object(MetricsLog, "write", write_and_note):
        yield ends


def trl(task: Task) -> Result:
    """TRL's trainer in one process with all threads."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Ends(TrainerCallback):
        """Notes when each step ends."""

        def __init__(self) -> None:
            self.at: list[Reading] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.at.append(read())

    count = task.warmup + task.steps
    rows = [{"prompt": list(example.messages)} for example in examples(task)]
    micro_batch = task.completions // 4
    lengths: list[float] = []
    score = reward.trl_reward_func("coin")

    def scored(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        lengths.extend(len(ids) for ids in columns["completion_ids"])
        return score(prompts, completions, **columns)

    ends = Ends()
    trainer = GRPOTrainer(
        model=task.policy,
        reward_funcs=[scored],
        args=GRPOConfig(
            output_dir=task.scratch,
            model_init_kwargs={"dtype": task.dtype},
            bf16=False,
            max_steps=count,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=task.completions // micro_batch,
            num_generations=task.group_size,
            max_completion_length=task.new_tokens,
            generation_kwargs={"min_new_tokens": task.new_tokens},
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            beta=0.0,
            loss_type="grpo",
            router_aux_loss_coef=0.0,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        callbacks=[ends],
    )
    trainer.train()
    check_lengths(task, lengths)
    return task.timed(ends.at) | {
        "parts": {},
        "note": "GRPOTrainer, transformers generation, 1 process with all threads",
    }


def floor(task: Task) -> Result:
    """Bare vLLM, then bare forward, backward and AdamW in transformers; of each the faster use of two cores."""
    sampling = {split: timed_processes(sampling_passes, task, *split) for split in SPLITS}
    training = {split: timed_processes(training_passes, task, *split) for split in SPLITS}
    split_s, sampled = min(sampling.items(), key=lambda item: median(item[1]["step_seconds"]))
    split_t, trained = min(training.items(), key=lambda item: median(item[1]["step_seconds"]))
    return {name: [a + b for a, b in zip(sampled[name], trained[name], strict=True)] for name in sampled} | {
        "parts": {"sampling": median(sampled["step_seconds"]), "training": median(trained["step_seconds"])},
        "note": "vLLM in {} processes x {} threads, transformers in {} x {}".format(*split_s, *split_t),
    }


def sampling_passes(task: Task, rank: int, processes: int) -> Iterator[None]:
    """Each item drawn samples a step's completions of this process. Neither seeds nor log-probabilities are asked for."""
    from transformers import AutoConfig

    from rollout.arguments import prepare

    options = EngineOptions(
        max_length=longest_prompt(task) + task.new_tokens, batch_sequences=task.completions // processes
    )
    arguments = prepare(AutoConfig.from_pretrained(task.policy), task.dtype, options)
    from vllm import LLM, SamplingParams

    llm = LLM(model=task.policy, dtype=task.dtype, **arguments)
    parameters = SamplingParams(max_tokens=task.new_tokens, ignore_eos=True, detokenize=False)
    prompts = share_of_prompts(task, rank, processes)
    while True:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        check_lengths(task, [len(output.outputs[0].token_ids) for output in outputs])
        yield


def training_passes(task: Task, rank: int, processes: int) -> Iterator[None]:
    """Each item drawn is a step on as many tokens: forward, backward, AdamW; ranks do not talk to each other."""
    import torch

    policy = load_policy(ModelOptions(path=task.policy), DTYPES[task.dtype])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
    prompts = share_of_prompts(task, rank, processes)
    width = max(map(len, prompts)) + task.new_tokens
    ids = torch.randint(policy.config.vocab_size, (len(prompts), width))
    while True:
        for part in ids.chunk(-(-ids.numel() // MICRO_BATCH_TOKENS)):
            logits = policy(input_ids=part, use_cache=False, logits_to_keep=task.new_tokens + 1).logits[:, :-1]
            targets = part[:, -task.new_tokens :]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            (loss * len(part) / len(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def timed_processes(
    passes: Callable[[Task, int, int], Iterator[None]], task: Task, processes: int, threads: int
) -> dict[str, list[float]]:
    """What the timed steps of `processes` of `threads` threads together took."""
    from torch.multiprocessing import spawn

    os.environ |= rollout.worker.environment(threads)
    context = multiprocessing.get_context("spawn")
    barrier, ends = context.Barrier(processes), context.SimpleQueue()
    spawn(run_passes, (passes, task, processes, threads, barrier, ends), processes)
    return task.timed([ends.get() for _ in range(task.warmup + task.steps)])


def run_passes(
    rank: int,
    passes: Callable[[Task, int, int], Iterator[None]],
    task: Task,
    processes: int,
    threads: int,
    barrier: Any,
    ends: Any,
) -> None:
    """One process of `timed_processes`; the first takes a reading of all of them after each step."""
    import torch

    torch.set_num_threads(threads)
    work = passes(task, rank, processes)
    for _ in range(task.warmup + task.steps):
        next(work)
        barrier.wait()
        if rank == 0:
            ends.put(read(os.getppid()))
        barrier.wait()


def share_of_prompts(task: Task, rank: int, processes: int) -> list[list[int]]:
    """The prompts, once for each completion, that fall to one of the processes."""
    tokenizer = load_tokenizer(task.policy)
    prompts = [encode_prompt(tokenizer, e.messages) for e in examples(task) for _ in range(task.group_size)]
    return prompts[rank::processes]


def examples(task: Task) -> Sequence[Example]:
    """The problems of every step: those to which our stage is limited too."""
    return load_split(load_card(task.card), "train", limit=task.prompts, seed=SEED).examples


def longest_prompt(task: Task) -> int:
    """The tokens of the longest prompt."""
    tokenizer = load_tokenizer(task.policy)
    return max(len(encode_prompt(tokenizer, example.messages)) for example in examples(task))


def check_lengths(task: Task, lengths: list[float]) -> None:
    """A side that sampled fewer tokens would win by it."""
    if not lengths or any(length != task.new_tokens for length in lengths):
        raise RuntimeError(f"completions of {sorted(set(lengths))} tokens, where all should have {task.new_tokens}")


SIDES: dict[str, Callable[[Task], Result]] = {"ours": ours, "trl": trl, "floor": floor}

if __name__ == "__main__":
    side, task_file, result_file = sys.argv[1:]
    result = SIDES[side](Task(**json.loads(Path(task_file).read_text())))
    Path(result_file).write_text(json.dumps(result))
