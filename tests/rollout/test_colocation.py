"""Whichever side uses the GPUs, the other has made room before it."""

from rollout import Colocation


class Side:
    """Notes what it is told to do."""

    def __init__(self, told: list[str], name: str):
        self._told, self._name = told, name

    def offload(self) -> None:
        self._told.append(f"{self._name} offload")

    def onload(self) -> None:
        self._told.append(f"{self._name} onload")


def test_one_side_makes_room_before_the_other_comes_back() -> None:
    told: list[str] = []
    workers, learner, gpus = Side(told, "workers"), Side(told, "learner"), Colocation(None)
    gpus.claim(workers)
    told.clear()
    for side in (learner, learner, workers):
        gpus.claim(side)
    assert told == ["workers offload", "learner onload", "learner offload", "workers onload"]


def test_a_side_that_has_ended_is_asked_for_nothing() -> None:
    told: list[str] = []
    workers, learner, gpus = Side(told, "workers"), Side(told, "learner"), Colocation(None)
    gpus.claim(learner)
    gpus.release(learner)
    told.clear()
    gpus.claim(workers)
    assert told == ["workers onload"]
