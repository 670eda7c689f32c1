"""What a fleet does about weights that are broadcast, when workers are lost or do not receive all, without Ray or vLLM."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from rollout import RolloutError, State
from rollout.sync.broadcast import Address, Broadcast, BroadcastSync, Receiver
from rollout.sync.object_store import StoredWeights
from rollout.types import NotReceivedError, PublisherDiedError

from .world import OPTIONS, World

pytestmark = pytest.mark.usefixtures("killed")


@dataclass
class FakeLearner:
    """Publishes nothing, and says how often it was asked to."""

    published: list[str] = field(default_factory=list)
    is_gone: bool = False

    def publish(self, write: Callable[..., Any], bucket_bytes: float, *, on_device: bool = False) -> Any:
        if self.is_gone:
            raise PublisherDiedError
        self.published.append("broadcast" if on_device else "stored")
        return []


def broadcast(learner: Any) -> Broadcast:
    return Broadcast(learner, 100, Address("host", 1))


def test_the_same_members_stay_a_group_and_others_meet_anew() -> None:
    world, learner, sync = World().started(), FakeLearner(), BroadcastSync()
    offered = iter(range(1, 100))

    def met(after: Callable[[], Any] = lambda: None) -> list[int]:
        """Where the workers meet for an update, of which the publisher offers 1, 2, ... in turn; `after` it has begun, something may happen."""
        source = Broadcast(learner, 100, Address("host", next(offered)), sync)
        world.update(1, source)
        parts = [world.source(number) for number, state in enumerate(world.states()) if state is State.STALE]
        after()
        for number in range(2):
            if world.doing(number) == "load":
                world.end(number)
        world.supervisor.renew()
        world.tick()
        for number in range(2):
            while world.doing(number) in ("start", "load"):
                world.end(number)
        return [part.address.port for part in parts if isinstance(part, Receiver)]

    assert met() == [1, 1]
    assert met() == [1, 1]
    assert met(lambda: world.end(0, NotReceivedError("connection closed"))) == [1, 1]
    assert met() == [4, 4]
    world.die(1)
    assert met() == [5]
    assert met() == [6, 6]
    learner = FakeLearner()
    assert met() == [7, 7]
    assert met(lambda: world.die(0)) == [7, 7]
    assert met() == [9, 9]


def test_the_workers_that_serve_receive_a_broadcast_and_one_that_starts_later_gets_it_again_once() -> None:
    world, learner = World(OPTIONS.model_copy(update={"workers": 3, "tensor_parallel": 2})).started(), FakeLearner()
    world.die(1)
    update = world.update(1, broadcast(learner))
    assert update.receiving.get_nowait() == 4
    parts = [world.source(number) for number in (0, 2)]
    assert parts == [Receiver(Address("host", 1), 5, 1), Receiver(Address("host", 1), 5, 3)]
    world.supervisor.renew()
    assert learner.published == []
    world.end(1)
    assert world.doing(1) is None
    world.supervisor.renew()
    world.supervisor._spent = update  # as where the worker looked for it at that moment
    world.supervisor.renew()
    world.tick()
    assert learner.published == ["stored"]
    assert isinstance(world.source(1), StoredWeights)
    world.die(0)
    world.end(0)
    assert world.doing(0) == "load"
    assert learner.published == ["stored"]


def test_a_worker_that_did_not_receive_all_gets_it_another_way_without_a_restart() -> None:
    world, learner = World().started(), FakeLearner()
    world.update(1, broadcast(learner))
    world.end(0, NotReceivedError("connection closed"))
    world.end(1)
    assert world.faults() == ["0 takes the weights of version 1 by another way: connection closed"]
    assert world.loaded.empty()
    world.supervisor.renew()
    world.tick()
    world.end(0)
    assert world.loaded.get_nowait() is None
    assert len(world.actors) == 2


def test_weights_that_nobody_has_any_more_are_an_error_that_says_so() -> None:
    world, learner = World().started(), FakeLearner(is_gone=True)
    world.update(1, broadcast(learner))
    world.end(0)
    world.die(1)
    world.end(1)
    with pytest.raises(RolloutError, match="they were broadcast, and nobody has"):
        world.supervisor.renew()
