"""How new weights travel from a learner to the rollout workers: in buckets of bounded size, through Ray's object store or files.

An adapter may travel alone, as the files that PEFT writes: then vLLM adds it to the weights that the workers began with.

A transport has two ends. In the learner it is given one bucket after the other, and what it makes of a bucket comes to the driver as
a reference; from the references the driver makes a source, and each worker reads the buckets from that, one at a time. So no process
holds more of the model than a bucket.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol
from uuid import uuid4

import torch
from pydantic import BaseModel, ConfigDict, Field

Bucket = dict[str, torch.Tensor]
NamedTensors = Iterable[tuple[str, torch.Tensor]]
MIB = 2**20


class WeightSource(Protocol):
    """The tensors of an update under checkpoint names. They can be read until `release`, by as many as want to."""

    def buckets(self) -> Iterator[Bucket]:
        """All tensors, a bucket at a time."""

    def release(self) -> None:
        """Take away what was kept for readers."""


class Sending(Protocol):
    """The learner's end of a way for weights to travel, in buckets of `bucket_bytes` at most, or of one tensor that is larger."""

    @property
    def bucket_bytes(self) -> float: ...

    @property
    def device(self) -> str:
        """Where it takes them."""

    def give(self, buckets: Iterable[Bucket]) -> Iterator[Any]:
        """Called in the learner; each thing that it yields goes to the driver by reference."""


class Transport(Sending, Protocol):
    """A way on which weights can rest, for workers to fetch them."""

    def source(self, given: Sequence[Any]) -> WeightSource:
        """Called in the driver with the references to what `give` returned, in order."""


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


def buckets(named_tensors: NamedTensors, limit: float) -> Iterator[Bucket]:
    """Tensors in order, as many together as fit into `limit` bytes, and at least one. They own their memory, and no more."""
    bucket: Bucket = {}
    filled = 0
    for name, tensor in named_tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and filled + size > limit:
            yield bucket
            bucket, filled = {}, 0
        # What is a part of a larger tensor would be pickled with all of that.
        is_part = tensor.untyped_storage().nbytes() > size
        bucket[name] = tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor.contiguous()
        filled += size
    if bucket:
        yield bucket


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Through Ray's object store: a bucket is copied into shared memory, and across nodes where a worker is on another."""

    bucket_bytes: float = 256 * MIB
    device: ClassVar[str] = "cpu"

    def give(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        yield from buckets

    def source(self, given: Sequence[Any]) -> "StoredWeights":
        return StoredWeights(given)


@dataclass(slots=True)
class StoredWeights:
    """Buckets in Ray's object store, which keeps them as long as there are references to them."""

    references: Sequence[Any]

    def buckets(self) -> Iterator[Bucket]:
        import ray

        yield from map(ray.get, self.references)

    def release(self) -> None:
        self.references = ()


def stored(named_tensors: Mapping[str, torch.Tensor]) -> StoredWeights:
    """Tensors of this process, in Ray's object store."""
    import ray

    return StoredWeights([ray.put(dict(named_tensors))])


@dataclass(frozen=True, slots=True)
class Directory:
    """Through files: a bucket is a safetensors file in a directory that learners and workers share."""

    path: Path
    bucket_bytes: float = 256 * MIB
    device: ClassVar[str] = "cpu"

    def give(self, buckets: Iterable[Bucket]) -> Iterator[Path]:
        from safetensors.torch import save_file

        self.path.mkdir(parents=True, exist_ok=True)
        for bucket in buckets:
            file = self.path / f"{uuid4().hex}.safetensors"
            save_file(bucket, file)
            yield file

    def source(self, given: Sequence[Any]) -> "WeightFiles":
        import ray

        return WeightFiles(ray.get(list(given)))


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Buckets in safetensors files."""

    files: Sequence[Path]

    def buckets(self) -> Iterator[Bucket]:
        from safetensors.torch import load_file

        yield from map(load_file, self.files)

    def release(self) -> None:
        for file in self.files:
            file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Adapters:
    """As an adapter alone: a directory in `path` for each update. The workers must have the learner's base."""

    path: Path


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A directory with a LoRA adapter as PEFT writes it. It takes the place of the adapter before."""

    directory: Path

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))

    def release(self) -> None:
        """Remove it."""
        shutil.rmtree(self.directory, ignore_errors=True)
