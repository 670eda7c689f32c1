"""Whichever side is used, the other has made room before it."""

from typing import Any

from align.session.turns import take_turns


class Side:
    """Says what it is told to do."""

    def __init__(self, told: list[str], name: str):
        self._told, self._name = told, name
        self.before_use: Any = None

    def __getattr__(self, doing: str) -> Any:
        return lambda: self._told.append(f"{self._name} {doing}")


def test_one_makes_room_before_the_other_comes_back() -> None:
    told: list[str] = []
    fleet: Any = Side(told, "workers")
    learner: Any = Side(told, "learners")
    take_turns(fleet, learner)
    learner.before_use()
    fleet.before_use()
    assert told == ["workers offload", "learners rise", "learners rest", "workers onload"]
