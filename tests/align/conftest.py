"""The `align` command as a user starts it, to be stopped and killed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]


class Command:
    """`align ...` in a process group of its own, its output in a file."""

    def __init__(self, output: Path, *arguments: str):
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "align.cli", *arguments],
                cwd=ROOT,
                env=os.environ | {"NO_COLOR": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def until(self, happened: Callable[[], bool], seconds: float = 900) -> None:
        """Wait for something to happen while the command runs."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, self.output[-4000:]
            assert time.monotonic() < end, self.output[-4000:]
            time.sleep(0.02)

    def ends(self, status: int, seconds: float = 900) -> str:
        """Wait for the end; its output."""
        assert self.process.wait(timeout=seconds) == status, self.output[-4000:]
        return self.output

    def family(self) -> list[psutil.Process]:
        """All processes below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def largest(self) -> float:
        """Wait for a good end; the most memory that its processes held together, in bytes. Shared pages are counted once."""
        largest = 0.0
        while self.process.poll() is None:
            family = [psutil.Process(self.process.pid), *self.family()]
            largest = max(largest, sum(map(proportional_set_size, family)))
            time.sleep(2)
        self.ends(0)
        return largest


def proportional_set_size(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().pss)
    except psutil.Error:
        return 0.0


@pytest.fixture
def align(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts `align` with some arguments; what is still running after the test is killed."""
    started: list[Command] = []

    def start(*arguments: str) -> Command:
        started.append(Command(tmp_path / f"output_{len(started)}.txt", *arguments))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            for process in [*command.family(), psutil.Process(command.process.pid)]:
                process.kill()
            command.process.wait()


@pytest.fixture(scope="session")
def read_lines() -> Callable[[Path], list[dict[str, Any]]]:
    """The records of a file of JSON lines that is being written; none where there is no file yet."""

    def read(path: Path) -> list[dict[str, Any]]:
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    return read


@pytest.fixture
def agreements(align: Callable[..., Command], read_lines: Callable[[Path], Any]) -> Callable[..., list[float]]:
    """Runs a stage of the nano recipe on a model; how far sampler and learner were apart each time they were compared."""

    def run(stage: str, model: Path | str, directory: Path, *overrides: str) -> list[float]:
        recipe = [stage, f"recipes/nano/{stage}.yaml", f"run.dir={directory}", f"model={{path: {model}}}"]
        align(*recipe, *overrides).ends(0)
        return [line["agreement/mean"] for line in read_lines(directory / "metrics.jsonl") if "agreement/mean" in line]

    return run
