"""The rollout workers together: prompts in, groups of trajectories out as they finish."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, pairwise
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from rollout.colocation import Colocation
from rollout.engine import Request
from rollout.parts import NotedTrajectory
from rollout.processes import start_limit_s
from rollout.supervisor import Batch, Job, Supervisor, Update
from rollout.sync.base import WeightSource
from rollout.types import FleetOptions, Group, Prompt, RolloutError, SamplingOptions, Trajectory
from rollout.worker import RolloutWorker, WorkerSetup
from rollout.worker_handle import Fault, WorkerHandle, new_actor

T = TypeVar("T")
START_S = 300.0
FORMER_NAMES = {"generate": "sample", "members": "workers", "sleep": "offload", "wake": "onload"}


class Fleet:
    """Rollout workers as Ray actors, each with a copy of the policy.

    The sequences of a call are cut into engine batches before anything is known of the workers, and each batch is
    sampled as a whole by one of them. So what comes back is the same, to the last bit on a CPU, for any number of workers
    and whichever served a batch, the one that took over from a lost worker included. On GPUs it is with
    `batch_invariant`, or where the kernels of equal cards compute a batch twice in the same way.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        options: FleetOptions,
        stop_token_ids: Sequence[int],
        on_fault: Callable[[Fault], None] | None = None,
        colocation: Colocation | None = None,
        *,
        trust_remote_code: bool = False,
    ):
        """Start the workers and load `model` in each (Ray must be running), on the GPUs of a colocation if given.

        `trust_remote_code` lets the model bring code of its own.

        What happens to workers is told to `on_fault`, or logged as a warning: during calls of the fleet, by the thread
        that makes them.
        """
        limit = start_limit_s(options.start_timeout_s, START_S, model)
        options = options.model_copy(update={"start_timeout_s": limit})
        self._options = options
        self._on_fault = on_fault or log_fault
        setup = WorkerSetup(model, dtype, options, list(stop_token_ids), trust_remote_code)
        self._supervisor = Supervisor(
            options, setup, partial(new_actor, options, colocation and colocation.placement_group)
        )
        self._supervisor.start()
        self._serials = count(1)
        self._is_offloaded = False
        self._colocation = colocation
        self._claim_gpus()
        self.weight_version = 0

    @property
    def workers(self) -> Sequence[WorkerHandle]:
        """The workers, to look at: their state, what they are doing, where they are."""
        return self._supervisor.workers

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in FORMER_NAMES:
                raise AttributeError(f"a fleet has no attribute {name!r}")
            warnings.warn(f"Fleet.{name} is Fleet.{FORMER_NAMES[name]} now", DeprecationWarning, stacklevel=2)
            return getattr(self, FORMER_NAMES[name])

    def wait_until_ready(self) -> None:
        """Return when the workers have loaded the policy. Raises RolloutError."""
        self._answer(self._supervisor.when_started())

    def offload(self) -> None:
        """Let the workers move what they hold on their GPUs to the CPU's memory. Returns when they have. Raises RolloutError."""
        self._set_offloaded(True)

    def onload(self) -> None:
        """Let the workers move what they held on their GPUs back there. Returns when they have. Raises RolloutError."""
        self._set_offloaded(False)

    def sample(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: SamplingOptions,
        *,
        seed: int,
        step: int,
        keep_bad: bool = False,
    ) -> Iterator[Group]:
        """Draw `group_size` trajectories of each prompt; yields groups as they finish, in no particular order.

        What is drawn depends on the weights and on (seed, step, prompt id, index). Prompt ids must be distinct.
        Raises RolloutError for a log-probability that is not finite, unless `keep_bad`.
        """
        self._claim_gpus()
        requests = [
            Request(prompt, index, sample_seed(seed, step, prompt.id, index))
            for prompt in prompts
            for index in range(group_size)
        ]
        waiting: dict[str, dict[int, Trajectory]] = {prompt.id: {} for prompt in prompts}
        if len(waiting) != len(prompts):
            raise RolloutError("two prompts of one call have the same id")
        by_id = {prompt.id: prompt for prompt in prompts}
        batches = engine_batches(requests, self._options.batch_sequences)
        for trajectories in self._run(batches, sampling, RolloutWorker.sample):
            for drawn in trajectories:
                if not (keep_bad or drawn.is_finite):
                    raise RolloutError(
                        f"the sampler returned a log-probability that is not finite for prompt {drawn.prompt_id!r}: "
                        "its weights hold NaN or infinity"
                    )
                waiting[drawn.prompt_id][drawn.index] = drawn
                if len(waiting[drawn.prompt_id]) == group_size:
                    group = waiting.pop(drawn.prompt_id)
                    yield Group(by_id[drawn.prompt_id], [group[index] for index in range(group_size)])

    def sample_parts(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[NotedTrajectory]:
        """Draw one trajectory of each prompt, at temperature 1, with what the parts of the model computed for it. Raises RolloutError."""
        self._claim_gpus()
        requests = [Request(prompt, 0, sample_seed(0, 0, prompt.id, 0)) for prompt in prompts]
        sampling = SamplingOptions(max_new_tokens=max_new_tokens)
        for noted in self._run([[request] for request in requests], sampling, RolloutWorker.sample_parts):
            yield from noted

    def load(self, source: WeightSource, version: int, modules: Sequence[str] | None = None) -> None:
        """Give every worker new weights; trajectories drawn from now on carry `version`. Raises WeightUpdateError, RolloutError.

        With `modules`, such as `model.layers.0.self_attn`, `source` has the tensors of these alone, and all else stays as it is. The source is kept until the
        next update, for workers that are started in place of lost ones, and then released.
        """
        self._claim_gpus()
        update = Update(next(self._serials), version, source, modules)
        loaded = self._supervisor.update(update)
        try:
            source.send(self._answer(update.receiving))
            self._answer(loaded, renew=True)
        finally:
            for replaced in update.replaced:
                replaced.release()
        self.weight_version = version

    def close(self) -> None:
        """End the workers' processes."""
        self._supervisor.close()
        self._report_faults()

    def _claim_gpus(self) -> None:
        if self._colocation:
            self._colocation.claim(self)

    def _set_offloaded(self, offloaded: bool) -> None:
        if offloaded != self._is_offloaded:
            self._answer(self._supervisor.set_offloaded(offloaded))
            self._is_offloaded = offloaded

    def _run(
        self,
        batches: Sequence[Sequence[Request]],
        sampling: SamplingOptions,
        draw: Callable[[RolloutWorker, Sequence[Request], SamplingOptions], list[T]],
    ) -> Iterator[list[T]]:
        job = Job(sampling, self.weight_version, draw)
        self._supervisor.submit([Batch(job, requests) for requests in batches])
        try:
            for _ in batches:
                yield self._answer(job.answers, renew=True)
        finally:
            # Batches that are being sampled are finished, and thrown away.
            job.is_over = True

    def _answer(self, answers: SimpleQueue[T | RolloutError], *, renew: bool = False) -> T:
        """Wait for what the supervisor answers. Meanwhile faults are reported and, with `renew`, workers get weights again that they did not receive."""
        while True:
            self._report_faults()
            if renew:
                self._supervisor.renew()
            error = self._supervisor.error
            try:
                answer = answers.get(timeout=0.2)
            except Empty:
                if error is not None:
                    raise error from None
            else:
                self._report_faults()
                if isinstance(answer, RolloutError):
                    raise answer
                return answer

    def _report_faults(self) -> None:
        while not self._supervisor.faults.empty():
            self._on_fault(self._supervisor.faults.get())


def log_fault(fault: Fault) -> None:
    logging.getLogger("rollout").warning("%s%s", fault.message, f"\n{fault.stacks}" if fault.stacks else "")


def engine_batches(requests: Sequence[Request], largest: int) -> list[Sequence[Request]]:
    """Cut requests into the fewest batches of at most `largest`, of sizes that differ by one at most."""
    count = -(-len(requests) // largest)
    bounds = [len(requests) * i // count for i in range(count + 1)] if count else []
    return [requests[start:end] for start, end in pairwise(bounds)]


def sample_seed(run_seed: int, step: int, prompt_id: str, index: int) -> int:
    """The seed [0, 2**63) of one trajectory: a function of what it is, not of who draws it or when.

    Two trajectories of one run share a seed only by accident of hashing, and a trajectory keeps its seed whatever the
    number of workers, the order of the requests or a restart.
    """
    key = f"{run_seed}\x1f{step}\x1f{prompt_id}\x1f{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
