"""New weights travel in buckets of bounded size, and arrive in order and unchanged by either way."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.sync.base import Directory, ObjectStore, Transport, buckets

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
    import ray

    transport: Transport = ObjectStore(40) if way == "object store" else Directory(tmp_path / "weights", 40)
    whole = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    sent = {"a": torch.randn(7), "b": whole[1:], "c": whole.t(), "d": torch.randn(2, 2), "e": torch.tensor(1)}
    references = [ray.put(given) for given in transport.give(buckets(sent.items(), transport.bucket_bytes))]
    source = transport.source(references)
    for _ in range(2):
        read = {name: tensor for bucket in source.buckets() for name, tensor in bucket.items()}
        assert sorted(read) == sorted(sent)
        assert all(torch.equal(read[name], sent[name]) and read[name].dtype == sent[name].dtype for name in sent)
    source.release()
    assert list(tmp_path.rglob("*.safetensors")) == []
