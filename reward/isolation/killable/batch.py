"""The requests of one run: which wait, how often each has failed, and what became of the others."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from reward.isolation.killable.types import End, Limits, Outcome
from reward.isolation.killable.worker import Worker

_ATTEMPTS = 2


class Batch:
    """`texts` are the requests as JSON, and a row is a place among them; `waiting` are the rows to be handed out."""

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
        """Whether some request has no outcome yet."""
        return len(self._outcomes) < len(self.texts)

    def outcomes(self) -> list[Outcome]:
        """One for each request, in order, once the batch is no longer open."""
        return [self._outcomes[row] for row in range(len(self.texts))]

    def settle(self, worker: Worker, end: End, detail: str = "", reply: Mapping[str, Any] | None = None) -> None:
        """The outcome of the worker's request."""
        seconds = monotonic() - worker.started
        self._outcomes[worker.row] = Outcome(end, reply or {}, worker.phase, detail, seconds)

    def strike(self, worker: Worker, detail: str, *, crashed: bool = False) -> None:
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
