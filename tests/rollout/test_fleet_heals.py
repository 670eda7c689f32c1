"""Faults injected into real workers: none of their work is lost or done twice, and what comes back is the same to the bit.

What happens in other states than while sampling is in `test_supervisor`.
"""

import psutil
import pytest

from align.recipe import ModelOptions
from rollout import Trajectory, stored

from .injuries import HANGS, OPTIONS, Injury, WitnessedFleet
from .publisher import changed_weights

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def other_weights(witnessed: WitnessedFleet, policy: ModelOptions) -> None:
    """The weights of the workers are not those on disk: version 1."""
    witnessed.fleet.load(stored(changed_weights(policy.path, 1)), version=1)
    witnessed.fleet.wait_until_ready()


@pytest.fixture(scope="module")
def unbroken(witnessed: WitnessedFleet, other_weights: None) -> list[Trajectory]:
    return witnessed.sample()


@pytest.mark.parametrize(
    "injury",
    [
        Injury.KILL,
        pytest.param(Injury.STOP, marks=pytest.mark.slow),
        pytest.param(Injury.SEGFAULT, marks=pytest.mark.slow),
        pytest.param(Injury.LOCKED, marks=pytest.mark.slow),
        pytest.param(Injury.ENGINE, marks=pytest.mark.slow),
    ],
)
def test_what_a_worker_was_lost_with_is_sampled_again_with_the_same_result(
    injury: Injury, witnessed: WitnessedFleet, unbroken: list[Trajectory]
) -> None:
    witnessed.until_healthy()
    witnessed.faults.clear()
    hurt: list[int] = []

    def strike() -> None:
        hurt.append(witnessed.injure_a_busy_one(injury))

    assert witnessed.sample(strike) == unbroken
    witnessed.until_healthy()
    witnessed.fleet.wait_until_ready()
    told = [fault.message for fault in witnessed.faults if fault.worker == hurt[0]]
    assert any("its engine batch is sampled again" in message for message in told)
    assert "serves again, with the weights of version 1" in told[-1]
    if injury in HANGS:
        assert any("MainThread" in fault.stacks for fault in witnessed.faults)


@pytest.mark.slow
def test_a_worker_of_two_processes_is_replaced_whichever_of_them_dies(policy: ModelOptions, ray_session: None) -> None:
    of_two = WitnessedFleet(policy.path, OPTIONS.model_copy(update={"workers": 1, "tensor_parallel": 2}))
    seen: set[psutil.Process] = set()

    def engine_processes() -> list[psutil.Process]:
        worker = of_two.fleet.workers[0]
        assert worker.process is not None
        found = psutil.Process(worker.process.pid).children(recursive=True)
        seen.update(found)
        return [child for child in found if "Worker" in child.name()]

    try:
        of_two.until_healthy()
        unbroken = of_two.sample()
        assert len(engine_processes()) == 2
        assert of_two.sample(lambda: engine_processes()[0].kill()) == unbroken
        of_two.until_healthy()
        engine_processes()
        assert of_two.sample(lambda: of_two.injure(0, Injury.KILL)) == unbroken
        of_two.until_healthy()
        assert any("restart 1 of 3" in fault.message for fault in of_two.faults)
    finally:
        of_two.fleet.close()
    _, left = psutil.wait_procs(seen, timeout=30)
    assert left == []
