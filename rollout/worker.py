"""One rollout worker: a vLLM engine in a Ray actor."""

import atexit
import gc
import os
import threading
from collections.abc import Sequence

import torch

from rollout.engine import Engine, Request
from rollout.processes import ProcessId, introduce_this_process, openmp
from rollout.sync.base import AdapterFiles, WeightSource
from rollout.sync.broadcast import Receiver
from rollout.types import EngineOptions, SamplingOptions, Trajectory

CONCURRENCY_GROUPS = {"pulse": 1, "watch": 1}
"""Threads of the actor besides the one that the engine runs in."""


def environment(threads: int) -> dict[str, str]:
    """What must be in the environment before the process of a worker starts.

    vLLM then runs in the actor's own process: it loads in seconds, and no engine process can outlive a killed actor.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        **openmp(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


class RolloutWorker:
    """Draws trajectories and takes new weights. `start` comes first; it is no constructor so that `pulse` answers by then."""

    def __init__(self) -> None:
        # Interpreters full of native extensions can hang in their teardown: leave without it.
        atexit.register(os._exit, 0)
        self._process = introduce_this_process()
        self._engine: Engine | None = None

    def start(
        self,
        model: str,
        dtype: str,
        options: EngineOptions,
        threads: int,
        stop_token_ids: Sequence[int],
        trust_remote_code: bool,
    ) -> None:
        """Load the policy, and draw a token from it."""
        torch.set_num_threads(threads)
        self._engine = Engine(model, dtype, options, stop_token_ids, trust_remote_code=trust_remote_code)
        self._engine.probe()
        # What was loaded stays: a full collection would walk through all of it, in the middle of a step.
        gc.collect()
        gc.freeze()

    def sample(self, requests: Sequence[Request], sampling: SamplingOptions) -> list[Trajectory]:
        """One trajectory for each request, in their order."""
        return self._loaded.sample(requests, sampling)

    def load(
        self, source: WeightSource | AdapterFiles | Receiver, version: int, modules: Sequence[str] | None = None
    ) -> None:
        """Take the tensors of a checkpoint, or of some of its modules, as the new weights; or an adapter."""
        if isinstance(source, AdapterFiles):
            self._loaded.load_adapter(source.directory, version)
        else:
            self._loaded.load(source if isinstance(source, Receiver) else source.buckets(), version, modules)

    def sleep(self) -> None:
        """Give the GPU to others."""
        self._loaded.sleep()

    def wake(self) -> None:
        """Take it back."""
        self._loaded.wake()

    def probe(self) -> None:
        """Draw a token: what has an answer to this can serve."""
        self._loaded.probe()

    def pulse(self) -> tuple[ProcessId, int]:
        """Who this process is, and how many steps its engine has made. Answers while the engine works."""
        return self._process, self._engine.steps if self._engine else 0

    def watch(self) -> None:
        """Never returns: this call fails at the moment when the process ends."""
        threading.Event().wait()

    @property
    def _loaded(self) -> Engine:
        assert self._engine is not None, "start comes first"
        return self._engine
