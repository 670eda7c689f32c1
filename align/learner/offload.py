"""Moving all that a rank holds on its GPU to the CPU's memory, and back to where it was.

A storage gives its memory back and keeps its identity: a tensor stays a view of the storage that it was a view of. So nothing here has to
know which flat buffers, shards and fragments DeepSpeed keeps of the same numbers. DeepSpeed 0.19's `offload_states` moves them one attribute
at a time: under ZeRO-3 it takes its own fused Adam alone and drops gradients that wait for an update, it leaves frozen parameters on the GPU,
and it pins host memory anew for every move, each tensor rounded up to a power of two.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

CHUNK = 2**28
"""Bytes of host memory that are pinned as one: a power of two, to which PyTorch rounds them up."""
ALIGNMENT = 512
"""Bytes; PyTorch's own on a GPU."""


class HostMemory:
    """The CPU's memory for what leaves a device. It is allocated once, pinned where the device is a GPU, and kept for the next time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._chunks: list[torch.Tensor] = []
        self._away: list[tuple[torch.UntypedStorage, int]] = []
        self._copied: list[torch.UntypedStorage] = []

    def offload(self, *holders: Any, scratch: Any = ()) -> None:
        """Copy what the tensors below `holders` contain, and free their memory on the device: until `onload` they cannot be used.

        What is below `scratch` gets its memory back without what it contained.
        """
        # A storage that cannot be resized is a mapped file's or another library's: there is none on a GPU.
        found = [s for s in storages(*holders) if s.device.type == self._device.type and s.nbytes() and s.resizable()]
        forgotten = {storage._cdata for storage in storages(scratch)}
        self._away = [(storage, storage.nbytes()) for storage in found]
        self._copied = [storage for storage in found if storage._cdata not in forgotten]
        for on_device, on_host in self._pieces():
            on_host.copy_(on_device, non_blocking=True)
        self._synchronize()
        for storage in found:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Give the tensors memory on the device again, and what they contained."""
        for storage, size in self._away:
            storage.resize_(size)
        for on_device, on_host in self._pieces():
            on_device.copy_(on_host, non_blocking=True)
        self._synchronize()
        self._away, self._copied = [], []

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What is copied, as bytes [N] uint8 on the device beside their place on the host; no piece goes over the end of a chunk."""
        place = 0
        for storage in self._copied:
            content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            room = CHUNK - place % CHUNK
            for piece in filter(len, (content[:room], *content[room:].split(CHUNK))):
                number, start = divmod(place, CHUNK)
                if number == len(self._chunks):
                    pinned = self._device.type == "cuda"
                    self._chunks.append(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned))
                yield piece, self._chunks[number][start : start + len(piece)]
                place += len(piece)
            place += -place % ALIGNMENT

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def storages(*holders: Any) -> list[torch.UntypedStorage]:
    """The storage of every tensor below `holders`, each once.

    That is what containers hold, and the attributes of modules, optimizers, tensors (their gradients too) and objects of DeepSpeed's.
    """
    found: dict[int, torch.UntypedStorage] = {}
    seen: dict[int, Any] = {}  # by id, and kept, or another object could get the id
    waiting = list(holders)
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen[id(held)] = held
        if isinstance(held, torch.Tensor):
            storage = held.untyped_storage()
            found[storage._cdata] = storage
            waiting.append(held.grad if held.is_leaf else None)
        elif isinstance(held, Mapping):
            waiting += [*held.keys(), *held.values()]
        elif isinstance(held, list | tuple | set | deque):
            waiting += held
        ours = isinstance(held, torch.Tensor | torch.nn.Module | torch.optim.Optimizer)
        if ours or type(held).__module__.startswith("deepspeed."):
            waiting += vars(held).values() if hasattr(held, "__dict__") else ()
    return list(found.values())
