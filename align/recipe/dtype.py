"""`model.dtype: fastest`: the dtype that a machine computes fastest in, chosen when a run begins."""

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from rollout.arguments import AMPERE, Device
from rollout.processes import cluster_address

Dtype = Literal["float32", "bfloat16"]
FASTEST = "fastest"
CPU_HAS_BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}
"""Flags of /proc/cpuinfo: CPUs without one of these instruction sets take three times as long in bfloat16 as in float32."""
ISA_WITHOUT = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""What oneDNN's ONEDNN_MAX_CPU_ISA may be limited to without such instructions."""

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
    return fastest_dtype(device, cpu_flags(Path("/proc/cpuinfo")), os.environ)


def fastest_dtype(device: Device, flags: Collection[str], environment: Mapping[str, str]) -> tuple[Dtype, str]:
    """The dtype and why, for a device, and the flags of its CPU in an environment that may limit oneDNN."""
    if device.capability is not None:
        fast = device.capability >= AMPERE
        return ("bfloat16" if fast else "float32"), f"{device.name} {'computes' if fast else 'does not compute'} in it"
    limit = environment.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in ISA_WITHOUT:
        return "float32", f"ONEDNN_MAX_CPU_ISA={limit} leaves no instructions for bfloat16"
    if found := sorted(CPU_HAS_BFLOAT16.intersection(flags)):
        return "bfloat16", f"this CPU has {', '.join(found)}"
    return "float32", "this CPU has no instructions for bfloat16"


def dtype_of_run(recipe: Path) -> str | None:
    """The dtype in the recipe that a run keeps; None where there is no such file, or a damaged one."""
    try:
        return str(yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["dtype"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def cpu_flags(cpuinfo: Path) -> set[str]:
    """The instruction sets of the first processor; empty where they cannot be read."""
    try:
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
