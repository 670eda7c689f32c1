"""New weights for a running vLLM engine, without a restart.

The engine is a process, or several with a part of the model each. An error would lose its type on the way from one of these, so that
the three parts of an update say what is wrong in words.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rollout.low_rank import LowRankUpdates, split
from rollout.sync.base import Bucket
from rollout.sync.broadcast import Receiver
from rollout.types import WeightUpdateError


class WeightUpdate:
    """An update under way in a vLLM worker process: of the whole model, or of some of its modules.

    Its methods raise WeightUpdateError where the update is not one of this model.
    """

    def __init__(self, worker: Any, modules: Sequence[str] | None):
        self._model = worker.model_runner.get_model()
        self._config = worker.model_runner.model_config
        self._is_whole = modules is None
        self._parts = {f"{name}.": part_of(self._model, name) for name in modules or ()} or {"": self._model}
        self._loaded: set[str] = set()
        if not hasattr(worker, "low_rank"):
            worker.low_rank = LowRankUpdates(self._model)
        self._low_rank: LowRankUpdates = worker.low_rank

    def begin(self) -> None:
        """From here to `finish` the model has the parameters of a checkpoint, without what it derives of them."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._low_rank.remove(self._parts)
        for part in self._parts.values():
            forget_derived_weights(part)
            initialize_layerwise_reload(part)
        below = tuple(self._parts)
        self._expected = {name for name, _ in self._model.named_parameters() if name.startswith(below)}
        if head_is_tied(self._model):
            # The head has no tensor of its own in a checkpoint: it is the embedding, and packed again at the end.
            self._expected.discard("lm_head.weight")

    def take(self, bucket: Bucket) -> None:
        """Write tensors, which have their checkpoint names; keep what is to be added to them."""
        weights, updates = split(bucket)
        self._low_rank.take(updates)
        try:
            self._loaded |= self._model.load_weights(iter(weights.items()))
        except (KeyError, ValueError, AssertionError) as error:
            raise WeightUpdateError(
                f"vLLM refused a tensor of the update ({type(error).__name__}: {error}); "
                "the names or shapes that the learner sends are not those of this architecture's checkpoint"
            ) from error

    def finish(self) -> None:
        """Make the model ready to sample."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        for part in self._parts.values():
            finalize_layerwise_reload(part, self._config)
        if self._is_whole:
            derive_weights_again(self._model)
        elif foreign := sorted(self._loaded - self._expected):
            raise WeightUpdateError(f"the update wrote {foreign[0]}, which is in none of the modules that it is for")
        check_coverage(self._expected, self._loaded)
        self._low_rank.add()


def begin_update(worker: Any, modules: Sequence[str] | None) -> str | None:
    """Begin an update in a vLLM worker process. Returns what is wrong with it, as the parts that follow do."""

    def begin() -> None:
        worker.weight_update = WeightUpdate(worker, modules)
        worker.weight_update.begin()

    return what_is_wrong(begin)


def take_bucket(worker: Any, bucket: Bucket) -> str | None:
    return what_is_wrong(worker.weight_update.take, bucket)


def take_broadcast(worker: Any, receiver: Receiver) -> str | None:
    """All buckets, which this process receives itself. Raises RuntimeError where the others do not come, or go away."""
    for bucket in receiver.buckets(worker.rank):
        if wrong := take_bucket(worker, bucket):
            return wrong
    return None


def finish_update(worker: Any) -> str | None:
    return what_is_wrong(worker.weight_update.finish)


def has_low_rank_updates(worker: Any) -> bool:
    """Whether the model has more than its weights."""
    return bool(worker.low_rank)


def check_low_rank_updates(worker: Any) -> str | None:
    """What is wrong where the model has computed without one of them."""
    for name in worker.low_rank.unused():
        return (
            f"vLLM computes {name} without its linear layer, so that the adapter of it would have no effect: leave it out of "
            "learner.lora.targets"
        )
    return None


def what_is_wrong(do: Callable[..., None], *arguments: Any) -> str | None:
    try:
        do(*arguments)
    except WeightUpdateError as error:
        return str(error)
    return None


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


def forget_derived_weights(model: torch.nn.Module) -> None:
    """Make the mixture-of-experts layers build their kernels anew: a kept kernel skips its packing on an update."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def derive_weights_again(model: torch.nn.Module) -> None:
    """Pack a tied output head again: it keeps a packed copy, and no tensor of its own arrives to renew it."""
    if head_is_tied(model):
        head: Any = model.lm_head
        head.quant_method.process_weights_after_loading(head)


def head_is_tied(model: torch.nn.Module) -> bool:
    """Whether the output head is the embedding."""
    return hasattr(model, "lm_head") and bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
