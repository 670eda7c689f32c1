"""The metrics of a run, step by step, as lines of JSON and for TensorBoard; and its events, as lines of JSON."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from align.run.directory import RunDirectory
from align.run.files import json_line, redacted


class MetricsLog:
    """Appends to metrics.jsonl, events.jsonl and tensorboard/ of a run. One process writes a run at a time.

    Times are seconds since 1970. Lines are flushed before the call returns, so a killed run loses none.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._metrics = _append(directory.metrics_file)
        self._events = _append(directory.events_file)
        self._tensorboard_directory = directory.tensorboard_directory
        self._tensorboard: Any = None

    def write(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Append one step of `stage`; TensorBoard shows each metric as `stage/metric`.

        Raises ValueError when a metric is called step, stage or time.
        """
        now = time.time()
        _write_line(self._metrics, {"step": step, "stage": stage, "time": now}, metrics)
        self._write_tensorboard(step, stage, metrics, now)

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Append an event, such as the restart of a rollout worker.

        Raises ValueError when an item of `data` is called time, TypeError when JSON cannot hold one.
        """
        _write_line(self._events, {"time": time.time(), "kind": kind, "message": redacted(message)}, data)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def purge(self, step: int) -> None:
        """Make TensorBoard discard what it has from `step` on, because those steps will be repeated."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        if self._tensorboard_directory.exists():
            started = SessionLog(status=SessionLog.START)
            self._add_to_tensorboard(Event(wall_time=time.time(), step=step, session_log=started))

    def _write_tensorboard(self, step: int, stage: str, metrics: Mapping[str, float], now: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [Summary.Value(tag=f"{stage}/{name}", simple_value=float(value)) for name, value in metrics.items()]
        self._add_to_tensorboard(Event(wall_time=now, step=step, summary=Summary(value=values)))

    def _add_to_tensorboard(self, event: Any) -> None:
        # TensorBoard's own writer, since PyTorch's imports ten times as long and writes the same records.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

        if self._tensorboard is None:
            self._tensorboard = EventFileWriter(str(self._tensorboard_directory))
        self._tensorboard.add_event(event)
        self._tensorboard.flush()


def _append(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def _write_line(file: TextIO, head: dict[str, Any], rest: Mapping[str, Any]) -> None:
    taken = head.keys() & rest.keys()
    if taken:
        raise ValueError(f"{', '.join(sorted(taken))}: written by the log itself")
    file.write(json_line({**head, **rest}) + "\n")
    file.flush()
