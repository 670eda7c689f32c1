"""A worker as its parent sees it: what it says, the request that it has, and how long it still may take."""

from __future__ import annotations

import json
import math
import os
import select
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from reward.isolation.killable.types import End, Limits


@dataclass
class Worker:
    """`row` is the request's place in its batch; `serial` its number in this pool, which every message repeats."""

    pid: int
    connection: socket.socket
    limits: Limits
    served: int = 0
    row: int = -1
    serial: int = 0
    phase: str = ""
    started: float = 0.0
    phase_started: float = 0.0
    deadline: float = 0.0
    """When to look at its processor time, by the monotonic clock."""
    cpu_before: float = 0.0
    """Its processor time at the start of the phase, in seconds."""
    unread: bytes = b""

    def begin(self, row: int, serial: int) -> None:
        """From now on it has this request, and its time runs."""
        self.row, self.serial, self.phase, self.unread = row, serial, "", b""
        self.started = self.phase_started = monotonic()
        self.deadline = self.started + min(self.limits.cpu_s, self.limits.wall_s)

    def send(self, request: bytes) -> None:
        """Raises OSError where it does not listen."""
        self.connection.settimeout(self.limits.stuck_s)
        self.connection.sendall(b'{"id": %d, "request": %b}\n' % (self.serial, request))
        self.connection.setblocking(False)

    def receive(self) -> list[Mapping[str, Any]] | None:
        """The messages that have arrived, empty for what is none about this request; None if it is of no use more.

        It is of no use where it closed its socket or said more than `reply_bytes`.
        """
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            data = b""
        self.unread += data
        if not data or len(self.unread) > self.limits.reply_bytes:
            return None
        *lines, self.unread = self.unread.split(b"\n")
        messages = map(_parsed, lines)
        return [message if message.get("id") == self.serial else {} for message in messages]

    def enter(self, message: Mapping[str, Any]) -> None:
        """A phase begins, and with it the time anew."""
        self.phase = str(message["phase"])[:80]
        self._note_cpu(message)
        self.phase_started = monotonic()
        self.deadline = self.phase_started + min(self._cpu_limit(), self.limits.wall_s)

    def finish(self, message: Mapping[str, Any]) -> bool:
        """The request is done. Whether the worker is fit for another one."""
        self.served += 1
        self._note_cpu(message)
        worn = message.get("worn") or self.served >= self.limits.requests_per_worker
        return not (worn or self.unread)

    def time_up(self, now: float) -> tuple[End, str] | None:
        """TIMEOUT where the request used up its time, INFRA where the worker got none, and why.

        None where it may go on: then the deadline is a later one.
        """
        used = max(0.0, self._cpu_seconds(now) - self.cpu_before)
        limits, waited, cpu_s = self.limits, now - self.phase_started, self._cpu_limit()
        enough = cpu_s if waited < limits.wall_s else cpu_s / 2
        if used >= enough - 0.01:
            return End.TIMEOUT, f"not done after {used:.2f} s of processor time"
        if waited >= limits.stuck_s:
            return End.INFRA, f"got {used:.2f} s of processor time within {waited:.0f} s"
        self.deadline = now + max(enough - used, 0.01)
        for limit in (limits.wall_s, limits.stuck_s):
            if waited < limit:
                self.deadline = min(self.deadline, self.phase_started + limit)
        return None

    def _cpu_limit(self) -> float:
        return self.limits.phase_cpu_s.get(self.phase, self.limits.cpu_s)

    def _note_cpu(self, message: Mapping[str, Any]) -> None:
        cpu = message.get("cpu")
        if isinstance(cpu, float) and math.isfinite(cpu):
            self.cpu_before = cpu

    def _cpu_seconds(self, now: float) -> float:
        """Processor time since its birth, to 0.01 s; where there is no /proc, the wall time instead."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return self.cpu_before + now - self.started


def readable(descriptors: Sequence[int], seconds: float) -> list[int]:
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
