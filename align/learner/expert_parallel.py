"""Routed experts spread over the ranks by DeepSpeed's AutoEP: a rank computes some experts of each layer, for all ranks' tokens.

AutoEP puts a block of its own in the place of each mixture-of-experts block, with this rank's experts stacked as `w1` (gate), `w2`
(down) and `w3` (up), [experts here, ...], and the router one level further down. Whatever leaves the learner has the names and the
whole experts of the model as it was loaded.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from align.errors import UserError

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
