"""Keeps a fleet's workers in the state that is wanted of them, at work and alive."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from rollout import processes
from rollout.engine import Request
from rollout.processes import Actor
from rollout.sync.base import WeightSource
from rollout.types import FleetOptions, NotReceivedError, RolloutError, SamplingOptions
from rollout.worker import RolloutWorker, WorkerSetup
from rollout.worker_handle import Doing, Fault, State, Task, WorkerHandle

Call = Callable[[], None]
Answers = SimpleQueue[RolloutError | None]

GRACE_S = 5.0
MOST_LOSSES = 4
"""An engine batch with which so many workers were lost is taken for the cause of it."""


@dataclass(eq=False, slots=True)
class Job:
    """A call that wants trajectories, drawn by `draw` with the weights of `version`. They, or the error that ends it, go to `answers`."""

    sampling: SamplingOptions
    version: int
    draw: Callable[..., Any] = RolloutWorker.sample
    answers: SimpleQueue[list[Any] | RolloutError] = field(default_factory=SimpleQueue)
    is_over: bool = False

    def fail(self, error: RolloutError) -> None:
        """End it: its other batches are not sampled any more."""
        self.is_over = True
        self.answers.put(error)


@dataclass(eq=False, slots=True)
class Batch:
    """Requests of a job that are sampled together; `lost` counts the workers that were lost with it."""

    job: Job
    requests: Sequence[Request]
    lost: int = 0


@dataclass(eq=False, slots=True)
class Update:
    """New weights, for every module or those named. The serial number orders updates.

    `parts` has what each worker that serves is to load, by its actor, until it begins to; `late` is for all others, None where they are no longer
    to be had. `receiving` is told how many processes load their part. `replaced` are the updates that nobody needs once it is everywhere.
    """

    serial: int
    version: int
    source: WeightSource
    modules: Sequence[str] | None
    refused: RolloutError | None = None
    parts: dict[Any, WeightSource] = field(default_factory=dict)
    late: WeightSource | None = None
    receiving: SimpleQueue[int | RolloutError] = field(default_factory=SimpleQueue)
    replaced: list["Update"] = field(default_factory=list)

    def release(self) -> None:
        """Free what is kept for workers."""
        (self.late or self.source).release()


class Supervisor:
    """Hands out batches and updates, watches the workers' signs of life, and replaces those that are lost.

    What is wanted of a worker is that it has all updates, is offloaded or not, and samples while there are batches: `reconcile` compares that with what it
    is, and starts the one thing that comes next. All of it happens in one thread, which alone touches the workers: others send it calls. What nobody can help
    ends up in `error`; what happened to workers in `faults`.
    """

    def __init__(
        self,
        options: FleetOptions,
        setup: WorkerSetup,
        new_actor: Callable[[int], Actor[RolloutWorker]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.error: RolloutError | None = None
        self.faults: SimpleQueue[Fault] = SimpleQueue()
        self._options, self._setup, self._clock = options, setup, clock
        self._mailbox: SimpleQueue[Call] = SimpleQueue()
        self._pace_s = min(0.5, options.probe_interval_s / 2, options.probe_timeout_s / 2)
        self._todo: deque[Batch] = deque()
        self._updates: list[Update] = []
        self._spent: Update | None = None
        self._offloaded = False
        self._waiting: list[tuple[Callable[[], bool], Answers]] = []
        self._closed = False
        self.workers = [
            WorkerHandle(number, options, new_actor, clock, self._mailbox.put) for number in range(options.workers)
        ]
        self._thread = threading.Thread(target=self._run, name="rollout supervisor", daemon=True)

    def start(self) -> None:
        """Start the workers, and the thread that looks after them."""
        for worker in self.workers:
            self._start(worker)
        self._thread.start()

    def submit(self, batches: Sequence[Batch]) -> None:
        """Let workers sample batches, in this order, as long as their jobs are not over."""
        self._mailbox.put(partial(self._todo.extend, batches))

    def update(self, update: Update) -> Answers:
        """Give the weights to every worker, and to each that is started from now on; answers when all that serve have them."""
        self._mailbox.put(partial(self._begin, update))
        return self._when(partial(self._is_everywhere, update))

    def when_started(self) -> Answers:
        """Answers when no worker is being started."""
        return self._when(lambda: not self._starting)

    def set_offloaded(self, offloaded: bool) -> Answers:
        """Let the workers offload their GPUs, or onload them; answers when all have. What is lost of them meanwhile is started when they onload."""
        self._mailbox.put(lambda: setattr(self, "_offloaded", offloaded))
        return self._when(
            lambda: (
                all((w.state is State.OFFLOADED) == offloaded for w in self._up) and not (offloaded and self._starting)
            )
        )

    def renew(self) -> None:
        """Called where the learner can be used: get those weights again that a worker needs and did not receive with the others."""
        if (update := self._spent) is not None:
            if update.late is None:
                update.late = update.source.again()
            self._spent = None

    def close(self) -> None:
        """End the workers' processes."""
        self._closed = True
        self._thread.join()
        for worker in self.workers:
            # Ray reports a worker that was killed before it could end as a crash.
            worker.end(GRACE_S)
        self.workers = []
        for update in self._updates:
            update.release()

    def _run(self) -> None:
        import ray

        try:
            while not self._closed and self.error is None:
                if not ray.is_initialized():
                    raise RolloutError("Ray was shut down under the rollout workers")
                self.tick(self._pace_s)
        except RolloutError as error:
            self.error = error
        except Exception as error:
            self.error = RolloutError(f"the rollout workers cannot be supervised ({type(error).__name__}: {error})")
            self.error.__cause__ = error

    def tick(self, timeout_s: float) -> None:
        """Make the calls that were sent, waiting for the first of them, examine the workers and give them something to do."""
        try:
            self._mailbox.get(timeout=timeout_s)()
            while True:
                self._mailbox.get_nowait()()
        except Empty:
            pass
        now = self._clock()
        for worker in self.workers:
            self._examine(worker, now)
            self.reconcile(worker, now)
        for waiting in list(self._waiting):
            is_met, answers = waiting
            try:
                if is_met():
                    answers.put(None)
                    self._waiting.remove(waiting)
            except RolloutError as error:
                answers.put(error)
                self._waiting.remove(waiting)

    def reconcile(self, worker: WorkerHandle, now: float) -> None:
        """Start what comes next for a worker that is idle: first of all the weights that it lacks."""
        actor, is_offloaded = worker.actor, worker.state is State.OFFLOADED
        is_as_wanted = worker.state is State.DEAD or (self._offloaded and (is_offloaded or actor is None))
        if worker.task is not None or is_as_wanted:
            return
        if actor is None:
            self._start(worker)
        elif self._offloaded:
            worker.do(Doing.OFFLOADING, actor.call(RolloutWorker.offload), self._finished)
        elif is_offloaded:
            worker.do(Doing.ONLOADING, actor.call(RolloutWorker.onload), self._finished)
        elif lacking := next((u for u in self._updates if u.serial > worker.serial), None):
            self._load(worker, actor, lacking)
        else:
            if worker.state is State.STALE:
                self._serve(worker)
            if worker.state is State.HEALTHY and (batch := self._next_batch()):
                drawn = actor.call(batch.job.draw, batch.requests, batch.job.sampling)
                worker.do(Doing.SAMPLING, drawn, self._finished, batch)
            elif now - worker.idle_since > self._options.probe_interval_s:
                worker.do(Doing.PROBING, actor.call(RolloutWorker.probe), self._finished)

    def _load(self, worker: WorkerHandle, actor: Actor[RolloutWorker], update: Update) -> None:
        if update.refused is not None:
            while batch := self._next_batch():
                batch.job.fail(update.refused)
        elif source := update.parts.pop(actor, update.late):
            worker.state = State.STALE
            loaded = actor.call(RolloutWorker.load, source, update.version, update.modules)
            worker.do(Doing.LOADING, loaded, self._finished, update)
        else:
            self._spent = update

    def _next_batch(self) -> Batch | None:
        while self._todo:
            if not (batch := self._todo.popleft()).job.is_over:
                return batch
        return None

    def _serve(self, worker: WorkerHandle) -> None:
        worker.state = State.HEALTHY
        if worker.restarts and worker.is_new:
            version = self._updates[-1].version if self._updates else 0
            self._report(worker, f"serves again, with the weights of version {version}")
        worker.is_new = False

    def _start(self, worker: WorkerHandle) -> None:
        actor = worker.start(self._ended)
        worker.do(Doing.STARTING, actor.call(RolloutWorker.start, self._setup), self._finished)

    def _begin(self, update: Update) -> None:
        """Take an update in the place of those whose modules it replaces."""
        kept = [u for u in self._updates if update.modules and not set(u.modules or [""]) <= set(update.modules)]
        update.replaced = [u for u in self._updates if u not in kept]
        self._updates, self._spent = [*kept, update], None
        actors, size = [worker.actor for worker in self._up], self._options.tensor_parallel
        update.parts = dict(zip(actors, update.source.for_workers(actors, size), strict=True))
        update.late = update.source if update.source.is_kept else None
        update.receiving.put(len(actors) * size)

    def _is_everywhere(self, update: Update) -> bool:
        """Whether the workers have it, apart from those that are being restarted: these take it before they serve."""
        if update.refused is not None:
            raise update.refused
        return bool(self._up) and all(worker.serial >= update.serial for worker in self._up)

    @property
    def _up(self) -> list[WorkerHandle]:
        return [w for w in self.workers if w.state not in (State.RESTARTING, State.DEAD)]

    @property
    def _starting(self) -> list[WorkerHandle]:
        return [w for w in self.workers if w.state is State.RESTARTING and w.actor is not None]

    def _when(self, is_met: Callable[[], bool]) -> Answers:
        answers: Answers = SimpleQueue()
        self._mailbox.put(partial(self._waiting.append, (is_met, answers)))
        return answers

    def _examine(self, worker: WorkerHandle, now: float) -> None:
        worker.probe(now)
        if overdue := worker.overdue(now):
            if not overdue.is_stuck:
                error = RolloutError(f"rollout worker {worker.number} {overdue.why}")
                error.stacks = self._stacks()
                raise error
            self._lose(worker, overdue.why, processes.stacks(worker.process) if worker.process else "")
        elif worker.state is State.HEALTHY and worker.missed_probes(now):
            worker.state = State.SUSPECT
            self._report(worker, "left a probe unanswered")
        elif worker.state is State.SUSPECT and not worker.missed_probes(now):
            worker.state = State.HEALTHY
            self._report(worker, "answers again")

    def _finished(self, worker: WorkerHandle, task: Task, future: Any) -> None:
        import ray

        error = future.exception()
        if error is None:
            self._succeeded(worker, task, future.result())
        elif not isinstance(error, ray.exceptions.RayTaskError):
            self._lose(worker, f"died {task.doing}", task=task)
        elif isinstance(error.cause, RolloutError):
            self._refused(worker, task, error.cause)
        elif task.doing is Doing.STARTING and not worker.restarts:
            raise RolloutError(f"a rollout worker failed {task.doing}:\n{error}")
        else:
            self._lose(worker, f"failed {task.doing}:\n{error}", task=task)

    def _succeeded(self, worker: WorkerHandle, task: Task, result: Any) -> None:
        if task.doing in (Doing.PROBING, Doing.SAMPLING):
            worker.restarts = 0
        elif task.doing is Doing.OFFLOADING:
            worker.state = State.OFFLOADED
        elif isinstance(task.subject, Update):
            worker.serial = task.subject.serial
        else:
            worker.state = State.STALE
        if isinstance(task.subject, Batch):
            job = task.subject.job
            if any(run.version != job.version for drawn in result for run in drawn.weight_versions):
                error = f"a rollout worker sampled with other weights than those of version {job.version}"
                job.fail(RolloutError(error))
            else:
                job.answers.put(result)

    def _refused(self, worker: WorkerHandle, task: Task, error: RolloutError) -> None:
        """What was asked for cannot be done, by any worker; but for weights that one did not receive."""
        if isinstance(task.subject, Update) and isinstance(error, NotReceivedError):
            self._report(worker, f"takes the weights of version {task.subject.version} by another way: {error}")
        elif isinstance(task.subject, Update):
            task.subject.refused = error
        elif isinstance(task.subject, Batch):
            task.subject.job.fail(error)
        else:
            raise error

    def _ended(self, worker: WorkerHandle) -> None:
        self._lose(worker, f"died {worker.task.doing}" if worker.task else "died idle")

    def _lose(self, worker: WorkerHandle, why: str, stacks: str = "", task: Task | None = None) -> None:
        """End what is left of a worker, let its batch be sampled again, and let another be started in its place while there are restarts left."""
        task = task or worker.task
        worker.end()
        batch = task.subject if task and isinstance(task.subject, Batch) else None
        if worker.restarts < self._options.max_restarts:
            worker.restarts += 1
            worker.state = State.RESTARTING
            then = f"restart {worker.restarts} of {self._options.max_restarts}"
        else:
            worker.state = State.DEAD
            then = f"not restarted again (rollout.max_restarts = {self._options.max_restarts})"
        again = "; its engine batch is sampled again" if batch else ""
        self._report(worker, f"{why}; {then}{again}", stacks)
        if all(w.state is State.DEAD for w in self.workers):
            raise RolloutError(
                f"all rollout workers are dead and their restarts are spent; the last: worker {worker.number} {why}"
            )
        if batch:
            self._sample_again(batch, why)

    def _sample_again(self, batch: Batch, why: str) -> None:
        batch.lost += 1
        if batch.lost >= MOST_LOSSES:
            ids = list(dict.fromkeys(request.prompt.id for request in batch.requests))
            shown = ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else "")
            error = (
                f"{batch.lost} rollout workers were lost with the same engine batch (prompts {shown}); the last {why}"
            )
            batch.job.fail(RolloutError(error))
        else:
            self._todo.appendleft(batch)

    def _report(self, worker: WorkerHandle, what: str, stacks: str = "") -> None:
        self.faults.put(Fault(worker.number, worker.state, f"rollout worker {worker.number} {what}", stacks))

    def _stacks(self) -> str:
        known = [(w.number, w.process) for w in self.workers if w.process]
        return "\n".join(f"rollout worker {number}: {processes.stacks(process)}" for number, process in known)
