"""Faults to inject into rollout workers on this machine, to see a fleet heal."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from rollout.fleet import Fleet
from rollout.types import FleetOptions, Prompt, SamplingOptions, Trajectory
from rollout.worker_handle import Doing, Fault, State

OPTIONS = FleetOptions(
    workers=2,
    max_length=64,
    kv_cache_gb=0.25,
    batch_sequences=8,
    probe_interval_s=0.5,
    probe_timeout_s=2,
    stall_timeout_s=10,
)
PROMPTS = [Prompt(f"p{i}", [1, 40 + i, 60 + 3 * i, 17]) for i in range(12)]


class Injury(StrEnum):
    """What can happen to a worker's process."""

    KILL = "killed"
    SEGFAULT = "segmentation fault"
    STOP = "stopped"
    LOCKED = "hangs with Python's lock held"
    ENGINE = "engine hangs"


SIGNALS = {Injury.KILL: signal.SIGKILL, Injury.SEGFAULT: signal.SIGSEGV, Injury.STOP: signal.SIGSTOP}
HANGS = (Injury.STOP, Injury.LOCKED, Injury.ENGINE)


class WitnessedFleet:
    """A fleet that remembers what it has told of its workers."""

    def __init__(self, model: str, options: FleetOptions = OPTIONS):
        self.faults: list[Fault] = []
        self.fleet = Fleet(model, "float32", options, [2], self.faults.append)

    def sample(self, at_first_group: Callable[[], object] = lambda: None) -> list[Trajectory]:
        """The same trajectories at every call, in order; `at_first_group` is called while most are still being sampled."""
        drawn: list[Trajectory] = []
        groups = self.fleet.sample(PROMPTS, 4, SamplingOptions(max_new_tokens=24), seed=0, step=0)
        for number, group in enumerate(groups):
            drawn += group.trajectories
            if number == 0:
                at_first_group()
        return sorted(drawn, key=lambda c: (c.prompt_id, c.index))

    def injure(self, worker: int, injury: Injury) -> None:
        """Inject the fault into the worker of that number. Returns at once."""
        member = self.fleet.workers[worker]
        assert member.process is not None, "the worker has answered no probe yet"
        if injury in SIGNALS:
            os.kill(member.process.pid, SIGNALS[injury])
        else:
            hang = hold_pythons_lock if injury is Injury.LOCKED else hang_the_engine
            member.actor.handle.__ray_call__.options(concurrency_group="pulse").remote(hang)

    def injure_a_busy_one(self, injury: Injury) -> int:
        """Inject the fault into a worker that is sampling. Returns its number."""

        def busy() -> list[int]:
            return [m.number for m in self.fleet.workers if m.task and m.task.doing is Doing.SAMPLING]

        self.until(lambda: bool(busy()))
        worker = busy()[0]
        self.injure(worker, injury)
        return worker

    def until_healthy(self) -> None:
        """Return when every worker serves, and has drawn something since it was started."""
        self.until(lambda: all(m.state is State.HEALTHY and m.process and not m.restarts for m in self.fleet.workers))

    def until(self, happened: Callable[[], bool], seconds: float = 300) -> None:
        """Return when something has happened. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                raise TimeoutError(f"it did not happen within {seconds:g} s; the workers: {self.faults}")
            time.sleep(0.02)


def hold_pythons_lock(worker: Any) -> None:
    # Functions of a PyDLL are called without letting go of the lock.
    ctypes.PyDLL(None).sleep(3600)


def hang_the_engine(worker: Any) -> None:
    worker._llm.llm_engine.step = lambda: time.sleep(3600)
