"""A rollout worker as its supervisor sees it: the Ray actor, what it is doing, and its signs of life."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

from rollout import processes
from rollout.processes import Actor, Pending, ProcessId
from rollout.types import FleetOptions
from rollout.worker import CONCURRENCY_GROUPS, RolloutWorker, environment

TRANSFER_S = 600.0
"""How long new weights, or moving them off a GPU and back, may take where `batch_timeout_s` does not say."""
PROBES = 3
"""A worker that leaves so many probes in a row unanswered is taken for hung."""


class State(StrEnum):
    """What a worker is fit for. Only a healthy one is given engine batches."""

    RESTARTING = "restarting"  # its engine is being loaded, or will be
    STALE = "stale"  # its weights are not the fleet's, or not yet
    HEALTHY = "healthy"
    OFFLOADED = "offloaded"  # what it held on its GPU is in the CPU's memory
    SUSPECT = "suspect"  # it has missed a probe
    DEAD = "dead"  # and not restarted any more
    ASLEEP = "offloaded"  # the former name


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happened to a worker: a sentence, its state now, and what its threads did when it hung."""

    worker: int
    state: State
    message: str
    stacks: str = ""


class Doing(StrEnum):
    """What a worker can be busy with, in words for messages."""

    STARTING = "loading the policy"
    LOADING = "taking new weights"
    PROBING = "generating a token"
    SAMPLING = "sampling"
    OFFLOADING = "offloading its GPU"
    ONLOADING = "onloading its GPU"


@dataclass(eq=False, slots=True)
class Task:
    """What a worker is doing, since when, and with which batch or update."""

    doing: Doing
    since: float
    subject: Any = None


class Overdue(NamedTuple):
    """A task that takes longer than the options allow; `is_stuck` where a new process may do better."""

    why: str
    is_stuck: bool


