"""Weights that are broadcast to real workers arrive whole, and a worker that does not receive them gets them again."""

import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from align.recipe import ModelOptions
from rollout import BroadcastSync, Trajectory, stored
from rollout.sync.base import Bucket
from rollout.sync.broadcast import Address, meet, torch_kept_as_it_is

from .injuries import Injury, WitnessedFleet
from .publisher import LocalPublisher, changed_weights

BROADCAST = BroadcastSync(100_000)


def sampled(witnessed: WitnessedFleet, weights: dict[str, torch.Tensor]) -> list[Trajectory]:
    """What the workers sample with these weights in the usual way."""
    witnessed.fleet.load(stored(weights), version=7)
    return witnessed.sample()


def test_workers_sample_with_what_they_received(witnessed: WitnessedFleet, policy: ModelOptions) -> None:
    learner = LocalPublisher(weights := changed_weights(policy.path, 1))
    expected = sampled(witnessed, weights)
    for _ in range(2):
        witnessed.fleet.load(stored(changed_weights(policy.path, 2)), version=6)
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

    learner = LocalPublisher(weights := changed_weights(policy.path, 3), some_of_it)
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

    learner = LocalPublisher(weights := changed_weights(policy.path, 4), hurting)
    expected = sampled(witnessed, weights)
    witnessed.until_healthy()
    witnessed.fleet.load(BROADCAST.publish(learner), version=7)
    assert hurt.is_set()
    assert witnessed.sample() == expected
    witnessed.fleet.wait_until_ready()
    witnessed.until_healthy()
    assert witnessed.sample() == expected


def test_a_learner_s_stream_and_kernels_for_attention_are_what_they_were_before_vllm_was_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For GPUs vLLM puts cuDNN's attention off where it is imported, and goes on with a stream of its own."""
    streams = ["the default one"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    with torch_kept_as_it_is(torch.device("cuda")):
        torch.backends.cuda.enable_cudnn_sdp(False)
        streams.append("vLLM's")
    kept = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    assert kept
    assert streams[-1] == "the default one"
