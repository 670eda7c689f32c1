"""One rollout worker: a vLLM engine in a Ray actor."""

import atexit
import gc
import os
from collections.abc import Mapping, Sequence

import torch

from rollout.engine import Engine, Request
from rollout.types import Completion, EngineOptions, SamplingOptions


def environment(threads: int) -> dict[str, str]:
    """What must be in the environment before the process of a worker starts.

    vLLM then runs in the actor's own process: it loads in seconds, and no engine process can outlive a killed actor.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


class RolloutWorker:
    """Draws completions and takes new weights."""

    def __init__(self, model: str, dtype: str, options: EngineOptions, threads: int, stop_token_ids: Sequence[int]):
        # Interpreters full of native extensions can hang in their teardown: leave without it.
        atexit.register(os._exit, 0)
        torch.set_num_threads(threads)
        self._engine = Engine(model, dtype, options, stop_token_ids)
        # What was loaded stays: a full collection would walk through all of it, in the middle of a step.
        gc.collect()
        gc.freeze()

    def ready(self) -> int:
        """The version of the weights, once the engine is loaded."""
        return self._engine.weight_version

    def generate(self, requests: Sequence[Request], sampling: SamplingOptions) -> list[Completion]:
        """One completion for each request, in their order."""
        return self._engine.generate(requests, sampling)

    def load(
        self, named_tensors: Mapping[str, torch.Tensor], version: int, modules: Sequence[str] | None = None
    ) -> int:
        """Take the tensors of a checkpoint, or of some of its modules, as the new weights. Returns their version."""
        self._engine.load(named_tensors.items(), version, modules)
        return self._engine.weight_version
