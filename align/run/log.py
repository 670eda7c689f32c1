"""The metrics of a run, step by step, as lines of JSON and for its trackers; and its events, as lines of JSON."""

import time
from collections.abc import Mapping
from typing import Any, TextIO

from align.run.directory import RunDirectory
from align.run.files import json_line, redacted
from align.run.trackers import Trackers


class MetricsLog:
    """Appends to metrics.jsonl and events.jsonl of a run, and passes metrics on to its trackers. One process writes a run at a time.

    Times are seconds since 1970. Lines are flushed before the call returns, so a killed run loses none.
    """

    def __init__(self, directory: RunDirectory, trackers: Trackers | None = None) -> None:
        self.trackers = trackers or Trackers()
        self._metrics = directory.metrics_file.open("a", encoding="utf-8")
        self._events = directory.events_file.open("a", encoding="utf-8")

    def write(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Append one step of `stage`; trackers show each metric as `stage/metric`.

        Raises ValueError when a metric is called step, stage or time.
        """
        now = time.time()
        _write_line(self._metrics, {"step": step, "stage": stage, "time": now}, metrics)
        self.trackers.scalars(step, {f"{stage}/{name}": float(value) for name, value in metrics.items()}, now)

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Append an event, such as the restart of a rollout worker.

        Raises ValueError when an item of `data` is called time, TypeError when JSON cannot hold one.
        """
        _write_line(self._events, {"time": time.time(), "kind": kind, "message": redacted(message)}, data)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


def _write_line(file: TextIO, head: dict[str, Any], rest: Mapping[str, Any]) -> None:
    taken = head.keys() & rest.keys()
    if taken:
        raise ValueError(f"{', '.join(sorted(taken))}: written by the log itself")
    file.write(json_line({**head, **rest}) + "\n")
    file.flush()
