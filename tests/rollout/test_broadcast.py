"""Weights that are broadcast to real workers arrive whole, and a worker that does not receive them gets them again."""

import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.model.names import to_checkpoint
from align.recipe import ModelOptions
from rollout import BroadcastSync, Trajectory, stored
from rollout.sync.base import Bucket
from rollout.sync.broadcast import Address, meet

from .injuries import Injury, WitnessedFleet
from .publisher import LocalPublisher

BROADCAST = BroadcastSync(100_000)
Weights = dict[str, torch.Tensor]


def changed(policy: ModelOptions, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    checkpoint = to_checkpoint(AutoModelForCausalLM.from_pretrained(policy.path).state_dict().items())
    return {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in checkpoint}


def sampled(witnessed: WitnessedFleet, weights: Weights) -> list[Trajectory]:
    """What the workers sample with these weights in the usual way."""
    witnessed.fleet.load(stored(weights), version=7)
    return witnessed.sample()


def test_workers_sample_with_what_they_received(witnessed: WitnessedFleet, policy: ModelOptions) -> None:
    learner = LocalPublisher(weights := changed(policy, 1))
    expected = sampled(witnessed, weights)
    for _ in range(2):
        witnessed.fleet.load(stored(changed(policy, 2)), version=6)
        witnessed.fleet.load(BROADCAST.publish(learner), version=7)
        assert witnessed.sample() == expected
    assert learner.published == ["broadcast to 3"] * 2
    assert len(set(learner.meetings)) == 1


def test_a_broadcast_that_breaks_off_is_made_up_for_without_a_restart(
    witnessed: WitnessedFleet, policy: ModelOptions
) -> None:
    def some_of_it(address: Address, size: int, made: Iterator[Bucket]) -> None:
        with suppress(OSError), meet(address, 0, size) as group:
            group.send(next(made))
            raise OSError

    learner = LocalPublisher(weights := changed(policy, 3), some_of_it)
    expected = sampled(witnessed, weights)
    witnessed.until_healthy()
    witnessed.faults.clear()
    witnessed.fleet.load(BROADCAST.publish(learner), version=8)
    assert learner.published == ["broadcast to 3", "stored"]
    told = [fault.message for fault in witnessed.faults]
    assert len(told) == 2
    assert all("takes the weights of version 8 by another way" in message for message in told)
    tokens = [completion.token_ids for completion in witnessed.sample()]
    assert tokens == [completion.token_ids for completion in expected]
    learner.broadcast = None
    witnessed.fleet.load(BROADCAST.publish(learner), version=9)
    assert learner.published[2:] == ["broadcast to 3"]
    assert len(set(learner.meetings)) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("injury", [Injury.KILL, Injury.STOP])
def test_a_worker_that_is_lost_while_it_receives_is_replaced_and_the_others_go_on(
    injury: Injury, witnessed: WitnessedFleet, policy: ModelOptions
) -> None:
    hurt = threading.Event()

    def hurting(address: Address, size: int, made: Iterator[Bucket]) -> None:
        with suppress(RuntimeError), meet(address, 0, size) as group:
            group.send(next(made))
            witnessed.injure(0, injury)
            hurt.set()
            for bucket in made:
                group.send(bucket)
            group.send({})

    learner = LocalPublisher(weights := changed(policy, 4), hurting)
    expected = sampled(witnessed, weights)
    witnessed.until_healthy()
    witnessed.fleet.load(BROADCAST.publish(learner), version=7)
    assert hurt.is_set()
    assert witnessed.sample() == expected
    witnessed.fleet.wait_until_ready()
    witnessed.until_healthy()
    assert witnessed.sample() == expected
