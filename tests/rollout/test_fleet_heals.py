"""Faults injected into real workers: none of their work is lost or done twice, and what comes back is the same to the bit."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.config import ModelOptions
from align.model.checkpoint_names import to_checkpoint
from rollout import Completion, Fault, Fleet, FleetOptions, Prompt, RolloutError, SamplingOptions, State
from rollout.drill import Injury, injure
from rollout.member import Doing

PROMPTS = [Prompt(f"p{i}", [1, 40 + i, 60 + 3 * i, 17]) for i in range(12)]
OPTIONS = FleetOptions(
    workers=2,
    max_length=64,
    kv_cache_gb=0.25,
    batch_sequences=8,
    probe_interval_s=0.5,
    probe_timeout_s=2,
    stall_timeout_s=10,
)
SAMPLING = SamplingOptions(max_new_tokens=40)

pytestmark = pytest.mark.timeout(900)


class Witnessed:
    """A fleet, and what it has told of its workers."""

    def __init__(self, policy: ModelOptions, options: FleetOptions = OPTIONS):
        self.faults: list[Fault] = []
        self.fleet = Fleet(policy.path, "float32", options, [2], self.faults.append)

    def sample(self, at_first_group: Callable[[], None] = lambda: None) -> list[Completion]:
        completions: list[Completion] = []
        for number, group in enumerate(self.fleet.generate(PROMPTS, 8, SAMPLING, seed=0, step=0)):
            completions += group.completions
            if number == 0:
                at_first_group()
        return sorted(completions, key=lambda c: (c.prompt_id, c.index))

    def until(self, happened: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, self.faults
            time.sleep(0.05)

    def until_healthy(self) -> None:
        self.until(lambda: all(m.state is State.HEALTHY and m.process for m in self.fleet.members))

    def busy_worker(self) -> int:
        self.until(lambda: any(m.task and m.task.doing is Doing.SAMPLING for m in self.fleet.members))
        return next(m.number for m in self.fleet.members if m.task and m.task.doing is Doing.SAMPLING)


@pytest.fixture(scope="module")
def witnessed(policy: ModelOptions, ray_session: None) -> Iterator[Witnessed]:
    """Two workers whose weights are not those on disk: version 1."""
    witnessed = Witnessed(policy)
    generator = torch.Generator().manual_seed(1)
    checkpoint = to_checkpoint(AutoModelForCausalLM.from_pretrained(policy.path).state_dict().items())
    witnessed.fleet.load({n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in checkpoint}, version=1)
    witnessed.fleet.wait_until_ready()
    yield witnessed
    witnessed.fleet.close()


@pytest.fixture(scope="module")
def unbroken(witnessed: Witnessed) -> list[Completion]:
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
    injury: Injury, witnessed: Witnessed, unbroken: list[Completion]
) -> None:
    witnessed.until_healthy()
    witnessed.faults.clear()
    hurt: list[int] = []

    def strike() -> None:
        hurt.append(witnessed.busy_worker())
        injure(witnessed.fleet, hurt[0], injury)

    assert witnessed.sample(strike) == unbroken
    witnessed.until_healthy()
    witnessed.fleet.wait_until_ready()
    told = [fault.message for fault in witnessed.faults if fault.worker == hurt[0]]
    assert any("its engine batch is sampled again" in message for message in told)
    assert "serves again, with the weights of version 1" in told[-1]
    if injury in (Injury.STOP, Injury.LOCKED, Injury.ENGINE):
        assert any("MainThread" in fault.stacks for fault in witnessed.faults)


@pytest.mark.slow
@pytest.mark.parametrize("injury", [Injury.KILL, Injury.SEGFAULT, Injury.STOP, Injury.LOCKED])
def test_a_worker_lost_while_nothing_is_asked_is_replaced_by_one_with_the_same_weights(
    injury: Injury, witnessed: Witnessed, unbroken: list[Completion]
) -> None:
    witnessed.until_healthy()
    witnessed.faults.clear()
    for member in witnessed.fleet.members:
        injure(witnessed.fleet, member.number, injury)
    witnessed.until(lambda: all(m.state is State.RESTARTING for m in witnessed.fleet.members), 60)
    assert witnessed.sample() == unbroken
    assert sum("restart 1 of 3" in fault.message for fault in witnessed.faults) == 2


@pytest.mark.slow
def test_an_update_survives_a_worker_that_dies_while_it_loads(witnessed: Witnessed, policy: ModelOptions) -> None:
    witnessed.until_healthy()
    witnessed.faults.clear()
    injure(witnessed.fleet, 0, Injury.STOP)
    weights = dict(to_checkpoint(AutoModelForCausalLM.from_pretrained(policy.path).state_dict().items()))
    witnessed.fleet.load(weights, version=2)
    assert any("rollout worker 0 left 3 probes" in fault.message for fault in witnessed.faults)
    drawn = witnessed.sample()
    assert {completion.weight_version for completion in drawn} == {2}
    witnessed.until_healthy()
    assert witnessed.sample() == drawn


@pytest.mark.slow
def test_with_every_worker_dead_and_no_restart_left_the_call_fails_at_once(
    policy: ModelOptions, ray_session: None
) -> None:
    lost = Witnessed(policy, OPTIONS.model_copy(update={"max_restarts": 0}))
    try:
        lost.fleet.wait_until_ready()
        lost.until_healthy()
        began = time.monotonic()
        for member in lost.fleet.members:
            injure(lost.fleet, member.number, Injury.KILL)
        with pytest.raises(RolloutError, match="all rollout workers are dead"):
            lost.sample()
        assert time.monotonic() - began < 30
    finally:
        lost.fleet.close()


@pytest.mark.slow
@pytest.mark.parametrize("injury", [Injury.KILL, Injury.STOP])
def test_a_fault_at_the_first_start_is_healed(injury: Injury, policy: ModelOptions, ray_session: None) -> None:
    starting = Witnessed(policy, OPTIONS.model_copy(update={"workers": 1}))
    try:
        starting.until(lambda: starting.fleet.members[0].process is not None)
        injure(starting.fleet, 0, injury)
        starting.fleet.wait_until_ready()
        assert any("loading the policy; restart 1 of 3" in f.message for f in starting.faults) or injury is Injury.STOP
        assert len(starting.sample()) == 96
    finally:
        starting.fleet.close()
