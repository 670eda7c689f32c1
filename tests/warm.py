"""Processes that are used again: a learner rank or a rollout worker needs ten seconds for its imports, and two for a nano model."""

import gc
import os
import threading
from itertools import chain
from typing import Any

import pytest

from align.learner.engine import environment as environment_of_rank
from align.learner.group import RankGroup
from align.learner.rank import LearnerRank
from align.recipe import LearnerOptions, ModelOptions
from rollout import FleetOptions, fleet
from rollout.processes import Actor
from rollout.worker import RolloutWorker
from rollout.worker_handle import State, WorkerHandle


class WarmRanks:
    """Keeps the actors of closed learner groups and gives them to the next groups, reset: a fresh process costs ten seconds of imports."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        # DeepSpeed registers classes for experts that it spreads: such a process serves only groups that spread theirs.
        self._idle: dict[tuple[type[LearnerRank], bool], list[Any]] = {}
        self._kinds: dict[Any, tuple[type[LearnerRank], bool]] = {}
        self._start = RankGroup._start
        patch.setattr(RankGroup, "_start", lambda group, *of: self.start(group, *of))
        patch.setattr(RankGroup, "_end", lambda group, rank: self.end(group, rank))

    def start(
        self, group: RankGroup, kind: type[LearnerRank], model: ModelOptions, rank: int, placement_group: Any
    ) -> Any:
        import ray

        key = (kind, group._options.expert_parallel > 1)
        idle = self._idle.setdefault(key, [])
        while idle:
            actor = idle.pop(0)
            try:
                ray.get(actor.__ray_call__.remote(begin_anew, model, group._options, rank))
            except ray.exceptions.RayError:
                continue
            return actor
        actor = self._start(group, kind, model, rank, placement_group)
        self._kinds[actor] = key
        return actor

    def end(self, group: RankGroup, rank: Any) -> None:
        """Keep the process, unless it hangs."""
        import ray

        if group._stalled:
            ray.kill(rank)
        else:
            self._idle[self._kinds[rank]].append(rank)

    def close(self) -> None:
        """End the processes that wait for a group, so that the next ones are new."""
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
    os.environ |= environment_of_rank(rank, options.ranks, options.threads)
    worker.__init__(model, options)  # type: ignore[misc]


class WarmWorkers:
    """Keeps the actors of healthy rollout workers when their fleet is closed, and gives them to the next fleets, without an engine."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._idle: dict[int, list[Actor[RolloutWorker]]] = {}
        self._threads: dict[Any, int] = {}
        self._start, self._end = fleet.new_actor, WorkerHandle.end
        patch.setattr(fleet, "new_actor", self.start)
        patch.setattr(WorkerHandle, "end", lambda handle, grace_s=0.0: self.end(handle, grace_s))

    def start(self, options: FleetOptions, placement_group: Any, number: int) -> Actor[RolloutWorker]:
        import ray

        is_anywhere = not options.resources and placement_group is None
        is_plain = is_anywhere and options.tensor_parallel == 1
        # The supervisor's own thread starts workers in the place of lost ones.
        idle = (
            self._idle.setdefault(options.threads, []) if threading.current_thread() is threading.main_thread() else []
        )
        while is_anywhere and idle:
            actor = idle.pop(0)
            try:
                ray.get(actor.handle.__ray_call__.remote(unload))
            except ray.exceptions.RayError:
                continue
            if not is_plain:
                del self._threads[actor]  # it gets processes of its own, and ends with them
            return actor
        actor = self._start(options, placement_group, number)
        if is_plain:
            self._threads[actor] = options.threads
        return actor

    def end(self, handle: WorkerHandle, grace_s: float) -> None:
        """Keep the process where a fleet closes that has done it no harm."""
        actor = handle.actor
        is_well = handle.task is None and handle.state in (State.HEALTHY, State.STALE)
        if grace_s and is_well and actor in self._threads:
            handle.task = handle.actor = handle.process = None
            self._idle.setdefault(self._threads[actor], []).append(actor)
        else:
            self._end(handle, grace_s)

    def close(self) -> None:
        """End the processes that wait for a fleet."""
        import ray

        for actor in chain(*self._idle.values()) if ray.is_initialized() else ():
            actor.kill()
        self._idle.clear()


def unload(worker: RolloutWorker) -> None:
    """Make of a rollout worker one that has loaded nothing yet."""
    from vllm.distributed import cleanup_dist_env_and_memory

    process = worker._process
    worker.__dict__.clear()
    worker._process, worker.steps = process, 0
    gc.unfreeze()
    cleanup_dist_env_and_memory()


class WarmProcesses:
    """Both kinds, for the time of a test session."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ranks, self.workers = WarmRanks(patch), WarmWorkers(patch)

    def close(self) -> None:
        """End the processes that wait to be used again."""
        self.ranks.close()
        self.workers.close()
