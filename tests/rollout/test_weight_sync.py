"""New weights travel in buckets of bounded size, and arrive in order and unchanged in every way."""

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
import rollout.sync.broadcast
from rollout import AdapterSync, BroadcastSync, DirectorySync, Fleet, ObjectStoreSync, Trajectory, WeightSync
from rollout.sync.base import buckets
from rollout.sync.broadcast import Receiver, send_buckets

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


@pytest.mark.parametrize("receivers", [1, 3])
def test_every_receiver_gets_every_tensor_in_the_buckets_that_were_sent(receivers: int) -> None:
    random = Random(receivers)
    shapes = [[random.randint(0, 9) for _ in range(random.randint(0, 3))] for _ in range(20)]
    dtypes = [random.choice([torch.float32, torch.bfloat16, torch.int64, torch.bool]) for _ in shapes]
    sent = {str(i): torch.randn(shape).to(dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))}
    made = list(buckets(sent.items(), 100))
    where, size = free_address(), 1 + receivers
    with ThreadPoolExecutor(receivers) as threads:
        found = [threads.submit(lambda n: list(Receiver(where, size, 1).buckets(n)), n) for n in range(receivers)]
        assert list(send_buckets(where, size, made)) == []
        for received in (future.result() for future in found):
            assert [list(bucket) for bucket in received] == [list(bucket) for bucket in made]
            for name, tensor in ((name, tensor) for bucket in received for name, tensor in bucket.items()):
                assert torch.equal(tensor, sent[name])
                assert tensor.dtype == sent[name].dtype


def test_who_does_not_come_to_the_meeting_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.sync.broadcast, "TIMEOUT", timedelta(seconds=2))
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        list(send_buckets(free_address(), 2, [{"a": torch.ones(1)}]))


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
