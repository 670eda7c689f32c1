"""The rollout workers together: prompts in, groups of trajectories out as they finish."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from typing_extensions import deprecated

from rollout.engine import Request
from rollout.health import Fault, FaultHandler
from rollout.seeds import sample_seed
from rollout.supervisor import Supervisor
from rollout.sync.base import AdapterFiles, WeightSource
from rollout.sync.broadcast import Broadcast
from rollout.types import FleetOptions, Group, Prompt, RolloutError, SamplingOptions, Trajectory
from rollout.worker_handle import Batch, Job, Member, Update

T = TypeVar("T")


class Fleet:
    """Rollout workers as Ray actors, each with a copy of the policy.

    The sequences of a call are cut into engine batches before anything is known of the workers, and each batch is
    sampled as a whole by one of them. So what comes back is the same, to the last bit, for any number of workers and
    whichever served a batch, the one that took over from a lost worker included.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        options: FleetOptions,
        stop_token_ids: Sequence[int],
        on_fault: FaultHandler | None = None,
        bundles: Any = None,
        *,
        trust_remote_code: bool = False,
    ):
        """Start the workers and load `model` in each (Ray must be running), one in each of a placement group's `bundles` if given.

        `trust_remote_code` lets the model bring code of its own.

        What happens to workers is told to `on_fault`, or logged as a warning: during calls of the fleet, by the thread
        that makes them. `before_use` may be set to what has to happen before the workers sample or take weights.
        """
        self._options = options
        self._on_fault = on_fault or log_fault
        self._supervisor = Supervisor(model, dtype, options, stop_token_ids, trust_remote_code, bundles)
        self._serials = count(1)
        self._is_asleep = False
        self.before_use: Callable[[], None] = lambda: None
        self.weight_version = 0

    @property
    def members(self) -> Sequence[Member]:
        """The workers, to look at: their state, what they are doing, where they are."""
        return self._supervisor.members

    def wait_until_ready(self) -> None:
        """Return when the workers have loaded the policy. Raises RolloutError."""
        started: SimpleQueue[RolloutError | None] = SimpleQueue()
        self._supervisor.tell_when_started(started)
        self._answer(started)

    def sleep(self) -> None:
        """Let the workers put what they hold on their GPUs into the CPU's memory. Returns when they have. Raises RolloutError."""
        self._turn(asleep=True)

    def wake(self) -> None:
        """Let them take it back. Raises RolloutError."""
        self._turn(asleep=False)

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
        self.before_use()
        requests = [
            Request(prompt, index, sample_seed(seed, step, prompt.id, index))
            for prompt in prompts
            for index in range(group_size)
        ]
        waiting: dict[str, dict[int, Trajectory]] = {prompt.id: {} for prompt in prompts}
        if len(waiting) != len(prompts):
            raise RolloutError("two prompts of one call have the same id")
        by_id = {prompt.id: prompt for prompt in prompts}
        for trajectories in self._run(engine_batches(requests, self._options.batch_sequences), sampling):
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

    @deprecated("Fleet.generate is Fleet.sample now")
    def generate(self, *arguments: Any, **options: Any) -> Iterator[Group]:
        """`sample`, by its old name."""
        return self.sample(*arguments, **options)

    def load(
        self, source: WeightSource | AdapterFiles | Broadcast, version: int, modules: Sequence[str] | None = None
    ) -> None:
        """Give every worker the tensors of a checkpoint as its weights. Raises WeightUpdateError, RolloutError.

        Or an adapter, to be added to the weights that they began with, if `rollout.adapter_rank` allows for it.
        With `modules`, such as `model.layers.0.self_attn`, they are the tensors of these alone; all else stays as it is.
        The source is kept until the next update, for workers that are started in place of lost ones, and then released.
        """
        self.before_use()
        self._supervisor.drop_updates(modules)
        update = Update(next(self._serials), version, source, modules)
        self._supervisor.update(update)
        if isinstance(source, Broadcast) and (size := self._answer(update.size)) > 1:
            source.send(size)
        self._answer(update.answers, renew=True)
        self.weight_version = version

    def close(self) -> None:
        """End the workers' processes."""
        self._supervisor.close()
        self._tell_faults()

    def _turn(self, asleep: bool) -> None:
        if asleep != self._is_asleep:
            turned: SimpleQueue[RolloutError | None] = SimpleQueue()
            self._supervisor.turn(asleep, turned)
            self._answer(turned)
            self._is_asleep = asleep

    def _run(self, batches: Sequence[Sequence[Request]], sampling: SamplingOptions) -> Iterator[list[Trajectory]]:
        job = Job(sampling, self.weight_version)
        job.todo.extend(Batch(job, requests) for requests in batches)
        self._supervisor.submit(job)
        try:
            for _ in batches:
                yield self._answer(job.answers, renew=True)
        finally:
            self._supervisor.abandon(job)

    def _answer(self, answers: SimpleQueue[T | RolloutError], *, renew: bool = False) -> T:
        """What the supervisor answers; what happens to workers meanwhile is told, and with `renew` they get weights again."""
        while True:
            self._tell_faults()
            if renew:
                self._supervisor.renew()
            error = self._supervisor.error
            try:
                answer = answers.get(timeout=0.2)
            except Empty:
                if error is not None:
                    raise error from None
            else:
                self._tell_faults()
                if isinstance(answer, RolloutError):
                    raise answer
                return answer

    def _tell_faults(self) -> None:
        while not self._supervisor.faults.empty():
            self._on_fault(self._supervisor.faults.get())


def log_fault(fault: Fault) -> None:
    logging.getLogger("rollout").warning("%s%s", fault.message, f"\n{fault.stacks}" if fault.stacks else "")


def engine_batches(requests: Sequence[Request], largest: int) -> list[Sequence[Request]]:
    """Cut requests into the fewest batches of at most `largest`, of sizes that differ by one at most."""
    count = -(-len(requests) // largest)
    bounds = [len(requests) * i // count for i in range(count + 1)] if count else []
    return [requests[start:end] for start, end in pairwise(bounds)]
