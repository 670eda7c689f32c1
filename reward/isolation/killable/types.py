"""What a request may cost, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


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
