"""What is measured is written down: a line of JSON each."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.plan.memory import GIB
from rollout.types import Trajectory

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "recipes/nano/policy"
OUT = Path(os.environ.get("OUT", ROOT / "runs/gpu_check"))
# Where models and runs are kept for the sections to share: on a machine with a GPU in memory, 24 GB of it.
WORK = Path(os.environ.get("GPU_CHECK_WORK", "/dev/shm/gpu_check" if torch.cuda.is_available() else OUT / "work"))
TINY = "--tiny" in sys.argv
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
synchronize: Callable[[], object] = torch.cuda.synchronize if GPU else lambda: None
section_name = ""


def section_command(letter: str) -> list[str]:
    """What runs a section in a process of its own."""
    return [sys.executable, "-m", "gpu_check", letter, "--child", *(["--tiny"] if TINY else [])]


def emit(what: str, **values: Any) -> None:
    """Append a result of this section to gpu.jsonl."""
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
    with (OUT / "gpu.jsonl").open("a") as file:
        file.write(json.dumps({"section": section_name, "what": what} | rounded, default=str) + "\n")


@contextmanager
def timed(what: str, **values: Any) -> Iterator[dict[str, Any]]:
    """Emit the seconds that the block takes, the GPU's work included. Of values `..._tokens` and `..._bytes`, also the rate."""
    synchronize()
    began = time.perf_counter()
    yield values
    synchronize()
    values["seconds"] = seconds = time.perf_counter() - began
    for name, amount in list(values.items()):
        if name.endswith("_tokens"):
            values[f"{name}_per_second"] = round(amount / seconds, 1)
        elif name.endswith("_bytes"):
            values["gb_per_second"] = amount / seconds / 1e9
    emit(what, **values)


def memory() -> dict[str, float]:
    """GiB that the card has in use, by whomever, and that PyTorch holds here now and held at most; nothing on a CPU."""
    if not GPU:
        return {}
    free, total = torch.cuda.mem_get_info()
    ours = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    names = ("card_gib", "now_gib", "peak_gib", "reserved_gib")
    return {name: size / GIB for name, size in zip(names, (total - free, *ours), strict=True)}


def emit_equal(what: str, one: Sequence[Trajectory], other: Sequence[Trajectory]) -> None:
    """How many trajectories have the same tokens, and bit for bit the same log-probabilities."""
    pairs = list(zip(one, other, strict=True))
    tokens = sum(list(a.token_ids) == list(b.token_ids) for a, b in pairs)
    exact = sum(np.array_equal(a.log_probs, b.log_probs) for a, b in pairs)
    emit(what, same_tokens=tokens, same_log_probs=exact, of=len(pairs))


def emit_difference(what: str, one: Sequence[Any], other: Sequence[Any]) -> None:
    """How far two sets of log-probabilities are apart, in nats a token; `k3` is an estimate of the KL divergence."""
    a, b = (torch.cat([torch.as_tensor(row).double() for row in rows]) for rows in (one, other))
    d, size = a - b, (a - b).abs()
    values = {"mean": size.mean(), "max": size.max(), "k3": (torch.expm1(d) - d).mean(), "bias": d.mean()}
    values |= {"p99": size.quantile(0.99), "beyond_half": (size > 0.5).double().mean()}
    emit(what, tokens=d.numel(), **{name: value.item() for name, value in values.items()})
