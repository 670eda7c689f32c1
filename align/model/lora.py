"""LoRA through PEFT: which parts of a model get an adapter, and the weights with the adapter in them.

PEFT moves targets of a model with fused experts that are named `gate_proj`, `up_proj`, `down_proj` or `gate` onto the routed
experts and the router. Such layers are named to it as parameters, which it leaves where they are. In bfloat16 what PEFT computes has next to
nothing of a small adapter in it: (W + s B A) x of parameters, and of layers a sum with W x that is rounded before. Here one product gives both.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch

from align.errors import UserError
from align.model.names import ATTENTION
from align.model.policy import let_weights_be_read_like
from align.recipe import LoraOptions
from reward.learned.model import has_fused_experts
from rollout.low_rank import Factors, experts_forward

ADAPTER = "default"
ADAPTER_DIRECTORY = "adapter"
MERGE_REPORT = "merge.json"
REMEMBERED = 32
"""Tokens of a forward pass that an adapter's effect is measured on."""
MOVED_BY_PEFT = {"gate", "gate_proj", "up_proj", "down_proj"}
# vLLM ignores an adapter on kv_b_proj, which it has folded into the attention: an adapter of a preset can be served there.
NOT_SERVED = "kv_b_proj"
ROUTERS = ("gate", "router")

Task = Literal["CAUSAL_LM", "SEQ_CLS"]


@dataclass(frozen=True, slots=True)
class Part:
    """What can have an adapter: `parameter` is its whole name, `name` the one that users know it by, without layers."""

    parameter: str
    name: str
    is_linear: bool

    @property
    def module(self) -> str:
        """The linear layer."""
        return self.parameter.removesuffix(".weight")


def parts_of(model: Any) -> list[Part]:
    """The linear layers but for the head, the fused experts and the routers of a model, in its order."""
    head = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    parts = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and id(module) not in head:
            parts.append(Part(f"{name}.weight", without_layers(name), True))
        elif hasattr(module, "experts") and isinstance(getattr(module, "gate", None), torch.nn.Module):
            if not isinstance(module.gate, torch.nn.Linear):
                parts.append(Part(f"{name}.gate.weight", without_layers(f"{name}.gate"), False))
        elif name.endswith(".experts"):
            stacked = (n for n, p in module.named_parameters(recurse=False) if p.dim() == 3)
            parts += [Part(f"{name}.{n}", without_layers(f"{name}.{n}"), False) for n in stacked]
    return parts


