"""A learner, as weight sync knows it, in the process of the tests."""

import socket
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from align.model.names import to_checkpoint
from rollout.sync.base import WriteBuckets, buckets
from rollout.sync.broadcast import Address


def free_address() -> Address:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", probe.getsockname()[1])


def changed_weights(path: str, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a model under checkpoint names, each with some noise."""
    generator = torch.Generator().manual_seed(seed)
    checkpoint = to_checkpoint(AutoModelForCausalLM.from_pretrained(path).state_dict().items())
    return {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in checkpoint}


class LocalPublisher:
    """Publishes tensors of this process; `published` tells in which ways, `meetings` where groups met. `broadcast` may do something else than
    send all buckets."""

    def __init__(self, tensors: dict[str, torch.Tensor], broadcast: Callable[..., Any] | None = None):
        self._tensors, self.broadcast = tensors, broadcast
        self.published: list[str] = []
        self.meetings: list[Address] = []

    def free_address(self) -> Address:
        return free_address()

    def save_adapter(self, directory: object) -> None:
        raise NotImplementedError

    def publish(self, write: WriteBuckets, bucket_bytes: float, *, on_device: bool = False) -> list[Any]:
        import ray

        made = buckets(self._tensors.items(), bucket_bytes)
        if not on_device:
            self.published.append("stored")
            return [ray.put(written) for written in write(made)]
        address, size = write.args  # type: ignore[attr-defined]
        self.published.append(f"broadcast to {size}")
        self.meetings.append(address)
        if self.broadcast:
            self.broadcast(address, size, made)
            return []
        return list(write(made))
