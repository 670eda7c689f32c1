"""What the tests of fleets share: two workers that tell what happens to them."""

from collections.abc import Iterator

import pytest

from align.recipe import ModelOptions

from .injuries import WitnessedFleet


@pytest.fixture(scope="session")
def witnessed(policy: ModelOptions, ray_session: None) -> Iterator[WitnessedFleet]:
    witnessed = WitnessedFleet(policy.path)
    witnessed.until_healthy()
    yield witnessed
    witnessed.fleet.close()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that a supervisor kills, none of which is there."""
    pids: list[int] = []
    monkeypatch.setattr("rollout.processes.kill", lambda process, grace_s: pids.append(process.pid))
    monkeypatch.setattr("rollout.processes.stacks", lambda process: f"stacks of {process.pid}")
    return pids
