"""Worker processes for whatever a model wrote: judged within hard limits, or killed and replaced at once.

    workers = Killable(Path("job.py"))
    outcomes = workers.run([{"answer": "1/2"}, {"answer": "9^{9^{9}}"}])  # one Outcome each, in order

There are no signal alarms and no threads: the limits are kept from outside, by SIGKILL and by the kernel, and so
they hold inside C code too. What crosses the border are lines of JSON, of bounded length in both directions;
nothing is unpickled. The other side is `reward.killable_worker`.

The limit on time is processor time, so that a busy machine takes no reward away from an honest answer. An answer
that used it up is the model's fault. A worker that ends otherwise, or gets no processor for `stuck_s`, is ours: the
request is tried once more in a fresh worker, and then reported as INFRA, never as a wrong answer.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Any

_WORKER = Path(__file__).with_name("killable_worker.py")
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
"""All that a worker learns of our environment: no keys, no tokens."""
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_ATTEMPTS = 2


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Each phase has `cpu_s` seconds of processor time, or what `phase_cpu_s` says; once `wall_s` have passed, half of
    that will do, so that a busy machine bounds the wait too; after `stuck_s` without even that it is the worker that
    is at fault. `memory_bytes` is on top of what a warm worker holds. `start_s` is for the imports of the job.
    """

    cpu_s: float = 0.5
    phase_cpu_s: Mapping[str, float] = field(default_factory=dict)
    wall_s: float = 0.9
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


@dataclass(frozen=True)
class Outcome:
    """`reply` is what the job returned, empty unless DONE; `phase` the last one it entered; `seconds` wall time."""

    end: End
    reply: Mapping[str, Any] = field(default_factory=dict)
    phase: str = ""
    detail: str = ""
    seconds: float = 0.0


class WorkersUnavailable(Exception):  # noqa: N818
    """No worker can be started: the packages of the job do not import, or the machine is out of processes."""


@dataclass
class _Worker:
    pid: int
    connection: socket.socket
    cpu_before: float = 0.0
    served: int = 0
    row: int = -1
    serial: int = 0
    started: float = 0.0
    phase_started: float = 0.0
    deadline: float = 0.0
    phase: str = ""
    unread: bytes = b""


