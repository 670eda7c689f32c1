"""`model.dtype: fastest`: the dtype that a machine computes fastest in, chosen when a run begins."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from rollout.arguments import AMPERE, Device
from rollout.processes import cluster_address

Dtype = Literal["float32", "bfloat16"]
FASTEST = "fastest"
SIDE, TRIES = 768, 6
"""Of the matrices whose product is timed, and how often each: the first product of a dtype takes longer."""

_for_gpus: ContextVar[bool] = ContextVar("for_gpus", default=False)
logger = logging.getLogger(__name__)


@contextmanager
def chosen_for_gpus() -> Iterator[None]:
    """Choose for a cluster of GPUs in this block: bfloat16 on a machine that has none, whatever its CPU computes fastest in."""
    token = _for_gpus.set(True)
    try:
        yield
    finally:
        _for_gpus.reset(token)


def with_dtype_chosen(values: Mapping[str, Any], path: Path, *, in_pipeline: bool = False) -> Mapping[str, Any]:
    """The values of the recipe at `path` with a dtype in place of "fastest": that of the run in its directory, where it goes on with it, or else
    this machine's. A pipeline's stages go on with theirs though `run.overwrite` is set."""
    model, run = values.get("model"), values.get("run")
    if not isinstance(model, dict) or model.get("dtype") != FASTEST:
        return values
    run = run if isinstance(run, dict) else {}
    directory = Path(str(run.get("dir") or Path("runs") / str(values.get("name")))).expanduser()
    if (in_pipeline or not run.get("overwrite")) and (dtype := dtype_of_run(directory / "recipe.yaml")):
        why = "as the run in its directory"
    else:
        dtype, why = dtype_of_machine()
    logger.warning("%s: model.dtype is fastest: %s (%s)", path, dtype, why)
    return {**values, "model": {**model, "dtype": dtype}}


def dtype_of_machine() -> tuple[Dtype, str]:
    """The dtype that this machine computes fastest in, and why; that of GPUs where a cluster is joined by what is built for them."""
    device = Device.here()
    joins_gpus = cluster_address() is not None and torch.version.cuda is not None
    if (_for_gpus.get() or joins_gpus) and device.capability is None:
        return "bfloat16", "GPUs from Ampere on compute in it"
    if device.capability is not None:
        fast = device.capability >= AMPERE
        return ("bfloat16" if fast else "float32"), f"{device.name} {'computes' if fast else 'does not compute'} in it"
    speedup = bfloat16_speedup()
    why = f"this CPU multiplies matrices in bfloat16 {speedup:.2g} times as fast as in float32"
    return ("bfloat16" if speedup > 1 else "float32"), why


@cache
def bfloat16_speedup() -> float:
    """How many times as fast as in float32 this CPU multiplies matrices in bfloat16, timed; less than 1 where that is slower.

    Its instruction sets do not tell: with AVX512-BF16, but without AMX, a Xeon took twice as long in bfloat16.
    """
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(TRIES):
        for dtype in seconds:
            left, right = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
            started = time.perf_counter()
            torch.mm(left, right)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def dtype_of_run(recipe: Path) -> str | None:
    """The dtype in the recipe that a run keeps; None where there is no such file, or a damaged one."""
    try:
        return str(yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["dtype"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
