"""One place in a fleet: the actor that fills it now, and what that is doing."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from rollout import processes
from rollout.engine import Request
from rollout.health import PROBES, State, Vitals
from rollout.sync.base import AdapterFiles, WeightSource
from rollout.sync.broadcast import Broadcast, Receiver
from rollout.types import EngineOptions, FleetOptions, RolloutError, SamplingOptions, Trajectory
from rollout.worker import CONCURRENCY_GROUPS, RolloutWorker, environment


@dataclass(eq=False, slots=True)
class Job:
    """Engine batches to be sampled with the weights of `version`; trajectories, or the error that ends it, go to `answers`."""

    sampling: SamplingOptions
    version: int
    todo: deque["Batch"] = field(default_factory=deque)
    answers: SimpleQueue[list[Trajectory] | RolloutError] = field(default_factory=SimpleQueue)


@dataclass(eq=False, slots=True)
class Batch:
    """Requests that are sampled together; `lost` counts the workers that were lost with it."""

    job: Job
    requests: Sequence[Request]
    lost: int = 0


@dataclass(eq=False, slots=True)
class Update:
    """New weights, for every module or those named. The serial number orders updates.

    Where they are broadcast, `receivers` has the actors that are to receive them and have not begun to, and `size` is told how many
    processes take part.
    """

    serial: int
    version: int
    source: WeightSource | AdapterFiles | Broadcast
    modules: Sequence[str] | None
    refused: RolloutError | None = None
    told: bool = False
    answers: SimpleQueue[RolloutError | None] = field(default_factory=SimpleQueue)
    receivers: dict[Any, Receiver] = field(default_factory=dict)
    size: SimpleQueue[int | RolloutError] = field(default_factory=SimpleQueue)

    def gather(self, actors: Sequence[Any], processes: int) -> None:
        """Let these actors, of so many processes each, take part in the broadcast."""
        assert isinstance(self.source, Broadcast)
        size = 1 + processes * len(actors)
        for place, actor in enumerate(actors):
            self.receivers[actor] = Receiver(self.source.meeting, size, 1 + processes * place)
        self.size.put(size)

    def source_for(self, actor: Any) -> WeightSource | AdapterFiles | Receiver | None:
        """Where that actor finds the weights; None where it does not any more."""
        return self.receivers.pop(actor, None) if isinstance(self.source, Broadcast) else self.source


class Doing(StrEnum):
    STARTING = "loading the policy"
    LOADING = "taking new weights"
    PROBING = "generating a token"
    SAMPLING = "sampling"
    FALLING_ASLEEP = "falling asleep"
    WAKING = "waking up"


BOUNDED = (Doing.LOADING, Doing.FALLING_ASLEEP, Doing.WAKING)


@dataclass(eq=False, slots=True)
class Task:
    """What a worker is at, since when."""

    doing: Doing
    since: float
    subject: Batch | Update | None = None


def actor_class(options: FleetOptions, where: Mapping[str, Any]) -> Any:
    """The Ray actor class of a rollout worker. A lost one is replaced by this package: Ray would start it without its weights."""
    import ray

    return ray.remote(
        num_cpus=0,
        num_gpus=options.tensor_parallel * options.gpus if torch.cuda.is_available() else 0,
        resources=options.resources,
        runtime_env={"env_vars": environment(options.threads)},
        max_restarts=0,
        concurrency_groups=CONCURRENCY_GROUPS,
        **where,
    )(RolloutWorker)


class Member:
    """What happens to the actor comes back through `post`, as calls to be made by whoever owns the member.

    `serial` is that of the last update that its weights have, `process` is known once it has answered a first probe.
    """

    def __init__(
        self,
        number: int,
        model: str,
        dtype: str,
        options: FleetOptions,
        stop_token_ids: Sequence[int],
        trust_remote_code: bool,
        bundles: Any,
        post: Callable[[Callable[[], None]], None],
    ):
        self.number = number
        self.state = State.RESTARTING
        self.restarts = 0
        self.task: Task | None = None
        self._options = options
        self._where = processes.in_bundle(bundles, number)
        engine = EngineOptions.model_validate(options.model_dump(include=set(EngineOptions.model_fields)))
        self._start_arguments = (model, dtype, engine, options.threads, list(stop_token_ids), trust_remote_code)
        self._post = post

    def start(self, now: float, finished: Callable[[Task, Any], None], ended: Callable[[Any, Any], None]) -> None:
        """Start an actor and let it load the policy.

        `finished` is called with each task that is done and its future, `ended` with the actor, and a future, when its process has died.
        """
        self.state, self.serial, self.since = State.RESTARTING, 0, now
        self.is_new = True
        self.process: processes.ProcessId | None = None
        self.vitals = Vitals(self._options)
        self._finished = finished
        self.actor = actor_class(self._options, self._where).remote()
        watch = self.actor.watch.options(concurrency_group="watch").remote()
        self._then(watch, partial(ended, self.actor))
        self._do(Doing.STARTING, self.actor.start.remote(*self._start_arguments), now)

    def sample(self, batch: Batch, now: float) -> None:
        self._do(Doing.SAMPLING, self.actor.sample.remote(batch.requests, batch.job.sampling), now, batch)

    def load(self, update: Update, source: WeightSource | AdapterFiles | Receiver, now: float) -> None:
        self.state = State.STALE
        self._do(Doing.LOADING, self.actor.load.remote(source, update.version, update.modules), now, update)

    def sleep(self, now: float) -> None:
        self._do(Doing.FALLING_ASLEEP, self.actor.sleep.remote(), now)

    def wake(self, now: float) -> None:
        self._do(Doing.WAKING, self.actor.wake.remote(), now)

    def probe(self, now: float) -> None:
        self._do(Doing.PROBING, self.actor.probe.remote(), now)

    def take_pulse(self, now: float) -> None:
        """While it is at something, ask how far it is, if that is due."""
        if self.task is not None and self.vitals.wants_probe(now):
            self.vitals.asked(now)
            pulse = self.actor.pulse.options(concurrency_group="pulse").remote()
            self._then(pulse, partial(self._felt, self.vitals))

    def missed_probes(self, now: float) -> int:
        """How many probes in a row it has left unanswered."""
        missed = self.vitals.missed(now) if self.process else 0
        if self.task and self.task.doing is Doing.PROBING:
            missed = max(missed, int((now - self.task.since) / self._options.probe_timeout_s))
        return missed

    def hung(self, now: float) -> str | None:
        """Why it is taken for hung, if it is."""
        options = self._options
        if self.task is None:
            return None
        if self.missed_probes(now) >= PROBES:
            return f"left {PROBES} probes of {options.probe_timeout_s:g} s unanswered"
        if self.task.doing is Doing.SAMPLING and self.vitals.without_progress(now) > options.stall_timeout_s:
            return f"made no engine step for rollout.stall_timeout_s = {options.stall_timeout_s:g} s"
        if self.task.doing in BOUNDED and now - self.task.since > options.batch_timeout_s:
            return f"was not done {self.task.doing} within rollout.batch_timeout_s = {options.batch_timeout_s:g} s"
        if self._starts_too_slowly(now) and self.restarts:
            return f"was not done loading the policy within rollout.start_timeout_s = {options.start_timeout_s:g} s"
        return None

    def too_slow(self, now: float) -> str | None:
        """What takes longer than the options allow although it goes on, if something does."""
        options = self._options
        if self.task is None:
            return None
        if self.task.doing is Doing.SAMPLING and now - self.task.since > options.batch_timeout_s:
            return (
                f"did not finish an engine batch within rollout.batch_timeout_s = {options.batch_timeout_s:g} s; "
                "raise it, or lower rollout.batch_sequences"
            )
        if self._starts_too_slowly(now) and not self.restarts:
            return f"was not done loading the policy within rollout.start_timeout_s = {options.start_timeout_s:g} s"
        return None

    def _starts_too_slowly(self, now: float) -> bool:
        """Nobody knows of a first start whether it would ever succeed; after that it is known to be possible."""
        if self.task is None or self.task.doing is not Doing.STARTING:
            return False
        return now - self.task.since > self._options.start_timeout_s

    def end(self, grace_s: float = 0) -> None:
        """End its process, for certain."""
        import ray

        self.task = None
        ray.kill(self.actor)
        # Ray asks first; a process that is stopped or hung would stay for seconds, with the memory it has.
        if self.process:
            processes.kill(self.process, grace_s)

    def _do(self, doing: Doing, reference: Any, now: float, subject: Batch | Update | None = None) -> None:
        self.task = task = Task(doing, now, subject)
        self.vitals.begin(now)
        self._then(reference, partial(self._finished, task))

    def _felt(self, vitals: Vitals, future: Any) -> None:
        if vitals is self.vitals and future.exception() is None:
            self.process, count = future.result()
            vitals.answered(time.monotonic(), count)

    def _then(self, reference: Any, call: Callable[[Any], None]) -> None:
        reference.future().add_done_callback(lambda future: self._post(partial(call, future)))
