"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from align.run.files import redacted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

LINES_PER_STAGE = 30
QUIET_S = 300.0


@dataclass
class _Stage:
    title: str
    total_steps: int
    completed: int
    started: float
    shown_at: float
    measured_from: tuple[int, float] | None = None
    bar: "TaskID | None" = None
    phases: set[str] = field(default_factory=set)


class Progress:
    """Shows the steps of one stage after another; with `log`, appends it all to that file as plain text.

    The bar is drawn only on a terminal that can, and not where NO_COLOR or CI is set. Elsewhere, and in the
    log, about 30 lines tell of a stage (the first and last step always), and one more after 5 silent minutes.
    """

    def __init__(self, console: "Console | None" = None, *, log: Path | None = None) -> None:
        from rich.console import Console

        self._console = console or Console()
        self._log_path = log
        self._log: TextIO | None = None
        self._bars: Bars | None = _bars(self._console) if _can_draw(self._console) else None
        self._stage: _Stage | None = None

    def __enter__(self) -> Self:
        if self._log_path is not None:
            self._log = self._log_path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._end_stage()
            self._bars.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    def stage(self, title: str, total_steps: int, *, completed: int = 0) -> None:
        """Begin a stage of `total_steps`, of which an earlier run did `completed`."""
        self._end_stage()
        now = time.monotonic()
        self._stage = _Stage(title, total_steps, completed, started=now, shown_at=now)
        if self._bars is not None:
            # Not before: another run may have the terminal until then.
            self._bars.start()
            self._stage.bar = self._bars.add_task(
                title, total=total_steps, completed=completed, left="", phase="", numbers=""
            )
        self._line(f"{title}: {total_steps} steps" + (f", {completed} done before" if completed else ""))

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show that `step` of the stage's steps are done, the last with these numbers."""
        stage = self._current()
        now = time.monotonic()
        elapsed = now - stage.started
        left = _left(stage, step, now)
        text = "  ".join(f"{name} {compact(value)}" for name, value in numbers.items())
        if self._bars is not None and stage.bar is not None:
            self._bars.update(stage.bar, completed=step, left=left, phase="", numbers=text)
        every = math.ceil(stage.total_steps / LINES_PER_STAGE) or 1
        edge = step <= stage.completed + 1 or step >= stage.total_steps
        if edge or step % every == 0 or now - stage.shown_at >= QUIET_S:
            stage.shown_at = now
            times = ", ".join(filter(None, [f"{_clock(elapsed)} elapsed", left]))
            self._line(f"{stage.title} {step}/{stage.total_steps}  {times}  {text}".rstrip())

    def phase(self, text: str) -> None:
        """Show what the stage is doing now; as a plain line, only the first time in a stage."""
        stage = self._current()
        if self._bars is not None and stage.bar is not None:
            self._bars.update(stage.bar, phase=text)
        if text not in stage.phases:
            stage.phases.add(text)
            self._line(f"{stage.title}: {text}")

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", style="yellow")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; numbers are shown compactly and to the right."""
        from rich import box

        plain = _plain_table(_table(title, columns, rows, box.MARKDOWN))
        if self._bars is None:
            self._print(plain)
        else:
            self._console.print(_table(title, columns, rows, box.SIMPLE_HEAD))
            self._write_log(plain)

    def _current(self) -> _Stage:
        if self._stage is None:
            raise RuntimeError("no stage has begun")
        return self._stage

    def _end_stage(self) -> None:
        if self._stage is not None and self._bars is not None and self._stage.bar is not None:
            self._bars.update(self._stage.bar, left="", phase="")
            self._bars.stop_task(self._stage.bar)
        self._stage = None

    def _line(self, text: str) -> None:
        """Print a line of progress where no bar is drawn; with a bar it only goes to the log."""
        if self._bars is None:
            self._print(text)
        else:
            self._write_log(text)

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(redacted(text), style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._write_log(text)

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            self._log.write(redacted(text) + "\n")
            self._log.flush()


def compact(value: float) -> str:
    """`value` in at most seven characters or so, to three or four digits."""
    size = abs(value)
    if not math.isfinite(size):
        return str(float(value))
    if isinstance(value, int) and size < 10_000:
        return str(value)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{letter}"
    if size >= 1e-3 or size == 0:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _can_draw(console: "Console") -> bool:
    declined = os.environ.get("NO_COLOR") or os.environ.get("CI")
    return console.is_terminal and not console.is_dumb_terminal and not declined


def _bars(console: "Console") -> "Bars":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    def text(template: str, **column: Any) -> TextColumn:
        return TextColumn(template, markup=False, table_column=Column(no_wrap=True, **column))

    return Progress(
        text("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        text("{task.fields[left]}"),
        text("{task.fields[phase]}  {task.fields[numbers]}", overflow="ellipsis", ratio=1),
        console=console,
        expand=True,
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], box: Any) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box)
    for position, name in enumerate(columns):
        numeric = all(isinstance(row[position], int | float) for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(compact(cell) if isinstance(cell, int | float) else str(cell)) for cell in row))
    return table


def _plain_table(table: "Table") -> str:
    from rich.console import Console

    console = Console(file=StringIO(), width=10_000, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def _left(stage: _Stage, step: int, now: float) -> str:
    """The estimated time of the remaining steps; empty at the first step, which includes the start-up."""
    if stage.measured_from is None:
        stage.measured_from = (step, now)
        return ""
    first, since = stage.measured_from
    seconds = (now - since) / max(step - first, 1) * max(stage.total_steps - step, 0)
    return f"{_clock(seconds)} left"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
