"""Low-rank updates beside the weights of a vLLM model: W x + s B (A x), not (W + s B A) x.

In bfloat16 the sum W + s B A keeps of B A only what is not small beside W: of an adapter's first steps next to nothing. vLLM can add
adapters by itself, but on CPUs to models without experts only. A layer that one of its kernels computes out of this module's sight is
found by `unused`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import grouped_mm, pad, silu

from rollout.types import WeightUpdateError

SUFFIXES = ("lora_A", "lora_B", "lora_scale")
ALIGNED = 8
"""A grouped product wants rows of so many elements, or of a multiple."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The update s B A of a weight [out, in]: A [r, in] and B [out, r]; of stacked experts A [E, r, in] and B [E, out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def named(self, parameter: str) -> dict[str, torch.Tensor]:
        """What is sent of it, for the parameter of that name."""
        scale = torch.tensor([self.scale], dtype=torch.float64)
        return dict(zip((f"{parameter}.{suffix}" for suffix in SUFFIXES), (self.a, self.b, scale), strict=True))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """s B (A x) for x [..., in], of the weight of a linear layer or of every expert."""
        return (x @ self.a.mT) @ self.b.mT * self.scale

    def grouped(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """s B (A x) for rows [N, in] that are sorted by expert; those of expert e end before `ends[e]`."""
        missing = -self.a.shape[1] % ALIGNED
        a, b = pad(self.a, (0, 0, 0, missing)), pad(self.b, (0, missing)).contiguous()
        return grouped_mm(grouped_mm(rows, a.mT, offs=ends), b.mT, offs=ends) * self.scale


def experts_forward(
    x: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    updates: tuple[Factors | None, Factors | None],
    gate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What a bank of experts gives for `x` [T, H], in its dtype: token t goes to the experts `chosen` [T, K], weighted by `shares` [T, K].

    `weights` are those of gate and up [E, 2I, H], and of down [E, H, I]; `updates` are added to them, and `gate` makes [N, I] of [N, 2I].
    In the order of transformers' `grouped_mm` experts, so that learner and sampler round alike.
    """
    each, place = torch.sort(chosen.reshape(-1))
    ends = torch.bincount(each, minlength=len(weights[0])).cumsum(0).to(torch.int32)
    rows = x[place // chosen.shape[-1]]
    for weight, update, after in zip(weights, updates, (gate, lambda last: last), strict=True):
        product = grouped_mm(rows, weight.mT, offs=ends)
        rows = after(product if update is None else product + update.grouped(rows, ends))
    rows = (rows * shares.reshape(-1)[place].unsqueeze(-1))[torch.argsort(place)]
    return rows.view(*chosen.shape, -1).sum(1).to(x.dtype)


def split(bucket: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A bucket's weights, and what it has of updates."""
    updates = {name: tensor for name, tensor in bucket.items() if name.endswith(SUFFIXES)}
    return {name: tensor for name, tensor in bucket.items() if name not in updates}, updates


class LowRankUpdates:
    """The updates that a vLLM model has beside its weights, under the names of what they belong to."""

    def __init__(self, model: Any):
        self._model = model
        self._places: dict[str, LinearUpdate | ExpertsUpdate] = {}
        self._waiting: dict[str, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def remove(self, below: Iterable[str]) -> None:
        """Take those away whose names, with a dot, start with one of `below`, and forget what has arrived."""
        self._waiting = {}
        for name in [name for name in self._places if f"{name}.".startswith(tuple(below))]:
            self._places.pop(name).remove()

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what arrives until `add`; it comes before the weights of its layer, which then stay as they were loaded."""
        self._waiting |= {name: tensor.clone() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            block, _, _ = name.removesuffix(f".{SUFFIXES[0]}").rpartition(".")
            if name.endswith(SUFFIXES[0]) and tensor.dim() == 3 and block not in self._places:
                self._places[block] = ExpertsUpdate(self._model, block)

    def add(self) -> None:
        """Let the model compute with what has arrived. Raises WeightUpdateError for a layer that it has not."""
        parts: dict[str, list[tuple[str | int | None, Factors]]] = {}
        for name in [n.removesuffix(f".{SUFFIXES[0]}") for n in self._waiting if n.endswith(SUFFIXES[0])]:
            a, b, scale = (self._waiting[f"{name}.{suffix}"] for suffix in SUFFIXES)
            factors = Factors(a, b, float(scale))
            block, _, leaf = name.rpartition(".")
            if a.dim() == 3:
                experts = self._places[block]
                assert isinstance(experts, ExpertsUpdate)
                experts.add(leaf, factors)
            else:
                at, shard = linear_layer(self._model, name.removesuffix(".weight"))
                parts.setdefault(at, []).append((shard, factors))
        for at, shards in parts.items():
            self._places[at] = LinearUpdate(self._model.get_submodule(at), shards)
        self._waiting = {}

    def unused(self) -> Iterator[str]:
        """Those that the model has computed nothing with so far."""
        yield from (name for name, update in self._places.items() if not update.used)


def linear_layer(model: Any, name: str) -> tuple[str, str | int | None]:
    """The layer that computes the linear layer `name` of a checkpoint, and which shard of it that is where it computes several."""
    from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

    modules = dict(model.named_modules())
    block, _, leaf = name.rpartition(".")
    together = getattr(model, "packed_modules_mapping", {}).items()
    for at, leaves in [(leaf, []), *together]:
        layer = modules.get(f"{block}.{at}")
        if isinstance(layer, LinearBase) and (at == leaf or leaf in leaves):
            shard = leaves.index(leaf) if leaf in leaves else None
            return f"{block}.{at}", "qkv"[shard] if shard is not None and isinstance(
                layer, QKVParallelLinear
            ) else shard
    raise WeightUpdateError(
        f"vLLM has no linear layer for {name}, so that an adapter of it cannot be sampled from: leave it out of learner.lora.targets"
    )


class LinearUpdate:
    """The update of a linear layer of vLLM, or of the shards that it computes together: this process's part of it."""

    def __init__(self, layer: Any, shards: list[tuple[str | int | None, Factors]]):
        from vllm.model_executor.layers.linear import RowParallelLinear

        self.used = False
        self._method = layer.quant_method
        self._apply = layer.quant_method.apply
        device = next(layer.parameters()).device
        rank = sum(len(factors.a) for _, factors in shards)
        like = shards[0][1].a
        by_rows = isinstance(layer, RowParallelLinear)
        inputs = layer.input_size_per_partition if by_rows else layer.input_size
        outputs = layer.output_size if by_rows else getattr(layer, "output_size_per_partition", layer.output_size)
        a, b = like.new_zeros(rank, inputs, device=device), like.new_zeros(outputs, rank, device=device)
        start = 0
        for shard, factors in shards:
            end = start + len(factors.a)
            # What divides a weight between processes divides its factors: A where it is by the inputs, B where by the outputs.
            load(layer if by_rows else None, a[start:end], factors.a, shard, input_dim=1)
            load(None if by_rows else layer, b[:, start:end], factors.b, shard, output_dim=0)
            start = end
        self._factors = Factors(a, b, shards[0][1].scale)
        self._method.apply = self._applied

    def remove(self) -> None:
        """Let the layer compute as before."""
        self._method.apply = self._apply

    def _applied(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.used = True
        output: torch.Tensor = self._apply(layer, x, bias)
        return output + self._factors(x.to(self._factors.a.dtype)).to(output.dtype)


def load(layer: Any, place: torch.Tensor, tensor: torch.Tensor, shard: str | int | None, **divided_by: int) -> None:
    """Write a tensor to its place, by the layer's own loader where that divides it between processes."""
    if layer is None:
        place.copy_(tensor)
        return
    parameter = torch.nn.Parameter(place, requires_grad=False)
    for name, dimension in divided_by.items():
        setattr(parameter, name, dimension)
    layer.weight_loader(parameter, tensor.to(place.device), *(() if shard is None else (shard,)))


class ExpertsUpdate:
    """The updates of a bank of experts, whose weights vLLM must leave in the order in which they are loaded."""

    def __init__(self, model: Any, block: str):
        layers = [m for m in model.get_submodule(block).modules() if hasattr(m, "w13_weight")]
        backend = (
            getattr(getattr(layers[0].quant_method, "unquantized_backend", None), "name", None) if layers else None
        )
        if backend not in ("CPU", "TRITON") or layers[0].activation.value != "silu":
            raise WeightUpdateError(
                f"vLLM computes {block} in a way ({backend}) to which no adapter can be added: leave the experts out of "
                "learner.lora.targets"
            )
        self._layer, self._method = layers[0], layers[0].quant_method
        self._class = self._method.experts_cls
        self._method.experts_cls = adapted(self._class)

    @property
    def used(self) -> bool:
        """Whether the experts have computed something since the updates are there."""
        used: bool = self._method.moe_kernel.fused_experts.used
        return used

    def add(self, leaf: str, factors: Factors) -> None:
        """Add to what a parameter gives, `gate_up_proj` or `down_proj`; of each expert, what this process has of it."""
        parallel = self._method.moe.moe_parallel_config
        size = self._layer.w2_weight.shape[-1]
        own = slice(parallel.tp_rank * size, (parallel.tp_rank + 1) * size)
        device, a, b = self._layer.w2_weight.device, factors.a, factors.b
        if leaf == "down_proj":
            a = a[:, :, own]
        else:
            b = torch.cat([half[:, own] for half in b.chunk(2, dim=1)], dim=1)
        self._method.moe_kernel.fused_experts.updates[leaf] = Factors(a.to(device), b.to(device), factors.scale)

    def remove(self) -> None:
        """Let vLLM compute by its own kernel, from the next weights on."""
        self._method.experts_cls = self._class


def adapted(kernel: Any) -> Any:
    """A vLLM kernel of experts that adds updates to weights as they are loaded."""

    class AdaptedExperts(kernel):
        used = False

        def __init__(self, *arguments: Any, **named: Any):
            super().__init__(*arguments, **named)
            self.updates: dict[str, Factors] = {}

        def process_weights_after_loading(self, layer: Any) -> None:
            """Pack nothing."""

        def apply(
            self,
            *,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            **_: Any,
        ) -> None:
            self.used = True
            updates = self.updates.get("gate_up_proj"), self.updates.get("down_proj")
            output.copy_(experts_forward(hidden_states, topk_ids, topk_weights, (w1, w2), updates, silu_and_mul))

    return AdaptedExperts


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
