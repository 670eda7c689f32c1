"""Low-rank updates beside the weights of a vLLM model: [W, B] [x; s A x], not (W + s B A) x.

In bfloat16 the sum W + s B A keeps of B A only what is not small beside W: of an adapter's first steps next to nothing. So too W x + s B (A x),
where W x is rounded before the sum. One product of both rounds once, and what it adds is there on average over outputs. vLLM can add adapters
by itself, but on CPUs to models without experts only. A layer that vLLM computes out of this module's sight is found by `unused`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import grouped_mm, linear, pad, silu

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

    def beside(self, weight: torch.Tensor) -> torch.Tensor:
        """[W, B], of a linear layer [out, in + r], or of stacked experts [E, out, in + r'], where r' is what a grouped product takes."""
        return torch.cat([weight, self.b if weight.dim() == 2 else pad(self.b, (0, self._missing))], dim=-1)

    def widened(self, x: torch.Tensor, ends: torch.Tensor | None = None) -> torch.Tensor:
        """[x, s A x] for x [..., in]; of experts for rows [N, in] that are sorted by expert, of which those of e end before `ends[e]`."""
        if ends is None:
            return torch.cat([x, x @ self.a.mT * self.scale], dim=-1)
        a = pad(self.a, (0, 0, 0, self._missing))
        return torch.cat([x, grouped_mm(x, a.mT, offs=ends) * self.scale], dim=-1)

    @property
    def _missing(self) -> int:
        return -self.a.shape[-2] % ALIGNED


def experts_forward(
    x: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    updates: tuple[Factors | None, Factors | None],
    gate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What a bank of experts gives for `x` [T, H], in its dtype: token t goes to the experts `chosen` [T, K], weighted by `shares` [T, K].

    `weights` are those of gate and up [E, 2I, H], and of down [E, H, I], with B beside them where there is an update; `gate` makes
    [N, I] of [N, 2I].
    In the order of transformers' `grouped_mm` experts, so that learner and sampler round alike.
    """
    each, place = torch.sort(chosen.reshape(-1))
    ends = torch.bincount(each, minlength=len(weights[0])).cumsum(0).to(torch.int32)
    rows = x[place // chosen.shape[-1]]
    for weight, update, after in zip(weights, updates, (gate, lambda last: last), strict=True):
        wide = rows if update is None else update.widened(rows, ends)
        rows = after(grouped_mm(wide, weight.mT, offs=ends))
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
        self._at: dict[str, tuple[str, str | int | None]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def remove(self, below: Iterable[str]) -> None:
        """Take those away whose names, with a dot, start with one of `below`, and forget what has arrived."""
        self._waiting = {}
        for name in [name for name in self._places if f"{name}.".startswith(tuple(below))]:
            self._places.pop(name).remove()

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what arrives until `add`. It comes before the weights of its layer, which are then kept as they are loaded.

        Raises WeightUpdateError for a layer that the model has not.
        """
        self._waiting |= {name: tensor.clone() for name, tensor in tensors.items()}
        for name in names_of(tensors):
            block, _, leaf = name.rpartition(".")
            if tensors[f"{name}.{SUFFIXES[0]}"].dim() == 3:
                self._at[name] = block, leaf
                self._places.setdefault(block, ExpertsUpdate(self._model, block))
            else:
                self._at[name] = linear_layer(self._model, name.removesuffix(".weight"))
                at = self._at[name][0]
                self._places.setdefault(at, LinearUpdate(self._model.get_submodule(at)))

    def add(self) -> None:
        """Let the model compute with what has arrived."""
        parts: dict[str, list[tuple[str | int | None, Factors]]] = {}
        for name in names_of(self._waiting):
            a, b, scale = (self._waiting[f"{name}.{suffix}"] for suffix in SUFFIXES)
            at, shard = self._at[name]
            parts.setdefault(at, []).append((shard, Factors(a, b, float(scale))))
        for at, shards in parts.items():
            self._places[at].add(shards)
        self._waiting = {}

    def unused(self) -> Iterator[str]:
        """Those that the model has computed nothing with so far."""
        yield from (name for name, update in self._places.items() if not update.used)


def names_of(tensors: Iterable[str]) -> list[str]:
    """The parameters whose updates are among tensors of these names."""
    return [name.removesuffix(f".{SUFFIXES[0]}") for name in tensors if name.endswith(SUFFIXES[0])]


def linear_layer(model: Any, name: str) -> tuple[str, str | int | None]:
    """The layer that computes the linear layer `name` of a checkpoint, and which shard of it that is where it computes several."""
    from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

    block, _, leaf = name.rpartition(".")
    layers = dict(model.get_submodule(block).named_children())
    for at, leaves in [(leaf, []), *getattr(model, "packed_modules_mapping", {}).items()]:
        layer = layers.get(at)
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

    def __init__(self, layer: Any):
        self.used = False
        self._weight: torch.Tensor | None = None
        self._layer, self._method = layer, layer.quant_method
        self._process = self._method.process_weights_after_loading
        self._method.process_weights_after_loading = self._keep

    def add(self, shards: list[tuple[str | int | None, Factors]]) -> None:
        """Compute with the updates of the shards, from here on."""
        from vllm.model_executor.layers.linear import RowParallelLinear

        by_rows = isinstance(self._layer, RowParallelLinear)
        weight = self._layer.weight.data if self._weight is None else self._weight
        outputs, inputs = weight.shape
        rank = sum(len(factors.a) for _, factors in shards)
        a, b = weight.new_zeros(rank, inputs), weight.new_zeros(outputs, rank)
        start = 0
        for shard, factors in shards:
            end = start + len(factors.a)
            # What divides a weight between processes divides its factors: A where it is by the inputs, B where by the outputs.
            load(self._layer if by_rows else None, a[start:end], factors.a, shard, input_dim=1)
            load(None if by_rows else self._layer, b[:, start:end], factors.b, shard, output_dim=0)
            start = end
        self._factors = Factors(a, b, shards[0][1].scale)
        self._wide = self._factors.beside(weight)
        self._weight = None
        # A second copy of the weights, or a packed one, would be too many.
        if self._layer.weight.dim() == 2:
            self._layer.weight.data = self._wide[:, :inputs]
        elif hasattr(self._layer, "cpu_linear"):
            self._layer.cpu_linear = None
        self._method.apply = self._applied

    def remove(self) -> None:
        """Let the layer compute as before."""
        for name in ("apply", "process_weights_after_loading"):
            vars(self._method).pop(name, None)
        self._layer.weight.data = self._layer.weight.data.contiguous()

    def _keep(self, layer: Any) -> None:
        # Kernels for CPUs pack the weight. On a GPU it can be read until the end of the update, and what has arrived need not stay.
        self._weight = layer.weight.data if layer.weight.device.type == "cpu" else None
        self._process(layer)

    def _applied(self, _: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.used = True
        # Some kernels keep a bias in float32.
        return linear(self._factors.widened(x), self._wide, None if bias is None else bias.to(x.dtype))


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
        if os.environ.get("VLLM_BATCH_INVARIANT") == "1":
            raise WeightUpdateError(
                f"rollout.batch_invariant: what an adapter adds to {block} depends on the batch: leave the experts out of learner.lora.targets"
            )
        self._layer, self._method = layers[0], layers[0].quant_method
        self._class = self._method.experts_cls
        self._use(adapted(self._class))

    @property
    def used(self) -> bool:
        """Whether the experts have computed something since the updates are there."""
        used: bool = self._method.moe_kernel.fused_experts.used
        return used

    def add(self, shards: list[tuple[str | int | None, Factors]]) -> None:
        """Compute with the updates of `gate_up_proj` or `down_proj`; of each expert, what this process has of it."""
        parallel = self._method.moe.moe_parallel_config
        size = self._layer.w2_weight.shape[-1]
        own = slice(parallel.tp_rank * size, (parallel.tp_rank + 1) * size)
        kernel = self._method.moe_kernel.fused_experts
        for leaf, factors in shards:
            weight, a, b = self._layer.w2_weight, factors.a, factors.b
            if leaf == "down_proj":
                a = a[:, :, own]
            else:
                weight = self._layer.w13_weight
                b = torch.cat([half[:, own] for half in b.chunk(2, dim=1)], dim=1)
            update = Factors(a.to(weight.device), b.to(weight.device), factors.scale)
            wide = update.beside(weight.data)
            kernel.updates[leaf] = update, wide
            # A second copy of the experts would be too many.
            weight.data = wide[..., : weight.shape[-1]]

    def remove(self) -> None:
        """Let vLLM compute by its own kernel, from the next weights on."""
        self._use(self._class)
        for weight in (self._layer.w13_weight, self._layer.w2_weight):
            weight.data = weight.data.contiguous()

    def _use(self, kernel: Any) -> None:
        """Let vLLM make a kernel of this class when it has loaded the next weights."""
        self._method.experts_cls, self._method.moe_kernel = kernel, None


def adapted(kernel: Any) -> Any:
    """A vLLM kernel of experts that adds updates to weights as they are loaded."""

    class AdaptedExperts(kernel):
        used = False

        def __init__(self, *arguments: Any, **named: Any):
            super().__init__(*arguments, **named)
            self.updates: dict[str, tuple[Factors, torch.Tensor]] = {}

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
            gate_up, wide_1 = self.updates.get("gate_up_proj", (None, w1))
            down, wide_2 = self.updates.get("down_proj", (None, w2))
            weights = wide_1, wide_2
            output.copy_(experts_forward(hidden_states, topk_ids, topk_weights, weights, (gate_up, down), silu_and_mul))

    return AdaptedExperts


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