def without_layers(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `self_attn.q_proj`."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def chosen_parts(model: Any, targets: Iterable[str]) -> list[Part]:
    """The parts that a recipe's targets mean. Raises UserError for a target that the model has nothing for."""
    parts = parts_of(model)
    chosen = [part for target in targets for part in parts_meant(parts, target)]
    return [part for part in parts if part in chosen]


def parts_meant(parts: Sequence[Part], target: str) -> list[Part]:
    """Those of `parts` that one of a recipe's targets means. Raises UserError where it means none."""
    found = [part for part in parts if is_meant(part, target)]
    if not found:
        names = ", ".join(dict.fromkeys(part.name for part in parts))
        raise UserError(
            f"learner.lora.targets: the model has nothing that is called {target!r}; there are the presets "
            f"all-linear, attention, attention+shared and experts, and the names {names}"
        )
    return found


def is_meant(part: Part, target: str) -> bool:
    """Whether a preset or a name, from any dot on, means the part."""
    named = "attn" in part.name or re.search(rf"\b({ATTENTION})\.", part.name)
    in_attention = bool(part.is_linear and named and not part.name.endswith(NOT_SERVED))
    match target:
        case "attention":
            return in_attention
        case "all-linear" | "attention+shared":
            return part.is_linear and not part.name.endswith((NOT_SERVED, *ROUTERS))
        case "experts":
            return ".experts." in f".{part.name}" and not part.is_linear
        case _:
            return any(f".{name}".endswith(f".{target}") for name in (part.module, part.name))


def left_out(parts: Iterable[Part], targets: Sequence[str]) -> str:
    """What `all-linear` leaves out of a model's parts and no other target means, each with the reason; "" without that target."""
    if "all-linear" not in targets:
        return ""
    known = (part for part in parts if part.is_linear or part.name.endswith(ROUTERS) or ".experts." in part.name)
    names = dict.fromkeys(part.name for part in known if not any(is_meant(part, target) for target in targets))
    return ", ".join(["all-linear leaves out the head", *(f"{name} ({why_left_out(name)})" for name in names)])


def why_left_out(name: str) -> str:
    """Why `all-linear` leaves out the part of that name."""
    if name.endswith(NOT_SERVED):
        return "vLLM folds it into its attention"
    return "a router" if name.endswith(ROUTERS) else "add the target experts for it"


def adapted_names(model: Any, options: LoraOptions) -> tuple[list[str], list[str]]:
    """The modules, and the parameters beside, that get an adapter, as PEFT calls them.

    Raises UserError for targets that the model has not, and for a dropout of adapters for which PEFT has none.
    """
    parts = chosen_parts(model, options.targets)
    fused = has_fused_experts(model)
    modules = [p.module for p in parts if p.is_linear and not (fused and p.module.split(".")[-1] in MOVED_BY_PEFT)]
    parameters = [p.parameter for p in parts if p.module not in modules]
    if options.dropout and parameters:
        raise UserError(
            f"learner.lora.dropout must be 0 for adapters of {without_layers(parameters[0])}: PEFT has none for them"
        )
    return modules, parameters


def add_adapter(model: Any, options: LoraOptions, task: Task, base: str, *, apart: bool = True) -> Any:
    """`model`, frozen, in a PeftModel whose new adapter changes nothing yet; `base` is where `model` came from.

    With `apart`, layers of `can_be_apart` compute by `forward_apart`, without it as in PEFT.
    A sequence classifier's head is trained beside the adapter. Raises UserError for targets that the model has not.
    """
    from peft import LoraConfig, get_peft_model

    parts = chosen_parts(model, options.targets)
    modules, parameters = adapted_names(model, options)
    config = LoraConfig(
        task_type=task,
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted.peft_config[ADAPTER].base_model_name_or_path = str(Path(base).absolute()) if Path(base).is_dir() else base
    check_adapter(adapted, parts)
    for name, layer in adapter_layers(adapted).items():
        if apart and can_be_apart(name, layer):
            layer.forward = MethodType(forward_apart, layer)
    return adapted


def check_adapter(adapted: Any, wanted: Iterable[Part]) -> None:
    """Raise RuntimeError unless every wanted part has an adapter, no other has, and nothing else but a head is trained."""
    expected = {part.parameter for part in wanted}
    found = set(adapter_layers(adapted))
    if found != expected:
        raise RuntimeError(
            f"PEFT made adapters for {len(found)} parameters where {len(expected)} were wanted; "
            f"they differ in {', '.join(sorted(found ^ expected)[:4])}"
        )
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    foreign = [name for name in trained if not is_adapter(name)]
    if foreign:
        raise RuntimeError(f"{len(foreign)} parameters outside the adapter would be trained, {foreign[0]} for one")


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, or the copy of a head that is trained beside it."""
    return ".lora_A." in name or ".lora_B." in name or ".modules_to_save." in name


def adapter_layers(adapted: Any) -> dict[str, Any]:
    """PEFT's layers by the parameters that they adapt, under the names that the model has without them."""
    from peft.tuners.lora import LoraLayer

    layers = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            layers[f"{plain(name)}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return layers


def plain_parameters(adapted: Any) -> dict[str, torch.nn.Parameter]:
    """The model's own parameters under their names without PEFT; of a head that is trained, the trained copy."""
    return {
        plain(name): parameter
        for name, parameter in adapted.get_base_model().named_parameters()
        if ".lora_" not in name and ".original_module." not in name
    }


def plain(name: str) -> str:
    """A name without what PEFT put into it."""
    return name.replace(".base_layer", "").replace(f".modules_to_save.{ADAPTER}", "")


def adapted_modules(adapted: Any) -> list[str]:
    """The innermost blocks (an attention, an MLP, a bank of experts, a head) that hold what is trained."""
    heads = {
        plain(n).rpartition(".")[0] for n, _ in adapted.get_base_model().named_parameters() if ".modules_to_save." in n
    }
    blocks = {block_of(name) for name in adapter_layers(adapted)} | heads
    return sorted(b for b in blocks if not any(b.startswith(f"{other}.") for other in blocks))


def block_of(parameter: str) -> str:
    """`...self_attn.q_proj.weight` -> `...self_attn`; `...experts.down_proj` -> `...experts`."""
    return parameter.removesuffix(".weight").rpartition(".")[0]


def factors(layer: Any) -> list[torch.nn.Parameter]:
    """The adapter's A and B."""
    return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]


def update_of(layer: Any) -> Factors:
    """The adapter as an update s B A of the parameter that the layer adapts; of stacked experts, of each."""
    a, b = factors(layer)
    experts, scale = getattr(layer, "num_experts", 1), layer.scaling[ADAPTER]
    if experts == 1:
        return Factors(a, b, scale)
    return Factors(a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1), scale)


def can_be_apart(parameter: str, layer: Any) -> bool:
    """Whether the learner should compute with W and the adapter, not their sum, and the sampler can.

    In bfloat16, where W + s B A would lose a small adapter: of linear layers, and of experts without biases. Not of routers.
    """
    base = layer.get_base_layer()
    if getattr(base, layer.parameter_name if hasattr(layer, "parameter_name") else "weight").dtype != torch.bfloat16:
        return False
    if isinstance(base, torch.nn.Linear):
        return True
    return ".experts." in parameter and base.has_gate and not (base.has_bias or base.is_transposed)


def is_apart(layer: Any) -> bool:
    """Whether the learner computes with W and the adapter, not their sum."""
    return "forward" in vars(layer)


def is_sent_apart(parameter: str, layer: Any) -> bool:
    """Whether the sampler gets W and the adapter, rather than their sum. It has kv_b_proj folded into its attention."""
    return is_apart(layer) and not parameter.removesuffix(".weight").endswith(NOT_SERVED)


def forward_apart(layer: Any, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    """What PEFT's layer for a linear layer, or for a parameter of one or of experts, gives: by [W, B] [x; s A x].

    `routing` are the experts of each token and their shares, [T, K] both.
    """
    base = layer.get_base_layer()
    if layer.disable_adapters:
        output: torch.Tensor = base(x, *routing)
    elif isinstance(base, torch.nn.Linear):
        dropped = layer.lora_dropout[ADAPTER](x)
        output = AddedOnce.apply(x, dropped, base.weight, base.bias, *factors(layer), layer.scaling[ADAPTER])
    else:
        updates: dict[str, Factors] = {}
        while layer is not base:
            updates[layer.parameter_name] = update_of(layer)
            layer = layer.base_layer
        weights = [
            updates[name].beside(weight) if name in updates else weight
            for name, weight in (("gate_up_proj", base.gate_up_proj), ("down_proj", base.down_proj))
        ]
        both = updates.get("gate_up_proj"), updates.get("down_proj")
        chosen, shares = routing
        output = experts_forward(x, chosen, shares, (weights[0], weights[1]), both, base._apply_gate)
    return output


class AddedOnce(torch.autograd.Function):
    """W x + bias + s B (A d) as one product, which is rounded once; W, which is frozen, has no gradient.

    x and d, which is x or x with dropout, are [..., in], W is [out, in], A [r, in] and B [out, r].
    """

    @staticmethod
    def forward(ctx: Any, x: Any, dropped: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
        inner = dropped @ a.T * scale
        ctx.save_for_backward(dropped, inner, weight, a, b)
        ctx.scale = scale
        return torch.nn.functional.linear(torch.cat([x, inner], dim=-1), torch.cat([weight, b], dim=1), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        dropped, inner, weight, a, b = ctx.saved_tensors
        of_inner = gradient @ b * ctx.scale
        rows, inners = gradient.flatten(0, -2), of_inner.flatten(0, -2)
        of_a, of_b = inners.T @ dropped.flatten(0, -2), rows.T @ inner.flatten(0, -2)
        return gradient @ weight, of_inner @ a, None, None, of_a, of_b, None


def merged(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    """W + alpha / rank * B A of the layer that adapts W, in W's dtype, computed in float32; W itself stays.

    PEFT's `get_delta_weight` would give new storage to A and B in bfloat16 on a CPU, behind DeepSpeed's back.
    """
    update = update_of(layer)
    product = update.b.detach().float() @ update.a.detach().float()
    if getattr(layer.get_base_layer(), "is_transposed", False):
        product = product.transpose(1, 2)
    return (weight.detach().float() + update.scale * product).to(weight.dtype)


def effects(weight: torch.Tensor, sent: torch.Tensor, layer: Any, x: torch.Tensor | None) -> tuple[float, float]:
    """|(sent - W) x - s B A x|^2 and |s B A x|^2, added up over the inputs x [N, in] of W: how far `sent` is from W + s B A, and
    against what. Without inputs, x is drawn from a normal distribution.
    """
    update = update_of(layer)
    if x is None or x.shape[-1] != update.a.shape[-1]:
        x = torch.randn(REMEMBERED, update.a.shape[-1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, torch.float32)
    exact = update.scale * (x @ update.a.detach().float().mT) @ update.b.detach().float().mT
    if sent is weight:
        return 0.0, float(exact.square().sum())
    change = sent.float() - weight.detach().float()
    if getattr(layer.get_base_layer(), "is_transposed", False):
        change = change.transpose(1, 2)
    return float((x @ change.mT - exact).square().sum()), float(exact.square().sum())


def remember_inputs(adapted: Any) -> dict[Any, torch.Tensor]:
    """By base layer of an adapter, its first inputs [N, in] in the last forward pass: empty until there is one."""
    inputs: dict[Any, torch.Tensor] = {}

    def remember(layer: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs[layer.get_base_layer()] = arguments[0].detach().flatten(0, -2)[:REMEMBERED].clone()

    for layer in adapter_layers(adapted).values():
        layer.register_forward_pre_hook(remember)
    return inputs


def describe(adapted: Any, total: int, trained: int, options: LoraOptions) -> str:
    """What is trained: how many parameters, which share, and where."""
    counts: dict[str, int] = {}
    for name in adapter_layers(adapted):
        short = without_layers(name.removesuffix(".weight"))
        counts[short] = counts.get(short, 0) + 1
    where = ", ".join(f"{count} {name}" for name, count in counts.items())
    heads = [n for n in adapted_modules(adapted) if "." not in n]
    return (
        f"{trained:,} trainable parameters in adapters of rank {options.rank} ({trained / total:.2%} of {total:,}): {where}"
        + (f"; and {', '.join(heads)} as a whole" if heads else "")
    )


def write_merge_report(directory: Path, lost: float | None, dtype: str) -> None:
    """Say beside an adapter how far the checkpoint is from it in which it was merged."""
    said = "|merged - exact| / |exact| of what the adapter adds to the outputs of its layers; the adapter here is exact"
    report = {"lost": lost, "dtype": dtype, "lost_is": said}
    (directory / MERGE_REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def save_adapter(adapted: Any, directory: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write the adapter as PEFT does, into `directory`; `state_dict` holds what is trained, gathered from the ranks."""
    adapted.save_pretrained(directory, state_dict=dict(state_dict), save_embedding_layers=False)
    let_weights_be_read_like(directory / "adapter_config.json")
