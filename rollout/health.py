"""How a fleet tells whether a worker lives."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from rollout.types import FleetOptions

PROBES = 3
"""A worker that leaves so many probes in a row unanswered is taken for hung."""


class State(StrEnum):
    """What a worker is fit for. Only a healthy one is given engine batches."""

    RESTARTING = "restarting"  # its engine is being loaded
    STALE = "stale"  # its weights are not the fleet's, or not yet
    HEALTHY = "healthy"
    ASLEEP = "asleep"  # what it held on its GPU is in the CPU's memory
    SUSPECT = "suspect"  # it has left a probe unanswered
    DEAD = "dead"  # and not restarted any more


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happened to a worker: a sentence, its state now, and what its threads did when it hung."""

    worker: int
    state: State
    message: str
    stacks: str = ""


FaultHandler = Callable[[Fault], None]


class Vitals:
    """The signs of life of one worker process while it does something, in seconds of the monotonic clock.

    A probe asks a second thread of the process for the count of what its engine has done. A process that is stopped, or
    hangs while it holds Python's lock, does not answer; one whose engine hangs answers with the same count for ever.
    """

    def __init__(self, options: FleetOptions):
        self._options = options
        self._asked: float | None = None
        self._due = 0.0
        self._count = -1
        self._progress = 0.0

    def begin(self, now: float) -> None:
        """A piece of work starts."""
        self._progress = self._due = now

    @property
    def is_asked(self) -> bool:
        return self._asked is not None

    def wants_probe(self, now: float) -> bool:
        return self._asked is None and now >= self._due

    def asked(self, now: float) -> None:
        self._asked = now

    def answered(self, now: float, count: int) -> None:
        """A probe came back with the engine's count."""
        self._asked, self._due = None, now + self._options.probe_interval_s
        if count != self._count:
            self._count, self._progress = count, now

    def missed(self, now: float) -> int:
        """How many probe timeouts have passed since the probe that is on its way."""
        return 0 if self._asked is None else int((now - self._asked) / self._options.probe_timeout_s)

    def without_progress(self, now: float) -> float:
        """Seconds since the engine last did something."""
        return now - self._progress