class WorkerHandle:
    """Starts a worker's actor, gives it tasks and watches it. One thread alone may use it: that of the supervisor.

    `serial` is that of the last update that its weights have; `restarts` counts those in a row, with nothing drawn in between; `actor` is None where
    a lost one has not been replaced; `process` is known once it has answered a first probe. Times are seconds of the monotonic clock.
    """

    def __init__(
        self,
        number: int,
        options: FleetOptions,
        new_actor: Callable[[int], Actor[RolloutWorker]],
        clock: Callable[[], float],
        post: Callable[[Callable[[], None]], None],
    ):
        """`post` brings a call to the supervisor's thread."""
        self.number = number
        self.state = State.RESTARTING
        self.restarts = self.serial = 0
        self.task: Task | None = None
        self.actor: Actor[RolloutWorker] | None = None
        self.process: ProcessId | None = None
        self._options, self._new_actor, self._clock, self._post = options, new_actor, clock, post

    def start(self, ended: Callable[["WorkerHandle"], None]) -> Actor[RolloutWorker]:
        """Start a new actor, which has no engine yet; `ended` is called when its process has died."""
        self.state, self.serial, self.is_new = State.RESTARTING, 0, True
        self._probe_sent: float | None = None
        self._steps = -1
        self.actor = actor = self._new_actor(self.number)
        watch = actor.options(concurrency_group="watch").call(RolloutWorker.watch)
        self._then(watch, lambda _: ended(self) if self.actor is actor else None)
        return actor

    def do(
        self,
        doing: Doing,
        pending: Pending[Any],
        finished: Callable[["WorkerHandle", Task, Any], None],
        subject: Any = None,
    ) -> None:
        """The actor has begun a task; `finished` is called with the task and the future of its result."""
        self.task = task = Task(doing, self._clock(), subject)
        self.idle_since = self._progress_at = self._probe_due = task.since

        def end_task(future: Any) -> None:
            if self.task is task:
                self.task, self.idle_since = None, self._clock()
                finished(self, task, future)

        self._then(pending, end_task)

    def probe(self, now: float) -> None:
        """Ask for the number of its engine's steps, if that is due, while the worker does something or is not yet known.

        A second thread of the process answers: not where the process is stopped, or hangs while it holds Python's lock; and with the same number for ever
        where the engine hangs.
        """
        actor = self.actor
        is_of_interest = self.task is not None or self.process is None
        if actor is None or not is_of_interest or self._probe_sent is not None or now < self._probe_due:
            return
        self._probe_sent = now

        def answered(future: Any) -> None:
            if self.actor is actor and future.exception() is None:
                self.process, steps = future.result()
                self._probe_sent, self._probe_due = None, self._clock() + self._options.probe_interval_s
                if steps != self._steps:
                    self._steps, self._progress_at = steps, self._clock()

        self._then(actor.options(concurrency_group="pulse").call(RolloutWorker.pulse), answered)

    def missed_probes(self, now: float) -> int:
        """How many probes in a row it has missed."""
        unanswered = [self._probe_sent] if self.process and self._probe_sent is not None else []
        if self.task and self.task.doing is Doing.PROBING:
            unanswered.append(self.task.since)
        return max((int((now - since) / self._options.probe_timeout_s) for since in unanswered), default=0)

    def overdue(self, now: float) -> Overdue | None:
        """Why the worker cannot be waited for any longer, if it cannot."""
        if self.task is None:
            return None
        options, doing = self._options, self.task.doing
        if doing is not Doing.PROBING:
            starting = doing is Doing.STARTING
            key = "start_timeout_s" if starting else "batch_timeout_s"
            limit = options.start_timeout_s if starting else options.batch_timeout_s
            if limit is None and doing not in (Doing.STARTING, Doing.SAMPLING):  # no engine makes steps meanwhile
                limit = TRANSFER_S
            if limit is not None and now - self.task.since > limit:
                cure = "; raise it, or lower rollout.batch_sequences" if doing is Doing.SAMPLING else ""
                if starting and self.process is None:
                    cure = "; Ray has not placed it: no node has free what rollout.tensor_parallel, rollout.gpus and rollout.resources ask for"
                # An engine that samples goes on; and of a first start nobody knows whether it would ever succeed.
                is_stuck = self.restarts > 0 if starting else doing is not Doing.SAMPLING
                return Overdue(f"was not done {doing} within rollout.{key} = {limit:g} s{cure}", is_stuck)
        if self.missed_probes(now) >= PROBES:
            return Overdue(f"left {PROBES} probes of {options.probe_timeout_s:g} s unanswered", is_stuck=True)
        if doing is Doing.SAMPLING and now - self._progress_at > options.stall_timeout_s:
            return Overdue(
                f"made no engine step for rollout.stall_timeout_s = {options.stall_timeout_s:g} s", is_stuck=True
            )
        return None

    def end(self, grace_s: float = 0) -> None:
        """End its process, for certain; one that ends by itself has `grace_s` for it."""
        actor, process = self.actor, self.process
        self.task = self.actor = self.process = None
        if actor:
            actor.kill()
        # Ray asks first; a process that is stopped or hung would stay for seconds, with the memory it has.
        if process:
            processes.kill(process, grace_s)

    def _then(self, pending: Pending[Any], call: Callable[[Any], None]) -> None:
        pending.future().add_done_callback(lambda future: self._post(partial(call, future)))


def new_actor(options: FleetOptions, placement_group: Any, number: int) -> Actor[RolloutWorker]:
    """Start the actor of a worker, in the bundle of its number where there is a placement group. Ray does not restart it: it would lack its weights."""
    import ray

    gpus = options.tensor_parallel * options.gpus if processes.on_gpus() else 0
    actor_class = ray.remote(
        num_cpus=0,
        num_gpus=gpus,
        resources=options.resources,
        runtime_env={"env_vars": environment(options.threads, on_gpu=gpus > 0) | processes.visibility(gpus)},
        max_restarts=0,
        concurrency_groups=CONCURRENCY_GROUPS,
        **processes.in_placement_group(placement_group, number),
    )(RolloutWorker)
    return Actor(actor_class.remote())