class _Mother:
    """The process that imports the job once and forks the workers."""

    def __init__(self, job: Path, limits: Limits) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # Its own folder is left out: there, `types.py` would hide the module of the standard library.
        path = [entry for entry in sys.path if entry and Path(entry).resolve() != _WORKER.parent]
        environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # forking needs a single thread
        flags = ["-P", "-s", "-B", "-W", "ignore"]
        self._process = subprocess.Popen(
            [sys.executable, *flags, str(_WORKER), str(job), str(limits.memory_bytes), str(os.getpid())],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
        )
        theirs.close()
        said = self._hear(limits.start_s)
        if said != "ready":
            self.close()
            raise WorkersUnavailable(f"{job.name}: {said}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
            return _Worker(int(self._hear(10.0)), ours)
        except (OSError, ValueError) as error:
            ours.close()
            raise WorkersUnavailable(f"cannot fork a worker: {error}") from error
        finally:
            theirs.close()

    def reap(self, worker: _Worker) -> int:
        """Kills the worker unless it has ended, and returns its exit code, negative for a signal."""
        worker.connection.close()
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        try:
            self._control.send(b"reap %d" % worker.pid)
            return int(self._hear(10.0))
        except (OSError, ValueError) as error:
            raise WorkersUnavailable(f"the mother of the workers is gone: {error}") from error

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()

    def _hear(self, seconds: float) -> str:
        if not _ready([self._control.fileno()], seconds):
            return f"nothing heard for {seconds:g} s"
        return self._control.recv(4096).decode() or "it ended"


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
        self._mother: _Mother | None = None
        self._idle: list[_Worker] = []
        self._busy: dict[int, _Worker] = {}
        atexit.register(self.close)

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """One outcome for each request, in order; never raises for what a request does."""
        self._leave_to_the_parent()
        with self._lock:
            batch = _Batch(requests, self.limits)
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
            self._mother.close()  # and the kernel ends the workers with it
            self._mother = None

    def _step(self, batch: _Batch) -> None:
        while batch.waiting and len(self._busy) < self._size:
            self._assign(batch)
        if not self._busy:
            return
        soonest = min(worker.deadline for worker in self._busy.values())
        for descriptor in _ready(list(self._busy), soonest - monotonic()):
            self._read(batch, self._busy[descriptor])
        now = monotonic()
        for worker in [worker for worker in self._busy.values() if worker.deadline <= now]:
            self._overdue(batch, worker, now)

    def _assign(self, batch: _Batch) -> None:
        worker = self._fresh()
        row = batch.waiting.popleft()
        self._serial += 1
        worker.row, worker.serial, worker.phase, worker.unread = row, self._serial, "", b""
        worker.started = worker.phase_started = monotonic()
        worker.deadline = worker.started + min(self.limits.cpu_s, self.limits.wall_s)
        self._busy[worker.connection.fileno()] = worker
        try:
            worker.connection.settimeout(self.limits.stuck_s)
            worker.connection.sendall(b'{"id": %d, "request": %b}\n' % (self._serial, batch.texts[row]))
            worker.connection.setblocking(False)
        except OSError:
            self._lost(batch, worker)

    def _fresh(self) -> _Worker:
        """An idle worker that still lives and is silent, or a new one."""
        if self._mother is None:
            self._mother = _Mother(self._job, self.limits)
        while self._idle:
            worker = self._idle.pop()
            if not _ready([worker.connection.fileno()], 0.0):
                return worker
            self._mother.reap(worker)
        return self._mother.fork()

    def _read(self, batch: _Batch, worker: _Worker) -> None:
        try:
            data = worker.connection.recv(1 << 16)
        except OSError:
            data = b""
        worker.unread += data
        if not data or len(worker.unread) > self.limits.reply_bytes:
            self._lost(batch, worker)
            return
        *lines, worker.unread = worker.unread.split(b"\n")
        for line in lines:
            message = _parsed(line)
            if message.get("id") != worker.serial:
                message = {}
            if "phase" in message:
                self._enter(worker, message)
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

    def _enter(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        worker.phase = str(message["phase"])[:80]
        worker.cpu_before = _cpu_said(message, worker.cpu_before)
        worker.phase_started = monotonic()
        worker.deadline = worker.phase_started + min(self._cpu_limit(worker), self.limits.wall_s)

    def _cpu_limit(self, worker: _Worker) -> float:
        return self.limits.phase_cpu_s.get(worker.phase, self.limits.cpu_s)

    def _overdue(self, batch: _Batch, worker: _Worker, now: float) -> None:
        used = max(0.0, _cpu_seconds(worker, now) - worker.cpu_before)
        limits, waited, cpu_s = self.limits, now - worker.phase_started, self._cpu_limit(worker)
        enough = cpu_s if waited < limits.wall_s else cpu_s / 2
        if used >= enough - 0.01:
            batch.settle(worker, End.TIMEOUT, f"not done after {used:.2f} s of processor time")
        elif waited >= limits.stuck_s:
            batch.strike(worker, f"got {used:.2f} s of processor time within {waited:.0f} s")
        else:
            worker.deadline = now + max(enough - used, 0.01)
            for limit in (limits.wall_s, limits.stuck_s):
                if waited < limit:
                    worker.deadline = min(worker.deadline, worker.phase_started + limit)
            return
        self._discard(worker)

    def _lost(self, batch: _Batch, worker: _Worker) -> None:
        """It closed its socket, said too much or does not listen."""
        code = self._discard(worker)
        batch.strike(worker, f"the worker ended with code {code}", crashed=-code in _CRASHES)

    def _discard(self, worker: _Worker) -> int:
        self._busy.pop(worker.connection.fileno(), None)
        assert self._mother is not None
        return self._mother.reap(worker)

    def _rest(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        worker.served += 1
        worker.cpu_before = _cpu_said(message, worker.cpu_before)
        worn = message.get("worn") or worker.served >= self.limits.requests_per_worker
        if worn or worker.unread:
            self._discard(worker)
        else:
            del self._busy[worker.connection.fileno()]
            self._idle.append(worker)


class _Batch:
    """The requests of one `run`: which wait, how often each has failed, and what became of the others."""

    def __init__(self, requests: Sequence[Mapping[str, Any]], limits: Limits) -> None:
        self.texts = [json.dumps(request).encode() for request in requests]
        self.waiting: deque[int] = deque()
        self._outcomes: dict[int, Outcome] = {}
        self._strikes: dict[int, list[bool]] = {}
        for row, text in enumerate(self.texts):
            if len(text) > limits.request_bytes:
                detail = f"a request of {len(text)} bytes, {limits.request_bytes} are allowed"
                self._outcomes[row] = Outcome(End.INFRA, detail=detail)
            else:
                self.waiting.append(row)

    @property
    def open(self) -> bool:
        return len(self._outcomes) < len(self.texts)

    def outcomes(self) -> list[Outcome]:
        return [self._outcomes[row] for row in range(len(self.texts))]

    def settle(self, worker: _Worker, end: End, detail: str = "", reply: Mapping[str, Any] | None = None) -> None:
        seconds = monotonic() - worker.started
        self._outcomes[worker.row] = Outcome(end, reply or {}, worker.phase, detail, seconds)

    def strike(self, worker: _Worker, detail: str, *, crashed: bool = False) -> None:
        """A failure that need not be the request's own: it waits for another try, or has had its last."""
        crashes = self._strike(worker.row, crashed)
        if crashes is None:
            self.waiting.appendleft(worker.row)
        else:
            self.settle(worker, End.CRASH if all(crashes) else End.INFRA, detail)

    def strike_all(self, detail: str) -> None:
        """The workers are gone: the same for every request that has no outcome."""
        self.waiting.clear()
        for row in range(len(self.texts)):
            if row in self._outcomes:
                continue
            if self._strike(row, crashed=False) is None:
                self.waiting.append(row)
            else:
                self._outcomes[row] = Outcome(End.INFRA, detail=detail)

    def _strike(self, row: int, crashed: bool) -> list[bool] | None:
        """The failures of a request that has none left to spend, True for a crash of its worker; else None."""
        strikes = self._strikes.setdefault(row, [])
        strikes.append(crashed)
        return None if len(strikes) < _ATTEMPTS else strikes


def _ready(descriptors: Sequence[int], seconds: float) -> list[int]:
    """Those that can be read, after `seconds` at most. Not `select`, which fails on descriptors from 1024 on."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(max(0, math.ceil(seconds * 1000)))]


def _parsed(line: bytes) -> Mapping[str, Any]:
    """The message of a worker, empty unless it is a JSON object."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _cpu_said(message: Mapping[str, Any], before: float) -> float:
    cpu = message.get("cpu")
    return cpu if isinstance(cpu, float) and math.isfinite(cpu) else before


def _cpu_seconds(worker: _Worker, now: float) -> float:
    """Processor time of the worker since its birth, to 0.01 s; where there is no /proc, the wall time instead."""
    try:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return worker.cpu_before + now - worker.started
