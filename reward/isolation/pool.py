"""Workers: processes for a trusted job on whatever a model wrote, within hard limits, or killed and replaced at once.

    workers = WorkerPool(Path("job.py"))
    outcomes = workers.run([{"answer": "1/2"}, {"answer": "9^{9^{9}}"}])  # one Outcome each, in order

The limits are kept from outside, by SIGKILL and by the kernel, and so they hold inside C code too. What crosses the border
is JSON of bounded length; nothing is unpickled. `child.worker` is the other side, and says what a job is.

The limit on time is processor time, so that a busy machine takes no reward away from an honest answer. A request that uses
it up is the model's fault. A worker that ends otherwise, or is `stuck_s` without a processor, is ours: the request is tried
again in fresh workers until two of them end alike, by a crash (CRASH) or by a fault of ours (INFRA, never a wrong answer).
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from queue import LifoQueue
from time import monotonic
from typing import Any

from reward.isolation.child import plain
from reward.isolation.types import SandboxFailure
from reward.isolation.zygote import GRACE_SECONDS, Keeper, Zygote
from reward.types import Verdict

_ATTEMPTS = 2
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@dataclass(frozen=True)
class WorkerLimits:
    """What one request may cost.

    Each phase has `cpu_s` seconds of processor time, or what `phase_cpu_s` says, however busy the machine is; it is the
    worker that is at fault, and the wait ends, after `stuck_s` more in which it got none; a phase that may take longer
    than `cpu_s` may wait as much longer. `memory_bytes` is on top of what a warm worker holds. `start_s` is for the
    imports of the job.
    """

    cpu_s: float = 0.5
    phase_cpu_s: Mapping[str, float] = field(default_factory=dict)
    stuck_s: float = 10.0
    memory_bytes: int = 512 << 20
    request_bytes: int = 4 << 20
    reply_bytes: int = 64 << 10
    requests_per_worker: int = 2000
    start_s: float = 120.0


class End(StrEnum):
    """How a request ended. Only INFRA says nothing about what was asked."""

    DONE = "done"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASH = "crash"
    """It brought down two workers by the same kind of signal, such as a stack overflow."""
    INFRA = "infra"


FAULTS = {End.TIMEOUT: Verdict.TIMEOUT, End.MEMORY: Verdict.MEMORY, End.CRASH: Verdict.CRASH}
"""What a request that ended by its own fault makes of an answer."""


@dataclass(frozen=True)
class Outcome:
    """`reply` is what the job returned, empty unless DONE; `phase` the last one it entered; `seconds` wall time."""

    end: End
    reply: Mapping[str, Any] = field(default_factory=dict)
    phase: str = ""
    detail: str = ""
    seconds: float = 0.0


class WorkerPool:
    """Workers for one job. The first `run` starts them (seconds: the job's imports).

    Safe to call from several threads, and in a fork, which starts workers of its own.
    """

    def __init__(self, job: Path, *, workers: int | None = None, limits: WorkerLimits | None = None) -> None:
        self.limits = limits or WorkerLimits()
        self._size = workers or max(1, min(8, len(os.sched_getaffinity(0))))
        self._keeper = Keeper(lambda: Zygote("job", str(job), start_seconds=self.limits.start_s))
        self._owner = 0
        self._take_possession()
        atexit.register(self.close)

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """One outcome for each request, in order; never raises for what a request does."""
        self._take_possession()
        if not requests or (missing := self._missing()):
            return [Outcome(End.INFRA, detail=missing) for _ in requests]
        stopped = threading.Event()
        texts = [json.dumps(request).encode() for request in requests]
        with ThreadPoolExecutor(min(self._size, len(texts))) as threads:
            futures = [threads.submit(self._outcome, text, stopped) for text in texts]
            try:
                return [future.result() for future in futures]
            except BaseException:  # interrupted: what is under way belongs to no later batch
                stopped.set()
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in list(self._busy):
                    worker.kill()
                raise

    def close(self) -> None:
        """End every worker. A later `run` starts new ones."""
        self._take_possession()
        for worker in [self._idle.get() for _ in range(self._size)]:
            if worker is not None:
                worker.end()
        self._fill(self._idle)
        self._keeper.close()

    def _take_possession(self) -> None:
        """In a forked process, leave the workers to the parent."""
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._busy: set[Worker] = set()
            self._idle: LifoQueue[Worker | None] = LifoQueue()
            self._fill(self._idle)

    def _fill(self, places: LifoQueue[Worker | None]) -> None:
        for _ in range(self._size):
            places.put(None)

    def _missing(self) -> str:
        """Why no worker can be started; "" where the zygote runs."""
        why = ""
        for _ in range(_ATTEMPTS):
            try:
                self._keeper.zygote()
                return ""
            except SandboxFailure as error:
                why = error.why
        return why

    def _outcome(self, request: bytes, stopped: threading.Event) -> Outcome:
        if len(request) > self.limits.request_bytes:
            allowed = self.limits.request_bytes
            return Outcome(End.INFRA, detail=f"a request of {len(request)} bytes, {allowed} are allowed")
        seen: set[End] = set()
        while True:
            outcome = self._tried(request)
            if outcome.end not in (End.CRASH, End.INFRA) or outcome.end in seen or stopped.is_set():
                return outcome
            seen.add(outcome.end)

    def _tried(self, request: bytes) -> Outcome:
        """What came of the request in an idle worker that is alive and silent, or else in a new one."""
        worker = self._idle.get()
        try:
            if worker is not None and not worker.is_silent():
                worker.end()
                worker = None
            if worker is None:
                worker = self._keeper.use(lambda zygote: Worker(zygote, self.limits))
            self._busy.add(worker)
            outcome, fit = worker.ask(request)
            self._busy.discard(worker)
            worker = worker if fit else None
            return outcome
        except SandboxFailure as error:
            return Outcome(End.INFRA, detail=f"cannot fork a worker: {error.why}")
        finally:
            self._idle.put(worker)


class Worker:
    """A worker as its parent sees it. Raises OSError where the zygote or the worker is gone before it is ready."""

    def __init__(self, zygote: Zygote, limits: WorkerLimits) -> None:
        self._limits = limits
        self._served = 0
        self._phase = ""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._control = zygote.start({"memory_bytes": limits.memory_bytes}, [theirs.fileno()])
        finally:
            theirs.close()
        # A message that stops half-way raises BlockingIOError.
        longest = struct.pack("ll", int(limits.stuck_s), int(limits.stuck_s % 1 * 1e6))
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, direction, longest)
        self._said = select.poll()
        self._said.register(self._socket, select.POLLIN)
        self._clock = ~int(self._message()["pid"]) << 3 | 2  # the kernel's number of a process's processor time

    def is_silent(self) -> bool:
        """Whether the worker is alive and has said nothing that nobody asked for."""
        return not self._said.poll(0)

    def ask(self, request: bytes) -> tuple[Outcome, bool]:
        """What came of the request, and whether the worker is fit for another one; if not, it has ended.

        An end is CRASH here after one crash already.
        """
        started = monotonic()
        self._served += 1
        self._phase = ""
        reply: Mapping[str, Any] = {}
        fit = False
        try:
            end, message = self._asked(request)
            detail = str(message.get("detail", ""))
            if end is End.DONE:
                reply = message["reply"]
                fit = not message.get("worn") and self._served < self._limits.requests_per_worker
            if not fit:
                self.end()
        except (OSError, plain.Malformed):  # it ended, said too much or what is no message, or does not listen
            status = self.end()
            end, detail = End.CRASH if -status in _CRASHES else End.INFRA, f"the worker ended with code {status}"
        return Outcome(end, reply, self._phase, detail, monotonic() - started), fit

    def kill(self) -> None:
        """Make the supervisor kill the worker."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def end(self) -> int:
        """Kill the worker unless it has ended; its exit status, negative for a signal."""
        self.kill()
        self._control.settimeout(GRACE_SECONDS)
        try:
            return int(plain.loads(self._control.recv(65536)).get("exit", 0))
        except (OSError, plain.Malformed):
            return 0
        finally:
            self._control.close()
            self._socket.close()

    def _asked(self, request: bytes) -> tuple[End, Mapping[str, Any]]:
        """The end and the last message, which has a `detail` where it is not a reply."""
        plain.send(self._socket.fileno(), b'{"id": %d, "request": %b}' % (self._served, request))
        while True:
            end, message = self._next()
            if end is not End.DONE:
                return end, message
            if message.get("id") != self._served:
                raise plain.Malformed("a message about another request")
            if "phase" in message:
                self._phase = str(message["phase"])[:80]
            elif isinstance(message.get("reply"), dict):
                return End.DONE, message
            elif "memory" in message:
                return End.MEMORY, {"detail": "needs more memory than allowed"}
            else:
                return End.INFRA, {"detail": f"the worker said {message.get('raised') or 'what is no reply'}"}

    def _next(self) -> tuple[End, Mapping[str, Any]]:
        """The next message, within the time of the phase that begins now; or TIMEOUT or INFRA and why."""
        limits = self._limits
        cpu_s = limits.phase_cpu_s.get(self._phase, limits.cpu_s)
        # So that on a busy machine a long phase, too, ends by its own fault and is not begun again and again.
        stuck_s = limits.stuck_s * max(1.0, cpu_s / limits.cpu_s)
        begun, cpu_before = monotonic(), time.clock_gettime(self._clock)
        wait = 0.0
        while not self._said.poll(1000 * wait):
            waited, used = monotonic() - begun, time.clock_gettime(self._clock) - cpu_before
            if used >= cpu_s:
                return End.TIMEOUT, {"detail": f"not done after {used:.2f} s of processor time"}
            if waited - used >= stuck_s:
                return End.INFRA, {"detail": f"got {used:.2f} s of processor time within {waited:.0f} s"}
            wait = min(max(cpu_s - used, 0.01), stuck_s - (waited - used))
        return End.DONE, self._message()

    def _message(self) -> Mapping[str, Any]:
        message = plain.receive(self._socket.fileno(), longest=self._limits.reply_bytes)
        if message is None:
            raise ConnectionError("the worker closed its socket")
        if not isinstance(message, dict):
            raise plain.Malformed("not an object")
        return message
