"""New weights for a running vLLM engine, without a restart."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rollout.types import WeightUpdateError


def load_weights(
    worker: Any, named_tensors: Iterable[tuple[str, torch.Tensor]], modules: Sequence[str] | None = None
) -> None:
    """Write a checkpoint, under its checkpoint names, into the model of a vLLM worker: all of it, or all of some modules.

    Raises WeightUpdateError when a name is unknown to the model or a parameter that had to be written was not.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.model_runner.get_model()
    parts = {"": model} if modules is None else {f"{name}.": part_of(model, name) for name in modules}
    for part in parts.values():
        forget_derived_weights(part)
        initialize_layerwise_reload(part)
    # From here to the end of the reload the model has the parameters of a checkpoint, without what it derives of them.
    expected = {name for name, _ in model.named_parameters() if name.startswith(tuple(parts))}
    if head_is_tied(model):
        # The head has no tensor of its own in a checkpoint: it is the embedding, and packed again below.
        expected.discard("lm_head.weight")
    try:
        loaded = model.load_weights(iter(named_tensors))
    except (KeyError, ValueError, AssertionError) as error:
        raise WeightUpdateError(
            f"vLLM refused a tensor of the update ({type(error).__name__}: {error}); "
            "the names or shapes that the learner sends are not those of this architecture's checkpoint"
        ) from error
    finally:
        for part in parts.values():
            finalize_layerwise_reload(part, worker.model_runner.model_config)
    if modules is None:
        derive_weights_again(model)
    elif foreign := sorted(loaded - expected):
        raise WeightUpdateError(f"the update wrote {foreign[0]}, which is in none of the modules that it is for")
    check_coverage(expected, loaded)


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
