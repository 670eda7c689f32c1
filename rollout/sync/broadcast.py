"""Weight sync by one broadcast from the learner's device to those of all rollout workers: NCCL between GPUs, gloo between CPUs.

A process group is made for each update and ended after it: rank 0 is the learner's, which sends; then come the processes of the workers. So a
worker that is lost between two updates blocks nobody, and the group takes no memory while workers sample. Nothing is kept of what was sent: a
worker that is started later gets the weights in another way (`Broadcast.again`).
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore

from rollout.sync.base import MIB, Bucket, Publisher, WeightSource, WeightSync
from rollout.sync.object_store import ObjectStoreSync
from rollout.types import NotReceivedError, PublisherDiedError, PublishError, RolloutError, WeightUpdateError
from rollout.weights import take_bucket

if TYPE_CHECKING:
    from rollout.engine import Engine

TIMEOUT = timedelta(seconds=60)
"""How long a process waits for the others, to meet and for each bucket."""
ALIGNMENT = 16


class Address(NamedTuple):
    """Where the processes of a group meet: a free port on the node of its rank 0."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class BroadcastSync(WeightSync):
    """One broadcast to all workers, in buckets of `bucket_bytes`."""

    bucket_bytes: float = 256 * MIB

    def publish(self, learner: Publisher) -> "Broadcast":
        return Broadcast(learner, self.bucket_bytes, Address(*learner.free_address()))


@dataclass(frozen=True, slots=True)
class Broadcast(WeightSource):
    """Weights that the learner sends while the workers receive them, in a group that meets at `address`."""

    learner: Publisher
    bucket_bytes: float
    address: Address
    is_kept: ClassVar[bool] = False

    def for_workers(self, workers: int, processes: int) -> Sequence[WeightSource]:
        size = 1 + workers * processes
        return [Receiver(self.address, size, 1 + processes * place) for place in range(workers)]

    def send(self, processes: int) -> None:
        if not processes:
            return
        write = partial(send_buckets, self.address, 1 + processes)
        try:
            self.learner.publish(write, self.bucket_bytes, on_device=True)
        except PublisherDiedError:
            raise
        except PublishError as error:
            # The workers notice it too, and get the weights again.
            logging.getLogger(__name__).warning("the broadcast of weights broke off: %s", error)

    def again(self) -> WeightSource:
        try:
            return ObjectStoreSync(self.bucket_bytes).publish(self.learner)
        except PublisherDiedError:
            raise RolloutError(
                "a rollout worker was lost when the learner whose weights it had was gone: they were broadcast, and nobody has "
                "them to give; start the run again, which goes on, or leave weights.transport out"
            ) from None

    def load_into(self, engine: "Engine", modules: Sequence[str] | None) -> None:
        raise NotReceivedError("a worker receives a broadcast only with a rank in its process group")


@dataclass(frozen=True, slots=True)
class Receiver(WeightSource):
    """A worker's part in a broadcast to a group of `size` processes, of which its own have the ranks from `first` on."""

    address: Address
    size: int
    first: int

    def load_into(self, engine: "Engine", modules: Sequence[str] | None) -> None:
        with engine.weight_update(modules):
            try:
                engine.everywhere(receive_weights, self)
            except WeightUpdateError:
                raise
            except Exception as error:  # its type depends on the backend, and on whether vLLM runs in this process
                reason = str(error).strip().split("\n")[0]
                raise NotReceivedError(f"the broadcast of weights broke off ({reason})") from error

    def buckets(self, process: int) -> Iterator[Bucket]:
        """Receive all tensors, one bucket at a time, in that process of the worker."""
        with meet(self.address, self.first + process, self.size) as group:
            while bucket := group.receive():
                yield bucket


def receive_weights(worker: Any, receiver: Receiver) -> None:
    """Receive an update in a vLLM worker process. Raises RuntimeError where other processes do not come, or go away."""
    for bucket in receiver.buckets(worker.rank):
        take_bucket(worker, bucket)


def send_buckets(address: Address, size: int, buckets: Iterable[Bucket]) -> Iterator[Any]:
    """Send buckets, in the process of learner rank 0, to a group of `size` processes. Yields nothing."""
    with meet(address, 0, size) as group:
        for bucket in buckets:
            group.send(bucket)
        group.send({})
    yield from ()


@contextmanager
def meet(address: Address, rank: int, size: int) -> Iterator["Group"]:
    """A process group for as long as the context. Raises RuntimeError where a process does not come, or goes away."""
    store = TCPStore(address.host, address.port, size, is_master=rank == 0, timeout=TIMEOUT)
    if device_type() == "cpu":
        yield Group(ProcessGroupGloo(store, rank, size, TIMEOUT))
        return
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    processes = ProcessGroupNCCL(store, rank, size, options)
    try:
        yield Group(processes)
    finally:
        processes.abort()


class Group:
    """The processes that have met, seen from one of them. A bucket is three broadcasts: the length of its table, the table, the tensors."""

    def __init__(self, processes: Any):
        self._processes = processes
        self._device = torch.device(device_type())

    def send(self, bucket: Bucket) -> None:
        """Send a bucket; an empty one marks the end."""
        table = json.dumps([(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in bucket.items()])
        encoded = torch.frombuffer(bytearray(table.encode()), dtype=torch.uint8).to(self._device)
        self._broadcast(torch.tensor([len(encoded) if bucket else 0], device=self._device))
        if bucket:
            self._broadcast(encoded)
            memory, views = self._allocate(json.loads(table))
            for name, tensor in bucket.items():
                views[name].copy_(tensor)
            self._broadcast(memory)

    def receive(self) -> Bucket:
        """The next bucket; an empty one at the end."""
        length = self._broadcast(torch.zeros(1, dtype=torch.int64, device=self._device))
        if not int(length):
            return {}
        encoded = self._broadcast(torch.empty(int(length), dtype=torch.uint8, device=self._device))
        memory, views = self._allocate(json.loads(bytes(encoded.tolist())))
        self._broadcast(memory)
        return views

    def _allocate(self, table: list[Any]) -> tuple[torch.Tensor, Bucket]:
        """Memory for the tensors of a table, in one piece, and a view of it for each of them."""
        spans, end = [], 0
        for name, dtype_name, shape in table:
            dtype = getattr(torch, dtype_name)
            size = dtype.itemsize * torch.Size(shape).numel()
            spans.append((name, dtype, shape, end, size))
            end += -(-size // ALIGNMENT) * ALIGNMENT
        memory = torch.empty(end, dtype=torch.uint8, device=self._device)
        return memory, {n: memory[at : at + size].view(dtype).view(shape) for n, dtype, shape, at, size in spans}

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        options = BroadcastOptions()
        options.rootRank = 0
        self._processes.broadcast([tensor], options).wait()
        return tensor


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
