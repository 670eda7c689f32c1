"""What `learner.lora` would train of a model: how many parameters, and which modules change by it."""

import math
from collections.abc import Sequence

from align.errors import UserError
from align.model.sizes import ModelSizes, Shape


def adapted_parameters(sizes: ModelSizes, targets: Sequence[str]) -> dict[str, Shape]:
    """The parameters that presets and names mean, with their shapes. Raises UserError where a target means none."""
    chosen: dict[str, Shape] = {}
    for target in targets:
        found = {n: s for n, s in sizes.parameters.items() if ".layers." in n and len(s) > 1 and means(target, n)}
        if not found:
            raise UserError(f"learner.lora.targets: the model has nothing that is called {target!r}")
        chosen |= found
    return chosen


def means(target: str, parameter: str) -> bool:
    """Whether a preset or a name means a parameter. The presets leave out kv_b_proj, which vLLM serves no adapter on."""
    module = parameter.removesuffix(".weight")
    routed, router = ".experts." in parameter, module.endswith("mlp.gate")
    attention = "attn" in parameter and not module.endswith("kv_b_proj")
    match target:
        case "attention":
            return attention
        case "attention+shared":
            return attention or ("attn" not in parameter and not routed and not router)
        case "experts":
            return routed
        case _:
            return f".{module}".endswith(f".{target}")


def adapter_size(parameters: dict[str, Shape], rank: int) -> int:
    """Elements of the factors A [rank, in] and B [out, rank] of each parameter; of stacked experts, a pair each."""
    return sum(rank * math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in parameters.values())


def changed_size(sizes: ModelSizes, parameters: dict[str, Shape]) -> int:
    """Elements of the modules (an attention, an MLP, a bank of experts) that are sent after an update."""
    blocks = tuple({f"{name.removesuffix('.weight').rpartition('.')[0]}." for name in parameters})
    return sum(math.prod(shape) for name, shape in sizes.parameters.items() if name.startswith(blocks))
