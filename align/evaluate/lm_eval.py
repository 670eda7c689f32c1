"""Tasks of EleutherAI's lm-evaluation-harness (the optional package `lm_eval`) on a checkpoint."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import DirectoryPath, Field

from align.errors import UserError
from align.evaluate.hooks import Checkpoint, EvaluationError, Metrics, register
from align.evaluate.lm_worker import Harness, HarnessEngine, HarnessRequest, find_tasks
from rollout import Fleet
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


def ready(tasks: Tasks, include_path: Path | None = None) -> None:
    """The package is there and knows the tasks."""
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
    checkpoint: Checkpoint,
    fleet: Fleet,
    *,
    tasks: Tasks,
    limit: Annotated[int, Field(ge=1)] | None = None,
    include_path: DirectoryPath | None = None,
    backend: Literal["hf", "vllm"] = "hf",
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None,
    apply_chat_template: bool = False,
    engine: HarnessEngine = HarnessEngine(),  # noqa: B008
    unsafe_code: bool = False,
    timeout_s: Annotated[float, Field(gt=0)] = 24 * 3600,
) -> Metrics:
    """Tasks of lm-evaluation-harness, by their names or as {name: shots}; "deepseek_v2_report" stands for the report's.

    The harness loads the checkpoint a second time, with transformers ("hf") or vLLM, in a process of its own beside the
    rollout workers, and on a GPU needs room there; `engine` sets vLLM up, as `rollout` does the workers. `limit` is the
    number of examples of a task, `include_path` a folder with task files of one's own. A task that cannot be loaded is
    not run; nor is one that executes what the model writes, unless `unsafe_code`.

    Raises UserError where the package is missing or a task is unknown, EvaluationError where the process fails.
    """
    import ray

    require_package()
    request = HarnessRequest(
        model=checkpoint.model,
        tasks=with_shots(tasks),
        limit=limit,
        include_path=include_path and include_path.absolute(),
        backend=backend,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        engine=engine,
        unsafe_code=unsafe_code,
    )
    variables = environment(os.cpu_count() or 1) | ({"HF_ALLOW_CODE_EVAL": "1"} if unsafe_code else {})
    worker = ray.remote(num_cpus=0, max_restarts=0, runtime_env={"env_vars": variables})(Harness).remote()
    try:
        values, not_run, rows = ray.get(worker.evaluate.remote(request), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise EvaluationError(f"lm_eval: the tasks took longer than timeout_s = {timeout_s:g}") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise EvaluationError(f"lm_eval: the harness failed:\n{error}") from None
    except ray.exceptions.RayActorError as error:
        raise EvaluationError(f"lm_eval: the process of the harness died: {error}") from None
    finally:
        ray.kill(worker)
    return Metrics(values, not_run, rows)
