"""Writes checkpoints for ever, in processes that are killed: at each of some operations of the file system, or at any moment.

`python checkpoint_writer.py DIRECTORY` prints for each death `how it died, the last step that was complete, the step found`.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.run.checkpoints import CheckpointDirectory, hashed_file, verify

# What is done last before the death: the operation, and which time in the life of the process.
CHOSEN = [
    ("fsync", 1),
    ("fsync", 4),
    ("fsync", 5),
    ("mkdir", 2),
    ("rename", 1),
    ("rename", 3),
    ("rename", 5),
    ("rmtree", 2),
]
RANDOM = 40


def write_for_ever(directory: Path, first: int, report: int) -> None:
    def fill(path: Path) -> dict[str, dict[str, Any]]:
        entries = {}
        for rank in range(2):
            with hashed_file(path / f"rank_{rank:05d}.pt") as (file, entry):
                file.write(f"step {step} rank {rank} ".encode() * 2000)
            entries[f"rank_{rank:05d}.pt"] = entry
        return entries

    checkpoints = CheckpointDirectory(directory)
    checkpoints.sweep()
    step = first
    while True:
        checkpoints.write(step, {"of": step}, fill)
        os.write(report, step.to_bytes(4, "big"))
        step += 1


def dies_after(times: int, operation: Callable[..., Any]) -> Callable[..., Any]:
    done = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal done
        result = operation(*arguments, **keywords)
        done += 1
        if done == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


def life(directory: Path, first: int, chosen: tuple[str, int] | None) -> int:
    """One process, up to its death; returns the last step that it reported complete, or that was so before."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(here)
        if chosen is not None:
            name, times = chosen
            owner: Any = {"fsync": os, "rmtree": shutil}.get(name, Path)
            setattr(owner, name, dies_after(times, getattr(owner, name)))
        write_for_ever(directory, first, there)
    os.close(there)
    if chosen is None:
        time.sleep(random.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reported = b"".join(iter(lambda: os.read(here, 4096), b""))
    os.close(here)
    return int.from_bytes(reported[-4:], "big") if reported else first - 1


def main() -> None:
    directory = Path(sys.argv[1])
    complete = 0
    for chosen in [*CHOSEN, *[None] * RANDOM]:
        complete = life(directory, complete + 1, chosen)
        newest = CheckpointDirectory(directory).newest(lambda damage: print("damaged", damage))
        found = newest.step if newest else 0
        for path in directory.glob("step_*"):
            assert verify(path).facts == {"of": int(path.name.removeprefix("step_"))}
        print(chosen, complete, found, flush=True)
        complete = found


main()
