"""What `learner.lora` would train of a model: how many parameters, and which modules change by it."""

import math
from collections.abc import Sequence

from align.errors import UserError
from align.model.lora import Part, block_of, is_meant, without_layers
from align.model.sizes import ModelSizes, Shape


def adapted_parameters(sizes: ModelSizes, targets: Sequence[str]) -> dict[str, Shape]:
    """The parameters that presets and names mean, with their shapes. Raises UserError where a target means none."""
    candidates = {n: s for n, s in sizes.parameters.items() if ".layers." in n and len(s) > 1}
    chosen: dict[str, Shape] = {}
    for target in targets:
        found = {name: shape for name, shape in candidates.items() if is_meant(part_of(name, shape), target)}
        if not found:
            raise UserError(f"learner.lora.targets: the model has nothing that is called {target!r}")
        chosen |= found
    return chosen


def part_of(name: str, shape: Shape) -> Part:
    """What the learner knows the parameter as: a linear layer, a router, or a stack of experts."""
    module = name.removesuffix(".weight")
    is_linear = len(shape) == 2 and not module.endswith("mlp.gate")
    return Part(name, without_layers(module), is_linear)


def adapter_size(parameters: dict[str, Shape], rank: int) -> int:
    """Elements of the factors A [rank, in] and B [out, rank] of each parameter; of stacked experts, a pair each."""
    return sum(rank * math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in parameters.values())


def changed_size(sizes: ModelSizes, parameters: dict[str, Shape]) -> int:
    """Elements of the modules (an attention, an MLP, a bank of experts) that are sent after an update."""
    blocks = tuple({f"{block_of(name)}." for name in parameters})
    return sum(math.prod(shape) for name, shape in sizes.parameters.items() if name.startswith(blocks))
