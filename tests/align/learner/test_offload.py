"""What leaves a device for the CPU's memory gives its memory back, and comes back where it was. A CPU is the device here."""

import copy
from collections import deque
from typing import Any

import pytest
import torch

from align.learner import offload
from align.learner.engine import environment
from align.learner.offload import HostMemory, storages


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """Host memory in chunks smaller than some of what goes there."""
    monkeypatch.setattr(offload, "CHUNK", 1024)
    return HostMemory(torch.device("cpu"))


def test_tensors_are_gone_and_come_back_with_their_views_and_aliases(host: HostMemory) -> None:
    flat = torch.randn(1000)
    view, transposed = flat[10:20], flat.view(10, 100).T
    small = torch.arange(3, dtype=torch.uint8)
    before = copy.deepcopy([flat, view, transposed, small])
    host.offload([flat, small])
    assert [t.untyped_storage().nbytes() for t in (flat, view, transposed, small)] == [0] * 4
    host.onload()
    assert all(torch.equal(now, then) for now, then in zip((flat, view, transposed, small), before, strict=True))
    view.zero_()
    assert flat[10:20].eq(0).all()
    assert transposed.data_ptr() == flat.data_ptr()


def test_host_memory_is_allocated_once(host: HostMemory) -> None:
    held = [torch.randn(n) for n in (700, 3, 500)]
    addresses = []
    for _ in range(3):
        host.offload(held)
        host.onload()
        addresses.append([chunk.data_ptr() for chunk in host._chunks])
    assert addresses == [addresses[0]] * 3
    assert len(addresses[0]) == 6  # 2,800 bytes and 2,000, and the next multiple of 512 after 12


def test_scratch_is_not_copied(host: HostMemory) -> None:
    kept, scratch = torch.ones(10), torch.ones(100_000)
    host.offload([kept, scratch], scratch=[scratch])
    assert (scratch.untyped_storage().nbytes(), len(host._chunks)) == (0, 1)
    host.onload()
    assert kept.eq(1).all()
    scratch.zero_()


def test_a_module_its_gradients_and_its_optimizer_are_found() -> None:
    layer = torch.nn.BatchNorm1d(4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    shard = vars(layer.weight)["ds_tensor"] = torch.zeros(5)  # where DeepSpeed keeps it
    state = optimizer.state[layer.weight]
    expected: list[Any] = [layer.weight, layer.bias.grad, layer.running_mean, shard, state["exp_avg_sq"]]
    for holders in ([layer, optimizer], [{"a": deque([(optimizer, layer)])}]):
        found = {storage.data_ptr() for storage in storages(*holders)}
        assert found >= {tensor.data_ptr() for tensor in expected}


def test_a_tensor_of_a_file_or_another_library_is_left_alone(host: HostMemory) -> None:
    borrowed = torch.frombuffer(bytearray(8), dtype=torch.int64)
    host.offload(borrowed)
    assert borrowed.tolist() == [0]


def test_ranks_on_gpus_have_segments_that_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment(0, 1, 1)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert environment(0, 1, 1)["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment(0, 1, 1)
