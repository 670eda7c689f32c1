"""How a run is asked to stop, and when it does."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from align.errors import Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ALIKE = (signal.SIGUSR1, signal.SIGHUP)
"""What is taken as SIGTERM."""


class StopRequest:
    """Ctrl-C as KeyboardInterrupt, and SIGTERM as its kind Terminated: where they come, or at the end of what is deferred. SIGUSR1, which batch
    systems are often told to send ahead of their time limit, is taken as SIGTERM, and so is SIGHUP, which comes when a terminal is closed, unless
    nohup lets the run outlive it.

    Should the exception be lost, it comes again at the next `check`: Python loses one that is raised inside a destructor or a
    callback of native code. A second Ctrl-C ends the process at once; a second SIGTERM does nothing, for whoever ends all processes of a job
    ends a pipeline too, which hands the signal on to its stage.
    """

    def __init__(self, grace_s: float = 0.0) -> None:
        """What is deferred may take `grace_s` from the signal on."""
        self._grace_s = grace_s
        self._number: int | None = None
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._ask)
        for number in ALIKE if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ALIKE[:1]:
            self._before[number] = signal.signal(number, lambda _, frame: self._ask(signal.SIGTERM, frame))
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self._number is not None

    def check(self) -> None:
        """Raise KeyboardInterrupt when a signal has come and nothing is deferred."""
        if self.asked and not self._deferred:
            self._raise()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What is inside is not interrupted before the grace is over."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGTERM:
            return
        if self.asked:
            os._exit(128 + number)
        self._number = number
        if self._deferred and self._grace_s:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        else:
            self._raise()

    def _raise(self, *_: object) -> None:
        raise Terminated if self._number == signal.SIGTERM else KeyboardInterrupt
