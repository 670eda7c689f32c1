"""New weights travel in buckets of bounded size, and arrive in order and unchanged in every way."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rollout
from rollout import AdapterSync, BroadcastSync, DirectorySync, Fleet, ObjectStoreSync, Trajectory, WeightSync
from rollout.sync import broadcast
from rollout.sync.base import Bucket, buckets
from rollout.sync.broadcast import Address, Receiver, send_buckets

from .publisher import LocalPublisher, free_address

FLOAT = 4


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_buckets_keep_the_order_and_the_limit_but_for_a_tensor_that_is_larger(sizes: list[int], limit: int) -> None:
    tensors = [(str(place), torch.zeros(size)) for place, size in enumerate(sizes)]
    made = list(buckets(tensors, limit * FLOAT))
    assert [name for bucket in made for name in bucket] == [name for name, _ in tensors]
    for bucket in made:
        assert len(bucket) == 1 or sum(t.numel() for t in bucket.values()) <= limit
    for full, following in pairwise(made):
        filled = sum(t.numel() for t in full.values())
        assert filled + next(iter(following.values())).numel() > limit


def test_a_part_of_a_larger_tensor_travels_alone() -> None:
    whole = torch.randn(8, 4)
    for bucket in buckets(((str(i), part) for i, part in enumerate(whole)), 4 * FLOAT):
        ((name, part),) = bucket.items()
        assert torch.equal(part, whole[int(name)])
        assert part.untyped_storage().nbytes() == 4 * FLOAT


@pytest.mark.parametrize("way", ["object store", "directory"])
def test_every_reader_gets_every_tensor_until_it_is_released(ray_session: None, tmp_path: Path, way: str) -> None:
    weight_sync = ObjectStoreSync(40) if way == "object store" else DirectorySync(tmp_path / "weights", 40)
    whole = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    sent = {"a": torch.randn(7), "b": whole[1:], "c": whole.t(), "d": torch.randn(2, 2), "e": torch.tensor(1)}
    source = weight_sync.publish(LocalPublisher(sent))
    for _ in range(2):
        read = {name: tensor for bucket in source.buckets() for name, tensor in bucket.items()}
        assert sorted(read) == sorted(sent)
        assert all(torch.equal(read[name], sent[name]) and read[name].dtype == sent[name].dtype for name in sent)
    source.release()
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.fixture
def meetings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks that have met the others of their group, each time that they did."""
    made, ranks = broadcast.new_group, list[int]()

    def new_group(address: Address, rank: int, size: int) -> broadcast.Group:
        ranks.append(rank)
        return made(address, rank, size)

    monkeypatch.setattr(broadcast, "new_group", new_group)
    return ranks


def received(where: Address, receivers: int, sent: list[Bucket]) -> list[list[Bucket]]:
    """What each of the receivers gets of buckets that are sent to a group of them."""
    with ThreadPoolExecutor(receivers) as threads:
        found = [
            threads.submit(lambda n: list(Receiver(where, 1 + receivers, 1).buckets(n)), n) for n in range(receivers)
        ]
        assert list(send_buckets(where, 1 + receivers, sent)) == []
        return [future.result() for future in found]


@pytest.mark.parametrize("receivers", [1, 3])
def test_every_receiver_gets_every_tensor_in_the_buckets_that_were_sent(receivers: int) -> None:
    random = Random(receivers)
    shapes = [[random.randint(0, 9) for _ in range(random.randint(0, 3))] for _ in range(20)]
    dtypes = [random.choice([torch.float32, torch.bfloat16, torch.int64, torch.bool]) for _ in shapes]
    sent = {str(i): torch.randn(shape).to(dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))}
    made = list(buckets(sent.items(), 100))
    for got in received(free_address(), receivers, made):
        assert [list(bucket) for bucket in got] == [list(bucket) for bucket in made]
        for name, tensor in ((name, tensor) for bucket in got for name, tensor in bucket.items()):
            assert torch.equal(tensor, sent[name])
            assert tensor.dtype == sent[name].dtype


def test_a_group_meets_once_for_many_updates_and_ends_when_another_meets(meetings: list[int]) -> None:
    where = free_address()
    for number in range(3):
        for got in received(where, 2, [{"a": torch.full([2], number)}]):
            assert got[0]["a"].tolist() == [number, number]
    assert sorted(meetings) == [0, 1, 2]
    received(other := free_address(), 1, [])
    assert {address for address, *_ in broadcast._groups} == {other}


@pytest.mark.timeout(30)
def test_a_group_that_fails_at_one_of_its_members_ends_for_all_and_is_not_used_again(meetings: list[int]) -> None:
    def breaking() -> Iterator[Bucket]:
        yield {"a": torch.ones(1)}
        raise OSError("the learner failed")

    where = free_address()
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(lambda: list(Receiver(where, 2, 1).buckets(0)))
        with pytest.raises(OSError, match="the learner failed"):
            list(send_buckets(where, 2, breaking()))
        with pytest.raises(RuntimeError):
            found.result()
    assert where not in {address for address, *_ in broadcast._groups}
    assert len(received(free_address(), 1, [{"a": torch.ones(1)}])) == 1


def test_who_does_not_come_to_the_meeting_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "TIMEOUT", timedelta(seconds=2))
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        list(send_buckets(free_address(), 2, [{"a": torch.ones(1)}]))


def test_a_gpu_that_is_not_done_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "TIMEOUT", timedelta(seconds=0.05))
    done = iter([False, False, True])
    broadcast.wait_for(lambda: next(done))
    with pytest.raises(RuntimeError, match=r"did not take part within 0\.05 s"):
        broadcast.wait_for(lambda: False)


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("Adapters", AdapterSync),
        ("Broadcasts", BroadcastSync),
        ("Completion", Trajectory),
        ("Directory", DirectorySync),
        ("ObjectStore", ObjectStoreSync),
        ("Transport", WeightSync),
    ],
)
def test_former_names_still_mean_the_same_and_are_warned_of(name: str, now: type) -> None:
    with pytest.warns(DeprecationWarning, match=f"rollout.{name} is rollout.{now.__name__} now"):
        assert getattr(rollout, name) is now
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rollout.Nothing


def test_the_former_module_still_has_its_names() -> None:
    from rollout.transport import MIB, WeightOptions, buckets, stored

    assert (MIB, WeightOptions, stored) == (2**20, rollout.WeightOptions, rollout.stored)
    assert buckets is rollout.sync.base.buckets


def test_former_methods_of_a_fleet_are_warned_of() -> None:
    fleet = object.__new__(Fleet)
    for name, now in (("generate", "sample"), ("sleep", "offload"), ("wake", "onload")):
        with pytest.warns(DeprecationWarning, match=f"Fleet.{name} is Fleet.{now} now"):
            assert getattr(fleet, name) == getattr(fleet, now)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fleet.nothing
