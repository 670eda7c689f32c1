"""The pool: it hands the requests of a batch to workers, hears what they say, and replaces those that it loses."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from reward.isolation.killable.batch import Batch
from reward.isolation.killable.mother import Mother
from reward.isolation.killable.types import End, Limits, Outcome, WorkersUnavailable
from reward.isolation.killable.worker import Worker, readable

_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


class Killable:
    """A pool of killable workers for one job. Started by the first `run` (seconds: the job's imports).

    Safe to call from several threads, which take turns, and in a fork, which starts workers of its own.
    """

    def __init__(self, job: Path, *, workers: int | None = None, limits: Limits | None = None) -> None:
        self._job, self.limits = job, limits or Limits()
        self._size = workers or max(1, min(8, len(os.sched_getaffinity(0))))
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._serial = 0
        self._mother: Mother | None = None
        self._idle: list[Worker] = []
        self._busy: dict[int, Worker] = {}
        atexit.register(self.close)

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """One outcome for each request, in order; never raises for what a request does."""
        self._leave_to_the_parent()
        with self._lock:
            batch = Batch(requests, self.limits)
            try:
                while batch.open:
                    try:
                        self._step(batch)
                    except WorkersUnavailable as error:
                        self._stop()
                        batch.strike_all(str(error))
            finally:
                if self._busy:  # interrupted: what is under way belongs to no later batch
                    self._stop()
            return batch.outcomes()

    def processes(self) -> list[int]:
        """The process numbers of the mother and the workers, for tests and for the curious."""
        mother = [self._mother.pid] if self._mother else []
        return mother + [worker.pid for worker in (*self._idle, *self._busy.values())]

    def close(self) -> None:
        """Ends every worker. A later `run` starts new ones."""
        self._leave_to_the_parent()
        with self._lock:
            self._stop()

    def _leave_to_the_parent(self) -> None:
        if self._owner != os.getpid():
            self._owner, self._lock = os.getpid(), threading.Lock()
            self._mother, self._idle, self._busy = None, [], {}

    def _stop(self) -> None:
        for worker in (*self._idle, *self._busy.values()):
            worker.connection.close()
        self._idle.clear()
        self._busy.clear()
        if self._mother:
            self._mother.close()
            self._mother = None

    def _step(self, batch: Batch) -> None:
        while batch.waiting and len(self._busy) < self._size:
            self._assign(batch)
        if not self._busy:
            return
        soonest = min(worker.deadline for worker in self._busy.values())
        for descriptor in readable(list(self._busy), soonest - monotonic()):
            self._read(batch, self._busy[descriptor])
        now = monotonic()
        for worker in [worker for worker in self._busy.values() if worker.deadline <= now]:
            self._overdue(batch, worker, now)

    def _assign(self, batch: Batch) -> None:
        worker = self._fresh()
        row = batch.waiting.popleft()
        self._serial += 1
        worker.begin(row, self._serial)
        self._busy[worker.connection.fileno()] = worker
        try:
            worker.send(batch.texts[row])
        except OSError:
            self._lost(batch, worker)

    def _fresh(self) -> Worker:
        """An idle worker that still lives and is silent, or a new one."""
        if self._mother is None:
            self._mother = Mother(self._job, self.limits)
        while self._idle:
            worker = self._idle.pop()
            if not readable([worker.connection.fileno()], 0.0):
                return worker
            self._mother.reap(worker)
        return self._mother.fork()

    def _read(self, batch: Batch, worker: Worker) -> None:
        messages = worker.receive()
        if messages is None:
            self._lost(batch, worker)
            return
        for message in messages:
            if "phase" in message:
                worker.enter(message)
            elif isinstance(message.get("reply"), dict):
                batch.settle(worker, End.DONE, reply=message["reply"])
                self._rest(worker, message)
                return
            elif "memory" in message:
                batch.settle(worker, End.MEMORY, "needs more memory than allowed")
                self._discard(worker)
                return
            else:
                batch.strike(worker, f"the worker said {message.get('raised') or 'what is no reply'}")
                self._discard(worker)
                return

    def _overdue(self, batch: Batch, worker: Worker, now: float) -> None:
        match worker.time_up(now):
            case None:
                return
            case End.TIMEOUT, detail:
                batch.settle(worker, End.TIMEOUT, detail)
            case _, detail:
                batch.strike(worker, detail)
        self._discard(worker)

    def _lost(self, batch: Batch, worker: Worker) -> None:
        """It closed its socket, said too much or does not listen."""
        code = self._discard(worker)
        batch.strike(worker, f"the worker ended with code {code}", crashed=-code in _CRASHES)

    def _discard(self, worker: Worker) -> int:
        self._busy.pop(worker.connection.fileno(), None)
        assert self._mother is not None
        return self._mother.reap(worker)

    def _rest(self, worker: Worker, message: Mapping[str, Any]) -> None:
        if worker.finish(message):
            del self._busy[worker.connection.fileno()]
            self._idle.append(worker)
        else:
            self._discard(worker)
