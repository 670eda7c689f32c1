"""Workers that make room for others on their GPUs, with real engines. On a CPU vLLM leaves all where it is; see also `test_supervisor`."""

from types import SimpleNamespace

import pytest

from rollout import Colocation, State

from .injuries import WitnessedFleet

pytestmark = pytest.mark.timeout(300)


def test_workers_offload_and_onload_with_the_same_weights(witnessed: WitnessedFleet) -> None:
    witnessed.until_healthy()
    before = witnessed.sample()
    witnessed.fleet.offload()
    assert [worker.state for worker in witnessed.fleet.workers] == [State.OFFLOADED] * 2
    witnessed.fleet.onload()
    assert witnessed.sample() == before


def test_whoever_shares_their_gpus_makes_room_before_they_are_used(
    witnessed: WitnessedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = witnessed.sample()
    gpus = Colocation(None)
    gpus.claim(witnessed.fleet)
    gpus.claim(SimpleNamespace(offload=lambda: None, onload=lambda: None))
    assert [worker.state for worker in witnessed.fleet.workers] == [State.OFFLOADED] * 2
    monkeypatch.setattr(witnessed.fleet, "_colocation", gpus)
    assert witnessed.sample() == before
