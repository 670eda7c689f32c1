"""Weight sync by one broadcast from the learner's device to those of all rollout workers: NCCL between GPUs, gloo between CPUs.

Rank 0 of the process group is the learner's, which sends; then come the processes of the workers. The group stays for the next update while the
same workers serve, and none of them has missed anything; else the processes meet anew, so that a worker that was lost between two updates blocks
nobody. Nothing is kept of what was sent: a worker that is started later gets the weights in another way (`Broadcast.again`).
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
POLL_S = 0.0005


class Address(NamedTuple):
    """Where the processes of a group meet: a free port on the node of its rank 0."""

    host: str
    port: int


class Meeting(NamedTuple):
    """A process group that is whole: where it met, and who is in it."""

    address: Address
    members: tuple[Any, ...]


@dataclass(slots=True)
class BroadcastSync(WeightSync):
    """One broadcast to all workers, in buckets of `bucket_bytes`. `last` is the group of the last update, None where the next needs another."""

    bucket_bytes: float = 256 * MIB
    last: Meeting | None = field(default=None, compare=False)

    def publish(self, learner: Publisher) -> "Broadcast":
        return Broadcast(learner, self.bucket_bytes, Address(*learner.free_address()), self)


@dataclass(slots=True)
class Broadcast(WeightSource):
    """Weights that the learner sends while the workers receive them, in the group of the last update or one that meets at `address`."""

    learner: Publisher
    bucket_bytes: float
    address: Address
    sync: BroadcastSync = field(default_factory=BroadcastSync)
    is_kept: ClassVar[bool] = False

    def for_workers(self, workers: Sequence[Any], processes: int) -> Sequence[WeightSource]:
        members = (self.learner, processes, *workers)
        if self.sync.last is None or self.sync.last.members != members:
            self.sync.last = Meeting(self.address, members)
        self.address = self.sync.last.address
        size = 1 + len(workers) * processes
        return [Receiver(self.address, size, 1 + processes * place) for place in range(len(workers))]

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
            self.sync.last = None
            logging.getLogger(__name__).warning("the broadcast of weights broke off: %s", error)

    def again(self) -> WeightSource:
        self.sync.last = None
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
    """The process group of those who meet at `address`, or have met there before. Raises RuntimeError where a process does not come, or goes away.

    It stays open for the next update; where the context fails it is aborted, as is every group of another address: somebody in it is lost.
    """
    member = (address, rank, size)
    for other in [other for other in _groups if other[0] != address]:
        leave(other)
    if member not in _groups:
        _groups[member] = new_group(*member)
    try:
        yield _groups[member]
    except BaseException:
        leave(member)
        raise


def leave(member: "Member") -> None:
    """Abort a group of this process, if it is still in it."""
    if group := _groups.pop(member, None):
        group.abort()


def new_group(address: Address, rank: int, size: int) -> "Group":
    """Meet the other processes. Raises RuntimeError where one does not come."""
    store = TCPStore(address.host, address.port, size, is_master=rank == 0, timeout=TIMEOUT)
    if not torch.cuda.is_available():
        return Group(Gloo(store, rank, size), torch.device("cpu"))
    device = torch.device("cuda", torch.cuda.current_device())
    return Group(Nccl(store, rank, size, device), device)


class Gloo:
    """Processes on CPUs."""

    def __init__(self, store: TCPStore, rank: int, size: int):
        self._processes: Any = ProcessGroupGloo(store, rank, size, TIMEOUT)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send the tensor from rank 0, or receive it. Raises RuntimeError."""
        options = BroadcastOptions()
        options.rootRank = 0
        self._processes.broadcast([tensor], options).wait()

    def abort(self) -> None:
        """Close the connections."""
        del self._processes


class Nccl:
    """Processes on GPUs, by vLLM's handle of NCCL: torch's ends the process, in the end, where others are waited for in vain."""

    def __init__(self, store: TCPStore, rank: int, size: int, device: torch.device):
        with torch_kept_as_it_is(device):
            from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
            from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

            if rank == 0:
                store.set("id", bytes(NCCLLibrary().ncclGetUniqueId().internal).hex())
            self._processes = PyNcclCommunicator.from_unique_id_bytes(
                bytes.fromhex(store.get("id").decode()), rank, size, device
            )

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send the tensor from rank 0, or receive it; returns when this GPU has. Raises RuntimeError.

        By then no other broadcast or reduction of this process, DeepSpeed's or vLLM's, has begun: NCCL's must not run side by side.
        """
        stream = torch.cuda.current_stream()
        self._processes.broadcast(tensor, 0, stream)
        wait_for(stream.record_event().query)

    def abort(self) -> None:
        """End what is under way on the GPU, and close the connections."""
        self._processes.destroy()


@contextmanager
def torch_kept_as_it_is(device: torch.device) -> Iterator[None]:
    """A block in which vLLM is imported and used, after which a learner computes as before: on the same stream, with the same kernels for attention."""
    stream, has_cudnn = torch.cuda.current_stream(device), torch.backends.cuda.cudnn_sdp_enabled()
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn)


def wait_for(is_done: Callable[[], bool]) -> None:
    """Return when it is. Raises RuntimeError after TIMEOUT."""
    end = time.monotonic() + TIMEOUT.total_seconds()
    while not is_done():
        if time.monotonic() > end:
            raise RuntimeError(f"the other processes did not take part within {TIMEOUT.total_seconds():g} s")
        time.sleep(POLL_S)


class Group:
    """The processes that have met, seen from one of them. A bucket is three broadcasts: the length of its table, the table, the tensors."""

    def __init__(self, processes: Gloo | Nccl, device: torch.device):
        self._processes, self._device = processes, device
        self.abort = processes.abort

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
        self._processes.broadcast(tensor)
        return tensor


Member = tuple[Address, int, int]
"""A group by its address, and a rank and the number of processes in it."""
_groups: dict[Member, Group] = {}
"""The groups that this process is in."""
