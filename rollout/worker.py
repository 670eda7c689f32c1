"""One rollout worker: a vLLM engine in a Ray actor."""

import atexit
import gc
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rollout.engine import Engine
from rollout.processes import ProcessId, introduce_this_process, openmp
from rollout.types import FleetOptions

CONCURRENCY_GROUPS = {"pulse": 1, "watch": 1}
"""Threads of the actor besides the one that the engine runs in."""


def environment(threads: int, *, on_gpu: bool | None = None) -> dict[str, str]:
    """What must be in the environment before the process of a worker starts, on a GPU where this process has one when not given.

    vLLM then runs in the actor's own process: it loads in seconds, and no engine process can outlive a killed actor.
    """
    # On a CPU vLLM would compile a single small function, which takes a C++ compiler and seconds at each start.
    has_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    compilation = {} if has_gpu else {"TORCHDYNAMO_DISABLE": "1"}
    return {
        **compilation,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        **openmp(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What each worker of a fleet loads: a model in a dtype ("float32" or "bfloat16"), and the tokens that end a turn."""

    model: str
    dtype: str
    options: FleetOptions
    stop_token_ids: Sequence[int]
    trust_remote_code: bool = False


class RolloutWorker(Engine):
    """An engine in an actor's process. `start` comes before all else of an engine; it is no constructor so that `pulse` answers by then."""

    def __init__(self) -> None:
        # Interpreters full of native extensions can hang in their teardown: leave without it.
        atexit.register(os._exit, 0)
        self._process = introduce_this_process()
        self.steps = 0

    def start(self, setup: WorkerSetup) -> None:
        """Load the policy, and draw a token from it."""
        options = setup.options
        torch.set_num_threads(options.threads)
        super().__init__(
            setup.model, setup.dtype, options, setup.stop_token_ids, trust_remote_code=setup.trust_remote_code
        )
        self.probe()
        # What was loaded stays: a full collection would walk through all of it, in the middle of a step.
        gc.collect()
        gc.freeze()

    def pulse(self) -> tuple[ProcessId, int]:
        """Who this process is, and how many steps its engine has made. Answers while the engine works."""
        return self._process, self.steps

    def watch(self) -> None:
        """Never returns: this call fails at the moment when the process ends."""
        threading.Event().wait()
