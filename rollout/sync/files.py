"""Weight sync through files in a directory that learners and workers share: all weights as safetensors, or a LoRA adapter alone."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from uuid import uuid4

from rollout.sync.base import MIB, Bucket, BucketSource, Publisher, WeightSource, WeightSync

if TYPE_CHECKING:
    from rollout.engine import Engine


@dataclass(frozen=True, slots=True)
class DirectorySync(WeightSync):
    """Weights as safetensors files in `path`, one for each bucket of `bucket_bytes`."""

    path: Path
    bucket_bytes: float = 256 * MIB

    def publish(self, learner: Publisher) -> "WeightFiles":
        import ray

        return WeightFiles(ray.get(learner.publish(partial(write_files, self.path), self.bucket_bytes)))


@dataclass(frozen=True, slots=True)
class WeightFiles(BucketSource):
    """Buckets in safetensors files."""

    files: Sequence[Path]

    def buckets(self) -> Iterator[Bucket]:
        from safetensors.torch import load_file

        yield from map(load_file, self.files)

    def release(self) -> None:
        for file in self.files:
            file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class AdapterSync(WeightSync):
    """A LoRA adapter alone, in a directory of its own in `path` for each update. The workers must hold the model that it adapts."""

    path: Path
    keeps_adapter: ClassVar[bool] = True

    def publish(self, learner: Publisher) -> "AdapterFiles":
        directory = self.path / uuid4().hex
        learner.save_adapter(directory)
        return AdapterFiles(directory)


@dataclass(frozen=True, slots=True)
class AdapterFiles(WeightSource):
    """A directory with a LoRA adapter as PEFT writes it. In a worker it replaces the adapter before."""

    directory: Path

    @property
    def sent_bytes(self) -> int:
        """Bytes of the adapter's weights."""
        return sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))

    def load_into(self, engine: "Engine", modules: Sequence[str] | None) -> None:
        engine.add_adapter(self.directory)

    def release(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def write_files(directory: Path, buckets: Iterable[Bucket]) -> Iterator[Path]:
    """Write each bucket to a safetensors file in `directory`; yields the files."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    for bucket in buckets:
        file = directory / f"{uuid4().hex}.safetensors"
        save_file(bucket, file)
        yield file
