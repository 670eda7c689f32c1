"""Faults to inject into a rollout worker, to see a fleet heal."""

import ctypes
import os
import signal
import time
from enum import StrEnum
from typing import Any

from rollout.fleet import Fleet


class Injury(StrEnum):
    """What can happen to a worker's process."""

    KILL = "killed"
    SEGFAULT = "segmentation fault"
    STOP = "stopped"
    LOCKED = "hangs with Python's lock held"
    ENGINE = "engine hangs"


def injure(fleet: Fleet, worker: int, injury: Injury) -> None:
    """Inject the fault into the worker of that number, which has to be on this machine. Returns at once."""
    member = fleet.members[worker]
    assert member.process is not None, "the worker has answered no probe yet"
    signals = {Injury.KILL: signal.SIGKILL, Injury.SEGFAULT: signal.SIGSEGV, Injury.STOP: signal.SIGSTOP}
    if injury in signals:
        os.kill(member.process.pid, signals[injury])
    else:
        hang = hold_pythons_lock if injury is Injury.LOCKED else hang_the_engine
        member.actor.__ray_call__.options(concurrency_group="pulse").remote(hang)


def hold_pythons_lock(worker: Any) -> None:
    # Functions of a PyDLL are called without letting go of the lock.
    ctypes.PyDLL(None).sleep(3600)


def hang_the_engine(worker: Any) -> None:
    worker._engine._llm.llm_engine.step = lambda: time.sleep(3600)
