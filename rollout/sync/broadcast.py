"""New weights from a learner to all rollout workers at once, from device to device: NCCL between GPUs, gloo between CPUs.

A group of processes meets for one update and parts after it: rank 0 is the learner's, which sends, then come the processes of the
workers. So a worker that is lost between two updates is in nobody's way, and nothing of the group takes memory while workers sample.
What nobody receives any more is gone: a worker that comes later gets the weights by another way (`Broadcast.again`).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore

from rollout.sync.base import MIB, Bucket, WeightSource

PATIENCE = timedelta(seconds=60)
"""How long a process waits for the others, to meet and for each bucket."""
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Broadcasts:
    """This way to send weights, in buckets of so many bytes."""

    bucket_bytes: float = 256 * MIB


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a group meets: a free port on the node of its rank 0."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Broadcast:
    """An update that is sent while the workers receive it; driver's end.

    `send` lets the learner send to a group of so many processes, itself included; `again` gives the same weights to whoever did not
    receive them.
    """

    meeting: Meeting
    send: Callable[[int], None]
    again: Callable[[], WeightSource]

    def release(self) -> None:
        """Nothing was kept."""


@dataclass(frozen=True, slots=True)
class Sender:
    """The learner's end. It gives nothing to the driver."""

    meeting: Meeting
    size: int
    bucket_bytes: float = 256 * MIB

    @property
    def device(self) -> str:
        return device_type()

    def give(self, buckets: Iterable[Bucket]) -> Iterator[Any]:
        with meet(self.meeting, 0, self.size) as group:
            for bucket in buckets:
                group.send(bucket)
            group.send({})
        yield from ()


@dataclass(frozen=True, slots=True)
class Receiver:
    """A worker's end; its processes have the ranks from `first` on."""

    meeting: Meeting
    size: int
    first: int

    def buckets(self, process: int) -> Iterator[Bucket]:
        """All tensors, a bucket at a time, for that process of the worker."""
        with meet(self.meeting, self.first + process, self.size) as group:
            while bucket := group.receive():
                yield bucket


@contextmanager
def meet(meeting: Meeting, rank: int, size: int) -> Iterator["Group"]:
    """Meet the others, and part from them afterwards. Raises RuntimeError where one does not come, or goes away."""
    store = TCPStore(meeting.host, meeting.port, size, is_master=rank == 0, timeout=PATIENCE)
    if device_type() == "cpu":
        yield Group(ProcessGroupGloo(store, rank, size, PATIENCE))
        return
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = PATIENCE
    processes = ProcessGroupNCCL(store, rank, size, options)
    try:
        yield Group(processes)
    finally:
        processes.abort()


class Group:
    """The processes that have met, as seen by one of them. A bucket is three broadcasts: how long its table is, the table, the tensors."""

    def __init__(self, processes: Any):
        self._processes = processes
        self._device = torch.device(device_type())

    def send(self, bucket: Bucket) -> None:
        """Send a bucket; an empty one is the end."""
        table = json.dumps([(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in bucket.items()])
        encoded = torch.frombuffer(bytearray(table.encode()), dtype=torch.uint8).to(self._device)
        self._broadcast(torch.tensor([len(encoded) if bucket else 0], device=self._device))
        if bucket:
            self._broadcast(encoded)
            together, views = self._room(json.loads(table))
            for name, tensor in bucket.items():
                views[name].copy_(tensor)
            self._broadcast(together)

    def receive(self) -> Bucket:
        """The next bucket; an empty one at the end."""
        length = self._broadcast(torch.zeros(1, dtype=torch.int64, device=self._device))
        if not int(length):
            return {}
        encoded = self._broadcast(torch.empty(int(length), dtype=torch.uint8, device=self._device))
        together, views = self._room(json.loads(bytes(encoded.tolist())))
        self._broadcast(together)
        return views

    def _room(self, table: list[Any]) -> tuple[torch.Tensor, Bucket]:
        """Memory for the tensors of a table, in one piece, and each of them in it."""
        places, end = [], 0
        for name, dtype_name, shape in table:
            dtype = getattr(torch, dtype_name)
            size = dtype.itemsize * torch.Size(shape).numel()
            places.append((name, dtype, shape, end, size))
            end += -(-size // ALIGNMENT) * ALIGNMENT
        together = torch.empty(end, dtype=torch.uint8, device=self._device)
        return together, {n: together[at : at + size].view(dtype).view(shape) for n, dtype, shape, at, size in places}

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        options = BroadcastOptions()
        options.rootRank = 0
        self._processes.broadcast([tensor], options).wait()
        return tensor


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
