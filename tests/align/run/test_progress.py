"""A terminal gets a bar, everything else gets few plain lines, and the log gets the same lines."""

import contextlib
import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from align.run import Progress
from align.run import progress as progress_module
from align.run.progress import compact


@pytest.fixture(autouse=True)
def _terminal_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def plain_lines(total_steps: int, *, log: Path | None = None) -> list[str]:
    output = StringIO()
    with Progress(Console(file=output), log=log) as progress:
        progress.stage("SFT", total_steps)
        for step in range(1, total_steps + 1):
            progress.phase("sampling")
            progress.step(step, {"loss": 1.23456, "lr": 1e-6})
    return output.getvalue().splitlines()


def step_lines(lines: list[str]) -> list[str]:
    return [line for line in lines if "elapsed" in line]


def test_a_long_stage_takes_about_thirty_lines_with_the_first_and_the_last() -> None:
    lines = step_lines(plain_lines(600))
    assert len(lines) == 31
    assert lines[0].startswith("SFT 1/600 ")
    assert lines[1].startswith("SFT 20/600 ")
    assert lines[-1].startswith("SFT 600/600 ")
    assert lines[-1].endswith("loss 1.235  lr 1e-6")


def test_a_short_stage_shows_every_step() -> None:
    assert len(step_lines(plain_lines(5))) == 5


def test_a_phase_is_told_once_and_the_output_holds_no_control_characters() -> None:
    lines = plain_lines(5)
    assert lines.count("SFT: sampling") == 1
    assert "\x1b" not in "".join(lines)


def test_slow_steps_are_shown_after_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(clock)))
    output = StringIO()
    with Progress(Console(file=output)) as progress:
        progress.stage("GRPO", 600)
        for step in range(1, 11):
            progress.step(step, {})
    shown = step_lines(output.getvalue().splitlines())
    assert [line.split("/")[0] for line in shown] == ["GRPO 1", "GRPO 4", "GRPO 7", "GRPO 10"]
    assert "0:16:40 elapsed, 16:23:20 left" in shown[-1]


def test_a_stage_taken_up_again_starts_from_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(clock)))
    output = StringIO()
    with Progress(Console(file=output)) as progress:
        progress.stage("SFT", 100, completed=94)
        progress.step(95, {})
        progress.step(96, {})
    assert "SFT 95/100  0:00:10 elapsed\n" in output.getvalue(), "the first step holds the start-up and tells nothing"
    assert "SFT 96/100  0:00:20 elapsed, 0:00:40 left" in output.getvalue()


def test_the_log_holds_what_was_printed(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    lines = plain_lines(3, log=log)
    assert log.read_text().splitlines() == lines


def test_notes_warnings_and_tables_are_printed_as_given() -> None:
    output = StringIO()
    with Progress(Console(file=output)) as progress:
        progress.note("[bold]not markup[/bold] " + "long " * 40 + "end")
        progress.warn("few samples")
        progress.table("Scores", ["task", "accuracy"], [["gsm8k", 0.123456], ["算術 [x]", 12]])
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("[bold]not markup[/bold] long")
    assert lines[0].endswith("end")
    assert lines[1] == "warning: few samples"
    assert lines[2:] == [
        "Scores",
        "| task     | accuracy |",
        "|----------|----------|",
        "| gsm8k    |   0.1235 |",
        "| 算術 [x] |       12 |",
    ]


def test_a_terminal_gets_a_bar_and_the_log_gets_lines(tmp_path: Path) -> None:
    output = StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with Progress(console, log=tmp_path / "log.txt") as progress:
        progress.stage("SFT", 600)
        progress.phase("sampling")
        progress.note("a note")
        progress.step(300, {"loss": 1.23456})
        progress.table("Scores", ["task"], [["gsm8k"]])
    shown = output.getvalue()
    assert "\x1b" in shown
    assert "━" in shown
    assert "300/600" in shown
    assert "loss 1.235" in shown
    log = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in log
    assert "━" not in log
    assert "SFT 300/600" in log
    assert log.index("a note") < log.index("| gsm8k |")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("CI", "true"), ("TERM", "dumb")])
def test_a_terminal_that_declines_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    output = StringIO()
    with Progress(Console(file=output, force_terminal=True)) as progress:
        progress.stage("SFT", 2)
        progress.step(1, {"loss": 1.0})
    assert "SFT 1/2" in output.getvalue()
    assert "━" not in output.getvalue()


def test_the_bar_gives_the_terminal_back_when_the_run_fails() -> None:
    output = StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with contextlib.suppress(KeyError), Progress(console) as progress:
        progress.stage("SFT", 2)
        raise KeyError
    assert output.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_a_step_needs_a_stage() -> None:
    with Progress(Console(file=StringIO())) as progress, pytest.raises(RuntimeError, match="no stage"):
        progress.step(1, {})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.23456, "1.235"),
        (-0.5, "-0.5"),
        (1e-6, "1e-6"),
        (0.00012345, "1.23e-4"),
        (600, "600"),
        (12_345, "12.35k"),
        (15_706_484_224.0, "15.71G"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert compact(value) == text
