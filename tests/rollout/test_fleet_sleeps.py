"""Workers that make room for others: they do nothing until they are woken, and are then what they were.

On a CPU vLLM leaves all where it is; what is tested is who does what, and when.
"""

import time

import pytest

from rollout import State

from .injuries import Injury, WitnessedFleet

pytestmark = pytest.mark.timeout(300)


def test_workers_sleep_and_wake_with_the_same_weights(witnessed: WitnessedFleet) -> None:
    witnessed.until_healthy()
    before = witnessed.sample()
    witnessed.fleet.sleep()
    assert [member.state for member in witnessed.fleet.members] == [State.ASLEEP] * 2
    time.sleep(1.5)  # three times as long as it takes for an idle worker to be probed
    assert all(member.task is None for member in witnessed.fleet.members)
    witnessed.fleet.wake()
    assert witnessed.sample() == before


def test_one_that_is_lost_asleep_is_started_when_the_others_wake(witnessed: WitnessedFleet) -> None:
    witnessed.until_healthy()
    before = witnessed.sample()
    witnessed.faults.clear()
    witnessed.fleet.sleep()
    witnessed.injure(0, Injury.KILL)
    witnessed.until(lambda: witnessed.fleet.members[0].state is State.RESTARTING)
    first = witnessed.fleet.members[0].actor
    time.sleep(1)
    assert witnessed.fleet.members[0].actor is first
    witnessed.fleet.wait_until_ready()  # none is being started
    witnessed.fleet.wake()
    assert witnessed.sample() == before
    witnessed.until_healthy()
    assert witnessed.fleet.members[0].actor is not first
    assert next(fault.message.partition(";")[0] for fault in witnessed.faults) == "rollout worker 0 died idle"


@pytest.mark.slow
def test_those_that_are_still_being_started_sleep_when_they_are_there(witnessed: WitnessedFleet) -> None:
    witnessed.until_healthy()
    before = witnessed.sample()
    witnessed.injure(1, Injury.KILL)
    witnessed.until(lambda: witnessed.fleet.members[1].state is State.RESTARTING)
    witnessed.fleet.sleep()
    assert [member.state for member in witnessed.fleet.members] == [State.ASLEEP] * 2
    witnessed.fleet.wake()
    assert witnessed.sample() == before


def test_something_may_have_to_happen_before_workers_are_used(
    witnessed: WitnessedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = witnessed.sample()
    witnessed.fleet.sleep()
    monkeypatch.setattr(witnessed.fleet, "before_use", witnessed.fleet.wake)
    assert witnessed.sample() == before
