"""Weights that are sent to all workers at once: they arrive whole, and who does not receive them gets them again."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM

import rollout.sync.broadcast
from align.model.names import to_checkpoint
from align.recipe import ModelOptions
from rollout import Broadcast, Trajectory, WeightSource, stored
from rollout.sync.base import Bucket, buckets
from rollout.sync.broadcast import Meeting, Receiver, Sender, meet

from .injuries import Injury, WitnessedFleet

Weights = dict[str, torch.Tensor]


def meeting() -> Meeting:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Meeting("127.0.0.1", probe.getsockname()[1])


@pytest.mark.parametrize("receivers", [1, 3])
def test_every_receiver_gets_every_tensor_in_the_buckets_that_were_sent(receivers: int) -> None:
    random = Random(receivers)
    shapes = [[random.randint(0, 9) for _ in range(random.randint(0, 3))] for _ in range(20)]
    dtypes = [random.choice([torch.float32, torch.bfloat16, torch.int64, torch.bool]) for _ in shapes]
    sent = {str(i): torch.randn(shape).to(dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))}
    made = list(buckets(sent.items(), 100))
    where, size = meeting(), 1 + receivers
    with ThreadPoolExecutor(receivers) as threads:
        found = [threads.submit(lambda n: list(Receiver(where, size, 1).buckets(n)), n) for n in range(receivers)]
        assert list(Sender(where, size).give(iter(made))) == []
        for received in (future.result() for future in found):
            assert [list(bucket) for bucket in received] == [list(bucket) for bucket in made]
            for name, tensor in ((name, tensor) for bucket in received for name, tensor in bucket.items()):
                assert torch.equal(tensor, sent[name])
                assert tensor.dtype == sent[name].dtype


def changed(policy: ModelOptions, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    checkpoint = to_checkpoint(AutoModelForCausalLM.from_pretrained(policy.path).state_dict().items())
    return {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in checkpoint}


def broadcast(weights: Weights, asked: list[str], send: Callable[[Sender, Iterator[Bucket]], object]) -> Broadcast:
    """Weights of this process on their way; `asked` tells what was asked for."""
    where = meeting()

    def send_them(size: int) -> None:
        asked.append(f"send to {size}")
        send(Sender(where, size), buckets(weights.items(), 100_000))

    def again() -> WeightSource:
        asked.append("again")
        return stored(weights)

    return Broadcast(where, send_them, again)


def whole(sender: Sender, made: Iterator[Bucket]) -> None:
    list(sender.give(made))


def sampled(witnessed: WitnessedFleet, weights: Weights) -> list[Trajectory]:
    """What the workers sample with these weights in the usual way."""
    witnessed.fleet.load(stored(weights), version=7)
    return witnessed.sample()


def test_workers_sample_with_what_they_received(witnessed: WitnessedFleet, policy: ModelOptions) -> None:
    weights, asked = changed(policy, 1), list[str]()
    expected = sampled(witnessed, weights)
    witnessed.fleet.load(stored(changed(policy, 2)), version=6)
    witnessed.fleet.load(broadcast(weights, asked, whole), version=7)
    assert asked == ["send to 3"]
    assert witnessed.sample() == expected


@pytest.mark.slow
def test_a_worker_that_is_started_later_gets_it_again(witnessed: WitnessedFleet, policy: ModelOptions) -> None:
    weights, asked = changed(policy, 5), list[str]()
    expected = sampled(witnessed, weights)
    witnessed.until_healthy()
    witnessed.fleet.load(broadcast(weights, asked, whole), version=7)
    witnessed.injure(0, Injury.KILL)
    assert witnessed.sample() == expected
    witnessed.fleet.wait_until_ready()
    while asked[-1] != "again":
        assert witnessed.sample() == expected
    witnessed.until_healthy()
    assert asked == ["send to 3", "again"]
    assert witnessed.sample() == expected


def test_a_broadcast_that_breaks_off_is_made_up_for_without_a_restart(
    witnessed: WitnessedFleet, policy: ModelOptions
) -> None:
    weights, asked = changed(policy, 3), list[str]()
    expected = sampled(witnessed, weights)
    witnessed.until_healthy()
    witnessed.faults.clear()

    def some_of_it(sender: Sender, made: Iterator[Bucket]) -> None:
        with meet(sender.meeting, 0, sender.size) as group:
            group.send(next(made))

    witnessed.fleet.load(broadcast(weights, asked, some_of_it), version=8)
    assert asked == ["send to 3", "again"]
    told = [fault.message for fault in witnessed.faults]
    assert len(told) == 2
    assert all("takes the weights of version 8 by another way" in message for message in told)
    tokens = [completion.token_ids for completion in witnessed.sample()]
    assert tokens == [completion.token_ids for completion in expected]


def test_who_does_not_come_to_the_meeting_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.sync.broadcast, "PATIENCE", timedelta(seconds=2))
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        list(Sender(meeting(), 2).give(iter([{"a": torch.ones(1)}])))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("injury", [Injury.KILL, Injury.STOP])
def test_a_worker_that_is_lost_while_it_receives_is_replaced_and_the_others_go_on(
    injury: Injury, witnessed: WitnessedFleet, policy: ModelOptions
) -> None:
    weights, asked = changed(policy, 4), list[str]()
    expected = sampled(witnessed, weights)
    witnessed.until_healthy()
    hurt = threading.Event()

    def hurting(sender: Sender, made: Iterator[Bucket]) -> None:
        with suppress(RuntimeError), meet(sender.meeting, 0, sender.size) as group:
            group.send(next(made))
            witnessed.injure(0, injury)
            hurt.set()
            for bucket in made:
                group.send(bucket)
            group.send({})

    witnessed.fleet.load(broadcast(weights, asked, hurting), version=7)
    assert hurt.is_set()
    assert witnessed.sample() == expected
    witnessed.fleet.wait_until_ready()
    witnessed.until_healthy()
    assert witnessed.sample() == expected
