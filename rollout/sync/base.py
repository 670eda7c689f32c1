"""Weight sync: how new weights travel from a learner to the rollout workers.

A learner publishes its weights through a `WeightSync` and gets a `WeightSource`, from which each rollout worker loads them. Tensors have checkpoint
names and travel in buckets of bounded size, so that no process ever holds more of the model than one bucket besides its own copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from rollout.engine import Engine

Bucket = dict[str, torch.Tensor]
WriteBuckets = Callable[[Iterator[Bucket]], Iterable[Any]]
"""Takes all buckets in the process of learner rank 0; what it yields goes to Ray's object store, for the driver."""
MIB = 2**20
Precision = Literal["model", "bfloat16", "int8", "fp8"]


class WeightOptions(BaseModel):
    """How new weights go from the learner to the rollout workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    transport: Literal["object_store", "broadcast", "directory", "adapter"] = Field(
        "object_store",
        description="object_store: Ray's shared memory (/dev/shm holds the weights twice, and spills to disk); broadcast: from the learner's "
        "device to all workers' at once (NCCL between GPUs, of which each process then needs its own; gloo between CPUs); directory: safetensors files "
        "in the run directory, which all nodes must then share; adapter: only the files of learner.lora's adapter, there too, which vLLM "
        "adds by itself (on a CPU for models without experts)",
    )
    bucket_mb: float = Field(
        256, gt=0, description="MiB that are in the memory of a process at a time; a larger tensor goes alone"
    )
    precision: Precision = Field(
        "model",
        description="GRPO: grid that weights are rounded to before they are sent, as ordinary tensors of model.dtype: none; bfloat16; int8 by output "
        "channel, or fp8 (e4m3) by blocks of 128 x 128, of all matrices but routers, embeddings and head",
    )


class Publisher(Protocol):
    """What a learner offers to a weight sync. Where it fails it raises PublishError, PublisherDiedError where its process is gone."""

    def publish(self, write: WriteBuckets, bucket_bytes: float, *, on_device: bool = False) -> list[Any]:
        """Have rank 0 call `write` with the trained weights, in buckets of `bucket_bytes` at most or of one tensor that is larger.

        They are on the rank's own device with `on_device`, else on the CPU. A LoRA adapter goes beside the weights that it adapts.
        Returns Ray references to what `write` yields.
        """

    def save_adapter(self, directory: Path) -> None:
        """Write the LoRA adapter alone to `directory`, as PEFT does."""

    def free_address(self) -> tuple[str, int]:
        """A host and a port on the node of rank 0 at which nothing listens yet."""


class WeightSync(ABC):
    """A way for weights to travel from a learner to the rollout workers."""

    keeps_adapter: ClassVar[bool] = False
    """Whether a LoRA adapter arrives exactly as it is trained, never added to weights."""

    @abstractmethod
    def publish(self, learner: Publisher) -> WeightSource:
        """Return the learner's current weights for `Fleet.load`."""


class WeightSource(ABC):
    """New weights as the driver holds them until the next update, and as each rollout worker loads them.

    The methods with a default are for weights that do not wait to be fetched (see `Broadcast`).
    """

    is_kept: ClassVar[bool] = True
    """Whether a worker that is started later can load them too."""

    @property
    def sent_bytes(self) -> int | None:
        """Bytes that go to each worker, where they are not those of the trained parameters."""
        return None

    @abstractmethod
    def load_into(self, engine: Engine, modules: Sequence[str] | None) -> None:
        """Called in a rollout worker: write the weights into its engine. Raises WeightUpdateError, NotReceivedError."""

    def for_workers(self, workers: Sequence[Any], processes: int) -> Sequence[WeightSource]:
        """What each of the workers that serve now, known by their actors and of so many processes each, is to load."""
        return [self] * len(workers)

    def send(self, processes: int) -> None:  # noqa: B027
        """Called in the driver while the workers, of so many processes together, begin to load."""

    def again(self) -> WeightSource:
        """The same weights for a worker that did not get them with the others. Called in the driver."""
        return self

    def release(self) -> None:  # noqa: B027
        """Free what was kept for the workers; the source cannot be loaded any more."""


class BucketSource(WeightSource):
    """Weights that are stored bucket by bucket where every worker can read them."""

    @abstractmethod
    def buckets(self) -> Iterator[Bucket]:
        """Read all tensors, one bucket at a time."""

    def load_into(self, engine: Engine, modules: Sequence[str] | None) -> None:
        with engine.weight_update(modules):
            for bucket in self.buckets():
                engine.take(bucket)


def buckets(named_tensors: Iterable[tuple[str, torch.Tensor]], limit: float) -> Iterator[Bucket]:
    """Put tensors, in order, into buckets of at most `limit` bytes and at least one tensor. Each tensor owns its memory, and no more."""
    bucket: Bucket = {}
    filled = 0
    for name, tensor in named_tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and filled + size > limit:
            yield bucket
            bucket, filled = {}, 0
        # A view of a larger tensor would be pickled together with all of it.
        is_view = tensor.untyped_storage().nbytes() > size
        bucket[name] = tensor.clone(memory_format=torch.contiguous_format) if is_view else tensor.contiguous()
        filled += size
    if bucket:
        yield bucket
