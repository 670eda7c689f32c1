"""The `align` command as a user starts it, to be stopped and killed; and learner ranks whose processes are used again."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest

from align.learner.group import RankGroup
from align.learner.rank import LearnerRank, environment
from align.recipe import LearnerOptions, ModelOptions

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


class WarmRanks:
    """Keeps the actors of closed learner groups and gives them to the next groups, reset: a fresh process costs ten seconds of imports."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._idle: dict[type[LearnerRank], list[Any]] = {}
        self._kinds: dict[Any, type[LearnerRank]] = {}
        self._start = RankGroup._start
        patch.setattr(RankGroup, "_start", lambda group, *of: self.start(group, *of))
        patch.setattr(RankGroup, "_end", lambda group, rank: self.end(group, rank))

    def start(
        self, group: RankGroup, kind: type[LearnerRank], model: ModelOptions, rank: int, placement_group: Any
    ) -> Any:
        import ray

        idle = self._idle.setdefault(kind, [])
        while idle:
            actor = idle.pop(0)
            try:
                ray.get(actor.__ray_call__.remote(begin_anew, model, group._options, rank))
            except ray.exceptions.RayError:
                continue
            return actor
        actor = self._start(group, kind, model, rank, placement_group)
        self._kinds[actor] = kind
        return actor

    def end(self, group: RankGroup, rank: Any) -> None:
        """Keep the process, unless it hangs, or DeepSpeed has registered classes for experts that it spread."""
        import ray

        if group._stalled or group._options.expert_parallel > 1:
            ray.kill(rank)
        else:
            self._idle[self._kinds[rank]].append(rank)

    def close(self) -> None:
        """End the processes that wait for a group."""
        import ray

        for actor in chain(*self._idle.values()) if ray.is_initialized() else ():
            ray.kill(actor)
        self._idle.clear()


def begin_anew(worker: LearnerRank, model: ModelOptions, options: LearnerOptions, rank: int) -> None:
    """Make of a rank, whatever has happened in it, one that has just been started."""
    import deepspeed.comm

    worker.__dict__.clear()
    gc.unfreeze()
    gc.collect()
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    os.environ |= environment(rank, options.ranks, options.threads)
    worker.__init__(model, options)  # type: ignore[misc]


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


@pytest.fixture(scope="session", autouse=True)
def warm_ranks() -> Iterator[WarmRanks]:
    """Learner groups get the processes of those before them."""
    with pytest.MonkeyPatch.context() as patch:
        warm = WarmRanks(patch)
        yield warm
        warm.close()
