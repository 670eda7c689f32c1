"""Routed experts in a learner: how evenly tokens go to them, how ranks share them, and which of them are trained at all.

Load: a router that sends most tokens to few experts leaves the others untrained: the load is what balance losses (DeepSeek-V2
report, arXiv 2405.04434, section 2.2.3; align/learner/balance.py) hold even.

Parallelism: DeepSpeed's AutoEP gives each rank some experts of each layer, which it computes for all ranks' tokens. It puts a block of its
own in the place of each mixture-of-experts block, with this rank's experts stacked as `w1` (gate), `w2` (down) and `w3` (up),
[experts here, ...], and the router one level further down. Whatever leaves the learner has the names and the whole experts of the model
as it was loaded.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from align.errors import UserError

Loads = dict[int, list[int]]
"""Assignments of a token to an expert, by layer: one number for each expert. A token of top-k routing has k in a layer."""


class ExpertCounter:
    """Counts on the routers of a transformers model, while it is asked to, where each token goes.

    A router is what a block of experts calls `gate`, or `router`, where it returns the chosen experts [tokens, k], as
    DeepSeek-V2's does. A model without such routers has no load.
    """

    def __init__(self, network: torch.nn.Module):
        self._counts: dict[int, torch.Tensor] = {}
        self._counted: list[torch.Tensor] = []
        self._passes: dict[int, int] = {}
        for layer, router in routers_of(network).items():
            router.register_forward_hook(partial(self._count, layer))

    @contextmanager
    def counting(self, *counts: torch.Tensor) -> Iterator[None]:
        """Count what passes forward inside: in pass number n, the token at [row, place] `counts[n][row, place]` times.

        What is computed once more for the backward pass, outside, is not counted twice.
        """
        self._counted, self._passes = [times.flatten() for times in counts], {}
        try:
            yield
        finally:
            self._counted = []

    def take(self) -> Loads:
        """The load since the last time it was taken."""
        loads = {layer: [int(n) for n in counts.tolist()] for layer, counts in self._counts.items()}
        self._counts.clear()
        return loads

    def _count(self, layer: int, router: torch.nn.Module, inputs: Any, output: Any) -> None:
        if not self._counted or not isinstance(output, tuple):
            return
        chosen, experts = chosen_by(output), len(output[-1]) if is_of_autoep(output) else output[0].shape[-1]
        if chosen.is_floating_point():
            return
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(experts, dtype=torch.long, device=chosen.device)
        times = self._counted[self._passes.get(layer, 0)]
        self._passes[layer] = self._passes.get(layer, 0) + 1
        # No boolean index and no bincount: on a GPU both would wait for it.
        self._counts[layer].scatter_add_(0, chosen.flatten(), times.repeat_interleave(chosen.shape[-1]))


def routers_of(network: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The routers of a network, by the number of their layer, in order."""
    found = {}
    for name, block in network.named_modules():
        router = getattr(block, "gate", getattr(block, "router", None))
        layer = re.search(r"layers\.(\d+)", name)
        if hasattr(block, "experts") and isinstance(router, torch.nn.Module) and layer:
            found[int(layer[1])] = router
    return found


def is_of_autoep(output: tuple[torch.Tensor, ...]) -> bool:
    """Whether a router's output is AutoEP's, (weights, chosen, tokens of each expert [E]): transformers' is (logits [T, E], weights, chosen)."""
    return output[-1].dim() == 1


