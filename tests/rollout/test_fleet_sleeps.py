"""Workers that make room for others on their GPUs, with real engines. On a CPU vLLM leaves all where it is; see also `test_supervisor`."""

import pytest

from rollout import State

from .injuries import WitnessedFleet

pytestmark = pytest.mark.timeout(300)


def test_workers_offload_and_onload_with_the_same_weights(witnessed: WitnessedFleet) -> None:
    witnessed.until_healthy()
    before = witnessed.sample()
    witnessed.fleet.offload()
    assert [worker.state for worker in witnessed.fleet.workers] == [State.OFFLOADED] * 2
    witnessed.fleet.onload()
    assert witnessed.sample() == before


def test_something_may_have_to_happen_before_workers_are_used(
    witnessed: WitnessedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = witnessed.sample()
    witnessed.fleet.offload()
    monkeypatch.setattr(witnessed.fleet, "before_use", witnessed.fleet.onload)
    assert witnessed.sample() == before
