"""TensorBoard's event files of a run."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.run.tracker_libraries import Ending, Row

Scalars = tuple[int, Mapping[str, float], float]
"""A step, what was measured in it, and when, in seconds since 1970."""


class TensorBoard:
    """Appends to the event files in a directory; each call has reached the file when it returns."""

    def __init__(
        self, directory: Path, recipe: Mapping[str, Any] | None = None, earlier: Callable[[], Iterable[Scalars]] = tuple
    ) -> None:
        """Where the directory is new, `recipe` is shown among the texts, and what was `earlier` measured comes before the first event."""
        self._directory, self._recipe, self._earlier = directory, recipe, earlier
        self._writer: Any = None

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._add(Event(wall_time=time, step=step, summary=summary))

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        self._add(_text(step, name, as_markdown(rows)))

    def rewind(self, step: int) -> None:
        """Make TensorBoard discard what it has from `step` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if self._directory.exists():
            started = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=step, session_log=started))

    def finish(self, ending: Ending) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, event: Any) -> None:
        # TensorBoard's own writer, since PyTorch's imports ten times as long and writes the same records.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

        if self._writer is None:
            is_new = not self._directory.exists()
            self._writer = EventFileWriter(str(self._directory))
            earlier = [*self._earlier()] if is_new else []
            # Metrics are in the file before they come here.
            own = any(value.HasField("simple_value") for value in event.summary.value)
            for line in earlier[: len(earlier) - own]:
                self.scalars(*line)
            if is_new and self._recipe is not None:
                text = yaml.safe_dump(self._recipe, sort_keys=False, allow_unicode=True)
                self._writer.add_event(_text(0, "recipe", f"```yaml\n{text}```"))
        self._writer.add_event(event)
        self._writer.flush()


def as_markdown(rows: Sequence[Row]) -> str:
    """Rows as a table, with a column for each key that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")


def _text(step: int, name: str, text: str) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.text.summary_v2 import text_pb  # type: ignore[import-untyped]

    return Event(wall_time=time.time(), step=step, summary=text_pb(name, text))