def chosen_by(output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The experts [T, k] that a router chose, of its output."""
    return output[-2 if is_of_autoep(output) else -1]


def logits_of(router: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The logits [T, E] behind a router's output, with gradient: AutoEP's does not tell them, so that its gate computes them again."""
    logits: torch.Tensor = router.gate(inputs[0]) if is_of_autoep(output) else output[0]
    return logits


def add_loads(parts: Sequence[Loads]) -> Loads:
    """The load of all ranks together."""
    return {layer: np.sum([part[layer] for part in parts], axis=0).tolist() for layer in parts[0]}


def load_metrics(loads: Loads) -> dict[str, float]:
    """How uneven the load is, of each layer and over all of them; empty for a dense model.

    `cv` is the standard deviation over the mean, 0 where all experts get the same; `max_over_mean` the load of the
    busiest expert over the mean; `dead` the share of experts that no token went to. Over all layers these are the mean,
    the largest and the share of all experts.
    """
    by_layer = {layer: _unevenness(np.array(counts, dtype=np.float64)) for layer, counts in sorted(loads.items())}
    if not by_layer:
        return {}
    values = list(by_layer.values())
    over_all: Mapping[str, float] = {
        "cv": float(np.mean([one["cv"] for one in values])),
        "max_over_mean": max(one["max_over_mean"] for one in values),
        "dead": float(np.average([one["dead"] for one in values], weights=[len(loads[layer]) for layer in by_layer])),
    }
    named = {f"experts/layer_{layer}/{name}": value for layer, one in by_layer.items() for name, value in one.items()}
    return {f"experts/{name}": value for name, value in over_all.items()} | named


def _unevenness(counts: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    mean = max(float(counts.mean()), 1e-12)
    return {
        "cv": float(counts.std()) / mean,
        "max_over_mean": float(counts.max()) / mean,
        "dead": float((counts == 0).mean()),
    }


GATE, DOWN, UP = "w1", "w2", "w3"
PARALLEL_MODELS = ("deepseek_v2",)
"""Architectures whose blocks this file knows in AutoEP's form."""


def autoep_section(size: int) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that spreads experts over `size` ranks. The pattern also finds a model in a wrapper."""
    return {
        "enabled": True,
        "autoep_size": size,
        "preset_model": "deepseek_v2",
        "moe_layer_pattern": r".*\.layers\.\d+\.mlp",
    }


def check_spreadable(config: Any, size: int) -> None:
    """Raise UserError where the experts of a model cannot be spread over `size` ranks."""
    if config.model_type not in PARALLEL_MODELS:
        raise UserError(
            f"learner.expert_parallel is {size}, which is for {' and '.join(PARALLEL_MODELS)} models, not for {config.model_type}; "
            "leave it out"
        )
    if config.n_routed_experts % size:
        raise UserError(
            f"learner.expert_parallel is {size}, by which the {config.n_routed_experts} experts of a layer cannot be divided"
        )


def is_spread(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter holds experts that other ranks do not have."""
    return placement(parameter) is not None


def placement(parameter: torch.nn.Parameter) -> tuple[int, slice] | None:
    """How many experts there are, and which of them a parameter holds; None where it holds no spread experts."""
    notes = getattr(parameter, "ds_autoep_uc_meta", None)
    if notes is None:
        return None
    held = notes["local_experts"]
    return notes["logical_shape"][0], slice(held[0], held[-1] + 1)


def moe_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimizer groups with spread experts in groups of their own, as ZeRO wants them: other ranks reduce their gradients."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    named = [{"name": f"group_{number}", **group} for number, group in enumerate(groups)]
    split: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(named)
    return split


def route_in_float32(network: torch.nn.Module) -> None:
    """Let AutoEP's routers compute their logits in float32, as transformers' do: in bfloat16 tokens go to other experts."""
    for _, layer in _spread_layers(network):
        layer.router.gate.forward = partial(float32_logits, layer.router.gate)


def float32_logits(gate: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The router's logits of `hidden` [T, H], [T, E] float32, whatever the dtype of its weight."""
    return torch.nn.functional.linear(hidden.float(), gate.weight.float())


def whole_parameters(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The network's parameters as the model was loaded, each by its name, experts gathered one layer at a time.

    Every rank must go through all of it, for what is gathered; what another rank of the group yields is the same.
    """
    layers = dict(_spread_layers(network))
    routers = {f"{name}.router.gate.weight": f"{name}.gate.weight" for name in layers}
    for name, parameter in network.named_parameters():
        if not is_spread(parameter):
            yield routers.get(name, name), parameter
    for name, layer in layers.items():
        gate, down, up = (_gathered(getattr(layer.experts, part), layer.ep_group) for part in (GATE, DOWN, UP))
        yield f"{name}.experts.gate_up_proj", torch.cat([gate, up], dim=1)
        yield f"{name}.experts.down_proj", down


def _spread_layers(network: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        experts = getattr(module, "experts", None)
        if experts is not None and any(map(is_spread, experts.parameters(recurse=False))):
            yield name, module


def _gathered(part: torch.Tensor, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part.detach().contiguous(), group=group)
    return torch.cat(parts)


def shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter as the model was loaded: that of one which ZeRO-3 has partitioned is (0,) itself."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def size(parameter: torch.nn.Parameter) -> int:
    """The number of a parameter's elements on all ranks together."""
    elements = int(getattr(parameter, "ds_numel", parameter.numel()))
    spread = placement(parameter)
    return elements if spread is None else elements * spread[0] // (spread[1].stop - spread[1].start)


def size_in_bytes(parameter: torch.nn.Parameter) -> int:
    """The bytes of a parameter on all ranks together."""
    return size(parameter) * parameter.element_size()


class GradientCensus:
    """Watches a module's trainable parameters until each, and each expert of a fused one, had a non-zero gradient."""

    def __init__(self, module: torch.nn.Module):
        self._waiting: dict[str, torch.Tensor] = {}
        self._handles: dict[str, Any] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                sizes = shape(parameter)
                parts = sizes[0] if ".experts." in name and len(sizes) == 3 else 1
                # Of experts that are spread over ranks, those of others are waited for too, and seen there.
                total, here = placement(parameter) or (parts, slice(parts))
                self._waiting[name] = torch.ones(total, dtype=torch.bool)
                self._handles[name] = parameter.register_hook(self._watch(name, here))

    def _watch(self, name: str, here: slice) -> Any:
        def seen(gradient: torch.Tensor) -> None:
            if name not in self._waiting:
                return
            waiting = self._waiting[name][here]
            waiting &= ~(gradient.detach().reshape(len(waiting), -1) != 0).any(dim=1).cpu()
            if not self._waiting[name].any():
                del self._waiting[name]
                self._handles.pop(name).remove()

        return seen

    def state(self) -> dict[str, torch.Tensor]:
        """What is still waited for, to be given to `restore`."""
        return dict(self._waiting)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on where a census of the same module was."""
        for name in self._waiting.keys() - state.keys():
            del self._waiting[name]
            self._handles.pop(name).remove()
        self._waiting |= state

    def missing(self) -> list[str]:
        """Names still without a gradient; a fused expert is named `...experts.gate_up_proj[3]`."""
        names = []
        for name, waiting in self._waiting.items():
            if len(waiting) == 1:
                names.append(name)
            else:
                names += [f"{name}[{i}]" for i in waiting.nonzero().flatten().tolist()]
        return names
