"""Faults injected into real workers: none of their work is lost or done twice, and what comes back is the same to the bit."""

import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from align.model.names import to_checkpoint
from align.recipe import ModelOptions
from rollout import RolloutError, Trajectory, stored

from .injuries import HANGS, OPTIONS, Injury, WitnessedFleet

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def other_weights(witnessed: WitnessedFleet, policy: ModelOptions) -> None:
    """The weights of the workers are not those on disk: version 1."""
    generator = torch.Generator().manual_seed(1)
    checkpoint = to_checkpoint(AutoModelForCausalLM.from_pretrained(policy.path).state_dict().items())
    witnessed.fleet.load(
        stored({n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in checkpoint}), version=1
    )
    witnessed.fleet.wait_until_ready()


@pytest.fixture(scope="module")
def unbroken(witnessed: WitnessedFleet, other_weights: None) -> list[Trajectory]:
    return witnessed.sample()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "injury",
    [
        Injury.KILL,
        Injury.STOP,
        pytest.param(Injury.SEGFAULT, marks=SLOW),
        pytest.param(Injury.LOCKED, marks=SLOW),
        pytest.param(Injury.ENGINE, marks=SLOW),
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
@pytest.mark.parametrize("injury", [Injury.KILL, Injury.SEGFAULT, Injury.STOP, Injury.LOCKED])
def test_a_worker_lost_while_nothing_is_asked_is_replaced_by_one_with_the_same_weights(
    injury: Injury, witnessed: WitnessedFleet, unbroken: list[Trajectory]
) -> None:
    witnessed.until_healthy()
    witnessed.faults.clear()
    for member in witnessed.fleet.members:
        witnessed.injure(member.number, injury)
    witnessed.until(lambda: all(m.restarts for m in witnessed.fleet.members))
    assert witnessed.sample() == unbroken
    assert sum("restart 1 of 3" in fault.message for fault in witnessed.faults) == 2


@pytest.mark.slow
def test_an_update_survives_a_worker_that_dies_while_it_loads(witnessed: WitnessedFleet, policy: ModelOptions) -> None:
    witnessed.until_healthy()
    witnessed.faults.clear()
    witnessed.injure(0, Injury.STOP)
    weights = dict(to_checkpoint(AutoModelForCausalLM.from_pretrained(policy.path).state_dict().items()))
    witnessed.fleet.load(stored(weights), version=2)
    assert any("rollout worker 0 left 3 probes" in fault.message for fault in witnessed.faults)
    drawn = witnessed.sample()
    assert {run.version for one in drawn for run in one.weight_versions} == {2}
    witnessed.until_healthy()
    assert witnessed.sample() == drawn


@pytest.mark.slow
def test_with_every_worker_dead_and_no_restart_left_the_call_fails_at_once(
    policy: ModelOptions, ray_session: None
) -> None:
    lost = WitnessedFleet(policy.path, OPTIONS.model_copy(update={"max_restarts": 0}))
    try:
        lost.fleet.wait_until_ready()
        lost.until_healthy()
        began = time.monotonic()
        for member in lost.fleet.members:
            lost.injure(member.number, Injury.KILL)
        with pytest.raises(RolloutError, match="all rollout workers are dead"):
            lost.sample()
        assert time.monotonic() - began < 30
    finally:
        lost.fleet.close()


@pytest.mark.slow
@pytest.mark.parametrize("injury", [Injury.KILL, Injury.STOP])
def test_a_fault_at_the_first_start_is_healed(injury: Injury, policy: ModelOptions, ray_session: None) -> None:
    starting = WitnessedFleet(policy.path, OPTIONS.model_copy(update={"workers": 1}))
    try:
        starting.until(lambda: starting.fleet.members[0].process is not None)
        starting.injure(0, injury)
        starting.fleet.wait_until_ready()
        assert any("loading the policy; restart 1 of 3" in f.message for f in starting.faults) or injury is Injury.STOP
        assert len(starting.sample()) == 96
    finally:
        starting.fleet.close()


@pytest.mark.slow
def test_a_worker_of_two_processes_is_replaced_whichever_of_them_dies(policy: ModelOptions, ray_session: None) -> None:
    of_two = WitnessedFleet(policy.path, OPTIONS.model_copy(update={"workers": 1, "tensor_parallel": 2}))
    seen: set[psutil.Process] = set()

    def engine_processes() -> list[psutil.Process]:
        member = of_two.fleet.members[0]
        assert member.process is not None
        found = psutil.Process(member.process.pid).children(recursive=True)
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
