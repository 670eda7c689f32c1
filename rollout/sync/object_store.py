"""Weight sync through Ray's object store: a bucket is copied into shared memory, and to other nodes where workers are there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rollout.sync.base import MIB, Bucket, BucketSource, Publisher, WeightSync


@dataclass(frozen=True, slots=True)
class ObjectStoreSync(WeightSync):
    """Weights in Ray's object store, in buckets of `bucket_bytes`."""

    bucket_bytes: float = 256 * MIB

    def publish(self, learner: Publisher) -> "StoredWeights":
        return StoredWeights(learner.publish(iter, self.bucket_bytes))


@dataclass(slots=True)
class StoredWeights(BucketSource):
    """Buckets in Ray's object store, which keeps them as long as there are references to them."""

    references: Sequence[Any]

    def buckets(self) -> Iterator[Bucket]:
        import ray

        yield from map(ray.get, self.references)

    def release(self) -> None:
        self.references = ()


def stored(named_tensors: Mapping[str, torch.Tensor]) -> StoredWeights:
    """Put tensors of this process, under checkpoint names, into Ray's object store, for `Fleet.load`."""
    import ray

    return StoredWeights([ray.put(dict(named_tensors))])
