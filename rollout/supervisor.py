"""What keeps a fleet's workers at work and alive."""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from rollout import processes
from rollout.health import Fault, State
from rollout.sync.broadcast import Broadcast
from rollout.types import FleetOptions, NotReceivedError, RolloutError
from rollout.worker_handle import Batch, Doing, Job, Member, Task, Update

Call = Callable[[], None]

GRACE_S = 5.0
MOST_LOSSES = 4
"""An engine batch with which so many workers were lost is taken for the cause of it."""


class Supervisor:
    """Hands out batches and updates, watches the workers' signs of life, and replaces those that are lost.

    All of it happens in one thread, which alone touches the workers: others send it calls. What nobody can help ends up
    in `error`; what happened to workers in `faults`.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        options: FleetOptions,
        stop_token_ids: Sequence[int],
        trust_remote_code: bool,
        bundles: Any,
    ):
        self.error: RolloutError | None = None
        self.faults: SimpleQueue[Fault] = SimpleQueue()
        self._options = options
        self._mailbox: SimpleQueue[Call] = SimpleQueue()
        self.members = [
            Member(number, model, dtype, options, stop_token_ids, trust_remote_code, bundles, self._mailbox.put)
            for number in range(options.workers)
        ]
        self._jobs: list[Job] = []
        self._updates: list[Update] = []
        self._replaced: list[Update] = []
        self._awaiting_start: list[SimpleQueue[RolloutError | None]] = []
        self._spent: Update | None = None
        self._asleep = False
        self._to_be_started: list[Member] = []
        self._awaiting_turn: list[SimpleQueue[RolloutError | None]] = []
        self._closed = False
        self._pace_s = min(0.5, options.probe_interval_s / 2, options.probe_timeout_s / 2)
        for member in self.members:
            self._start(member)
        self._thread = threading.Thread(target=self._run, name="rollout supervisor", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._mailbox.put(partial(self._jobs.append, job))

    def abandon(self, job: Job) -> None:
        """Nobody waits for the job any more. Batches that are being sampled are finished, and thrown away."""
        self._mailbox.put(partial(self._forget, job))

    def tell_when_started(self, answers: SimpleQueue[RolloutError | None]) -> None:
        """Answer when no worker is being started."""
        self._mailbox.put(partial(self._awaiting_start.append, answers))

    def turn(self, asleep: bool, answers: SimpleQueue[RolloutError | None]) -> None:
        """Let the workers sleep, or wake them; answer when they all do. What is lost of them meanwhile is started when they wake."""
        self._mailbox.put(partial(self._turn, asleep, answers))

    def drop_updates(self, modules: Sequence[str] | None) -> None:
        """Let go of the weights that an update of these modules will replace."""

        def drop() -> None:
            kept = [u for u in self._updates if modules and not set(u.modules or [""]) <= set(modules)]
            self._replaced += [u for u in self._updates if u not in kept]
            self._updates[:] = kept
            if self._spent not in kept:
                self._spent = None

        self._mailbox.put(drop)

    def update(self, update: Update) -> None:
        """Give the weights to every worker, and to each that is started from now on."""
        self._mailbox.put(partial(self._begin, update))

    def renew(self) -> None:
        """Called where weights can be got: fetch those once more that a worker has to take and did not receive with the others."""
        if (update := self._spent) is not None and isinstance(update.source, Broadcast):
            self._spent = None
            update.source = update.source.again()

    def close(self) -> None:
        """End the workers' processes."""
        self._closed = True
        self._thread.join()
        for member in self.members:
            if member.state is not State.DEAD:
                # Ray reports a worker that was killed before it could end as a crash.
                member.end(GRACE_S)
        self.members = []
        for update in self._updates + self._replaced:
            update.source.release()

    def _run(self) -> None:
        import ray

        try:
            while not self._closed and self.error is None:
                if not ray.is_initialized():
                    raise RolloutError("Ray was shut down under the rollout workers")
                self._read_mail()
                self._tick(time.monotonic())
        except RolloutError as error:
            self.error = error
        except Exception as error:
            self.error = RolloutError(f"the rollout workers cannot be supervised ({type(error).__name__}: {error})")
            self.error.__cause__ = error

    def _read_mail(self) -> None:
        try:
            self._mailbox.get(timeout=self._pace_s)()
            while True:
                self._mailbox.get_nowait()()
        except Empty:
            pass

    def _tick(self, now: float) -> None:
        for member in self.members:
            if member.state is not State.DEAD:
                self._examine(member, now)
            if member.state is not State.DEAD:
                self._employ(member, now)
        starting = [m for m in self.members if m.state is State.RESTARTING and m not in self._to_be_started]
        if not starting:
            while self._awaiting_start:
                self._awaiting_start.pop().put(None)
        if all((m.state is State.ASLEEP) == self._asleep for m in self._up) and not (self._asleep and starting):
            while self._awaiting_turn:
                self._awaiting_turn.pop().put(None)
        # A worker that is being restarted may still be reading one.
        read = [member.task.subject for member in self.members if member.task]
        for update in [u for u in self._replaced if u not in read]:
            update.source.release()
            self._replaced.remove(update)
        for update in self._updates:
            if not update.told and self._is_everywhere(update):
                update.told = True
                update.answers.put(None)

    def _is_everywhere(self, update: Update) -> bool:
        """Whether the workers have it, apart from those that are being restarted: these take it before they serve."""
        return bool(self._up) and all(m.serial >= update.serial for m in self._up)

    def _begin(self, update: Update) -> None:
        self._updates.append(update)
        if isinstance(update.source, Broadcast):
            update.gather([member.actor for member in self._up], self._options.tensor_parallel)

    @property
    def _up(self) -> list[Member]:
        return [m for m in self.members if m.state not in (State.RESTARTING, State.DEAD)]

    def _turn(self, asleep: bool, answers: SimpleQueue[RolloutError | None]) -> None:
        self._asleep = asleep
        self._awaiting_turn.append(answers)
        while self._to_be_started and not asleep:
            self._start(self._to_be_started.pop())

    def _start(self, member: Member) -> None:
        if self._asleep:
            member.state = State.RESTARTING
            self._to_be_started.append(member)
            return
        member.start(time.monotonic(), partial(self._finished, member), partial(self._ended, member))

    def _examine(self, member: Member, now: float) -> None:
        member.take_pulse(now)
        if slow := member.too_slow(now):
            error = RolloutError(f"rollout worker {member.number} {slow}")
            error.stacks = self._stacks()
            raise error
        if why := member.hung(now):
            self._lose(member, why, processes.stacks(member.process) if member.process else "")
        elif member.state is State.HEALTHY and member.missed_probes(now):
            member.state = State.SUSPECT
            self._report(member, "left a probe unanswered")
        elif member.state is State.SUSPECT and not member.missed_probes(now):
            member.state = State.HEALTHY
            self._report(member, "answers again")

    def _employ(self, member: Member, now: float) -> None:
        """Give a worker that is idle the next thing to do: first of all the weights that it lacks."""
        if member.task is not None or member in self._to_be_started:
            return
        if self._asleep or member.state is State.ASLEEP:
            if self._asleep != (member.state is State.ASLEEP):
                (member.sleep if self._asleep else member.wake)(now)
            return
        lacking = next((u for u in self._updates if u.serial > member.serial), None)
        if lacking is None:
            if member.state is State.STALE:
                self._serve(member)
            job = next((job for job in self._jobs if job.todo), None)
            if job is not None and member.state is State.HEALTHY:
                member.sample(job.todo.popleft(), now)
            elif now - member.since > self._options.probe_interval_s:
                member.probe(now)
        elif lacking.refused is None:
            source = lacking.source_for(member.actor)
            if source is None:
                self._spent = lacking
            else:
                member.load(lacking, source, now)
        else:
            for job in list(self._jobs):
                self._fail(job, lacking.refused)

    def _serve(self, member: Member) -> None:
        member.state = State.HEALTHY
        if member.restarts and member.is_new:
            version = self._updates[-1].version if self._updates else 0
            self._report(member, f"serves again, with the weights of version {version}")
        member.is_new = False

    def _finished(self, member: Member, task: Task, future: Any) -> None:
        import ray

        if member.task is not task:
            return
        member.task, member.since = None, time.monotonic()
        error = future.exception()
        if error is None:
            self._succeeded(member, task, future.result())
        elif not isinstance(error, ray.exceptions.RayTaskError):
            self._lose(member, f"died {task.doing}", task=task)
        elif isinstance(error.cause, RolloutError):
            self._refused(member, task, error.cause)
        elif task.doing is Doing.STARTING and not member.restarts:
            raise RolloutError(f"a rollout worker failed {task.doing}:\n{error}")
        else:
            self._lose(member, f"failed {task.doing}:\n{error}", task=task)

    def _succeeded(self, member: Member, task: Task, result: Any) -> None:
        if isinstance(task.subject, Update):
            member.serial = task.subject.serial
        elif task.doing is Doing.STARTING:
            member.state = State.STALE
        elif task.doing is Doing.FALLING_ASLEEP:
            member.state = State.ASLEEP
        elif task.doing is Doing.WAKING:
            member.state = State.STALE
        elif task.doing is Doing.PROBING:
            member.restarts = 0
        elif isinstance(task.subject, Batch):
            member.restarts = 0
            job = task.subject.job
            if any(run.version != job.version for drawn in result for run in drawn.weight_versions):
                error = f"a rollout worker sampled with other weights than those of version {job.version}"
                self._fail(job, RolloutError(error))
            else:
                job.answers.put(result)

    def _refused(self, member: Member, task: Task, error: RolloutError) -> None:
        """What was asked for cannot be done, by any worker; but for weights that one did not receive."""
        if isinstance(task.subject, Update) and isinstance(error, NotReceivedError):
            self._report(member, f"takes the weights of version {task.subject.version} by another way: {error}")
        elif isinstance(task.subject, Update):
            task.subject.refused = error
            task.subject.answers.put(error)
        elif isinstance(task.subject, Batch):
            self._fail(task.subject.job, error)
        else:
            raise error

    def _ended(self, member: Member, actor: Any, future: Any) -> None:
        is_known = member.state is State.DEAD or member in self._to_be_started
        if member.actor is actor and not is_known:
            self._lose(member, f"died {member.task.doing}" if member.task else "died idle")

    def _lose(self, member: Member, why: str, stacks: str = "", task: Task | None = None) -> None:
        """A worker is lost: end what is left of it, let its batch be sampled again, and start another in its place."""
        task = task or member.task
        member.end()
        batch = task.subject if task and isinstance(task.subject, Batch) else None
        if member.restarts < self._options.max_restarts:
            member.restarts += 1
            self._start(member)
            then = f"restart {member.restarts} of {self._options.max_restarts}"
        else:
            member.state = State.DEAD
            then = f"not restarted again (rollout.max_restarts = {self._options.max_restarts})"
        again = "; its engine batch is sampled again" if batch else ""
        self._report(member, f"{why}; {then}{again}", stacks)
        if all(m.state is State.DEAD for m in self.members):
            raise RolloutError(
                f"all rollout workers are dead and their restarts are spent; the last: worker {member.number} {why}"
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
            self._fail(batch.job, RolloutError(error))
        else:
            batch.job.todo.appendleft(batch)

    def _fail(self, job: Job, error: RolloutError) -> None:
        self._forget(job)
        job.answers.put(error)

    def _forget(self, job: Job) -> None:
        job.todo.clear()
        if job in self._jobs:
            self._jobs.remove(job)

    def _report(self, member: Member, what: str, stacks: str = "") -> None:
        self.faults.put(Fault(member.number, member.state, f"rollout worker {member.number} {what}", stacks))

    def _stacks(self) -> str:
        known = [(m.number, m.process) for m in self.members if m.process]
        return "\n".join(f"rollout worker {number}: {processes.stacks(process)}" for number, process in known)
