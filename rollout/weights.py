"""New weights for a running vLLM engine, without a restart.

The engine is one process, or several that each hold a part of the model. `run_step` runs a step of an update in each of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rollout.low_rank import LowRankUpdates, split
from rollout.sync.base import Bucket
from rollout.types import WeightUpdateError


def run_step(worker: Any, step: Callable[..., None], *arguments: Any) -> str | None:
    """Run a step in a vLLM worker process. Returns the text of its WeightUpdateError, which would lose its type on the way back."""
    try:
        step(worker, *arguments)
    except WeightUpdateError as error:
        return str(error)
    return None


def begin_update(worker: Any, modules: Sequence[str] | None) -> None:
    """Make the model ready to take a checkpoint's tensors: those of all modules, or of some."""
    worker.weight_update = WeightUpdate(worker, modules)


def take_bucket(worker: Any, bucket: Bucket) -> None:
    """Write tensors into the model; LoRA factors wait until the end."""
    worker.weight_update.take(bucket)


def finish_update(worker: Any) -> None:
    """Make the model ready to sample."""
    worker.weight_update.finish()


def check_low_rank_updates(worker: Any) -> None:
    """Raise WeightUpdateError where the model has computed without one of its LoRA updates."""
    for name in worker.low_rank.unused():
        raise WeightUpdateError(
            f"vLLM computes {name} without its linear layer, so that the adapter of it would have no effect: leave it out of "
            "learner.lora.targets"
        )


def has_low_rank_updates(worker: Any) -> bool:
    """Whether the model computes with LoRA updates besides its weights."""
    return bool(worker.low_rank)


class WeightUpdate:
    """An update in progress in a vLLM worker process: of the whole model, or of some of its modules.

    From here to `finish` the model has a checkpoint's parameters, without what vLLM derives from them. What a layer computes with is then where
    it was before, as CUDA graphs want it: only the copies that kernels for CPUs pack are new. All methods raise WeightUpdateError where the
    update does not fit the model.
    """

    def __init__(self, worker: Any, modules: Sequence[str] | None):
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._worker, self._model = worker, worker.model_runner.get_model()
        self._config = worker.model_runner.model_config
        self._is_whole = modules is None
        self._parts = {f"{name}.": part_of(self._model, name) for name in modules or ()} or {"": self._model}
        self._loaded: set[str] = set()
        if not hasattr(worker, "low_rank"):
            worker.low_rank = LowRankUpdates(self._model)
        self._low_rank: LowRankUpdates = worker.low_rank
        self._low_rank.remove(self._parts)
        for part in self._parts.values():
            forget_packed_experts(part)
            initialize_layerwise_reload(part)
        below = tuple(self._parts)
        self._expected = {name for name, _ in self._model.named_parameters() if name.startswith(below)}
        if head_is_tied(self._model):
            # The head has no tensor of its own in a checkpoint: it is the embedding, and packed again at the end.
            self._expected.discard("lm_head.weight")

    def take(self, bucket: Bucket) -> None:
        """Write tensors under their checkpoint names; keep LoRA factors for `finish`."""
        weights, updates = split(bucket)
        if updates and not self._config.enforce_eager:
            raise WeightUpdateError(
                "rollout.cuda_graphs: a graph computes without the adapters that come beside the weights; leave it out, or set "
                "weights.transport: adapter"
            )
        self._low_rank.take(updates)
        try:
            self._loaded |= self._model.load_weights(iter(weights.items()))
        except (KeyError, ValueError, AssertionError) as error:
            raise WeightUpdateError(
                f"vLLM refused a tensor of the update ({type(error).__name__}: {error}); "
                "the names or shapes that the learner sends are not those of this architecture's checkpoint"
            ) from error

    def finish(self) -> None:
        """Derive what vLLM computes with, and check that every expected parameter was written."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        for part in self._parts.values():
            finalize_layerwise_reload(part, self._config)
        if self._is_whole:
            derive_weights_again(self._model)
        elif foreign := sorted(self._loaded - self._expected):
            raise WeightUpdateError(f"the update wrote {foreign[0]}, which is in none of the modules that it is for")
        check_coverage(self._expected, self._loaded)
        with memory_that_sleeps(self._worker):
            self._low_rank.add()


@contextmanager
def memory_that_sleeps(worker: Any) -> Iterator[None]:
    """A block whose tensors are offloaded with the model where the worker's engine can be, and after which weights that they replace are given back.

    vLLM offloads what was allocated from its own pools, and never releases the segments of one by itself after it was filled.
    """
    with worker._maybe_get_memory_pool_context("runtime"):
        yield
    if worker.device.type == "cuda" and worker.vllm_config.model_config.enable_cumem_allocator:
        from vllm.device_allocator import get_mem_allocator_instance

        allocator = get_mem_allocator_instance()
        for pool, _ in allocator.allocator_and_pools.get("weights", ()):
            allocator._trim(pool)


def part_of(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """A module of the model. Raises WeightUpdateError when it has none of that name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise WeightUpdateError(
            f"the update is for {name}, but the sampler's model has no module of that name"
        ) from None


def check_coverage(expected: set[str], loaded: set[str]) -> None:
    """Raise WeightUpdateError unless every expected parameter was written."""
    missing = sorted(expected - loaded)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise WeightUpdateError(
            f"{len(missing)} of the sampler's {len(expected)} parameters were not written by the update: {shown}"
        )


def forget_packed_experts(model: torch.nn.Module) -> None:
    """Make mixture-of-experts layers on a CPU build their kernels anew: a kept one would compute with weights that are not packed."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(getattr(method, "unquantized_backend", None), "name", None) == "CPU":
            method.moe_kernel = None


def derive_weights_again(model: torch.nn.Module) -> None:
    """Pack a tied output head again: it keeps a packed copy, and no tensor of its own arrives to renew it."""
    if head_is_tied(model):
        head: Any = model.lm_head
        head.quant_method.process_weights_after_loading(head)


def head_is_tied(model: torch.nn.Module) -> bool:
    """Whether the output head is the embedding."""
    return hasattr(model, "lm_head") and bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
