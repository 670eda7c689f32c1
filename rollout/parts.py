"""Where two engines part: what the parts of one model compute for the same tokens, in vLLM and in transformers.

What one engine's parts computed is noted. The other engine then computes the same tokens, each of its layers from what came into that layer
in the first one: so a part that is wrong shows as itself, and not in all that comes after it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from rollout.types import Trajectory, Versions

Parts = dict[str, torch.Tensor]
"""What parts of a model computed, [tokens, width] float32 on the CPU, by the names that `parts_of` gives them."""

MODULE = re.compile(r"(?:model\.)?(?:(norm)|layers\.(\d+)(?:\.([\w.]+))?)")
IN_LAYER = {
    "input_layernorm": "norm",
    "self_attn": "attention",
    "post_attention_layernorm": "norm after attention",
    **dict.fromkeys(["mlp", "block_sparse_moe"], "feed-forward"),
    **dict.fromkeys(["mlp.gate", "mlp.router", "mlp.router.gate", "block_sparse_moe.gate"], "router"),
}
"""The modules of a layer by the names of vLLM, of transformers and of DeepSpeed's spread experts."""
LAYER = re.compile(r"layer \d+")
FIRST_LAYER, LAST_NORM, HEAD = "layer 0", "last norm", "head"
EMBEDDING = "embedding"
"""What comes into the first layer: some models scale what they embed, in the module or behind it."""


@dataclass(frozen=True, slots=True)
class NotedTrajectory:
    """A trajectory, and what the parts of the sampler's model computed for its tokens but the last."""

    trajectory: Trajectory
    parts: Parts

    @property
    def weight_versions(self) -> list[Versions]:
        return list(self.trajectory.weight_versions)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far what two engines compute is apart: sums of squares, to be added over prompts."""

    apart: float
    size: float

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(self.apart + other.apart, self.size + other.size)

    @property
    def relative(self) -> float:
        """|a - b| / |b|, NaN where a number is not finite."""
        return float((self.apart / max(self.size, 1e-30)) ** 0.5)


def parts_of(model: Any) -> dict[str, torch.nn.Module]:
    """The modules of a model of vLLM or transformers that are compared, by the names of what they are, such as "layer 3, router".

    "layer 3" is the layer as a whole.
    """
    found = {}
    for name, module in model.named_modules():
        match = MODULE.fullmatch(name)
        if match is None:
            continue
        norm, layer, rest = match.groups()
        if norm:
            found[LAST_NORM] = module
        elif rest is None:
            found[f"layer {layer}"] = module
        elif rest in IN_LAYER:
            part = "experts" if hasattr(module, "experts") else IN_LAYER[rest]
            found[f"layer {layer}, {part}"] = module
    return found


class PartNotes:
    """Notes what the parts of a model compute from now on, until `close`."""

    def __init__(self, model: Any):
        self._passes: dict[str, list[torch.Tensor]] = {}
        self._hooks = watch(parts_of(model), self._note)

    def close(self) -> Parts:
        """What was computed, the tokens of one forward pass after the other."""
        for hook in self._hooks:
            hook.remove()
        return {name: torch.cat(passes) for name, passes in self._passes.items()}

    def _note(self, name: str, _: Any, __: Any, output: Any) -> None:
        self._passes.setdefault(name, []).append(rows_of(name, output))


def watch(modules: Mapping[str, torch.nn.Module], see: Callable[[str, Any, Any, Any], None]) -> list[RemovableHandle]:
    """Let `see` be called with the name of each part and as a forward hook, and so with what comes into the first layer."""

    def see_input(layer: Any, inputs: Any, named: Mapping[str, Any]) -> None:
        see(EMBEDDING, layer, inputs, states_in(inputs, named))

    hooks = [module.register_forward_hook(partial(see, name)) for name, module in modules.items()]
    if FIRST_LAYER in modules:
        hooks.append(modules[FIRST_LAYER].register_forward_pre_hook(see_input, with_kwargs=True))
    return hooks


def states_in(inputs: Iterable[Any], named: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a layer: the first floating-point numbers."""
    return next(one for one in (*inputs, *named.values()) if isinstance(one, torch.Tensor) and one.is_floating_point())


def rows_of(name: str, output: Any) -> torch.Tensor:
    """What a part returned, [tokens, width] float32, in memory of its own: engines overwrite theirs."""
    if isinstance(output, tuple):
        # vLLM's layers return what is still to be added to the residual stream, and that; its norms return the stream beside their own.
        adds = LAYER.fullmatch(name) and len(output) == 2 and isinstance(output[1], torch.Tensor)
        output = output[0] + output[1] if adds else output[0]
    rows: torch.Tensor = output.detach().flatten(0, -2).to("cpu", torch.float32, copy=True)
    return rows


@contextmanager
def compared(model: Any, noted: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Distance]]:
    """Within the context, a forward pass of a transformers model over the tokens of `noted` is compared with it.

    The mapping gets the distance of each part that both have, in the order in which they are computed. The pass is of one sequence [1, T], of
    whose last tokens `noted` may lack some.
    """
    found: dict[str, Distance] = {}
    modules = parts_of(model)
    hooks = watch(modules, partial(_compare, found, noted))
    layers = [name for name in modules if LAYER.fullmatch(name)]
    comes_from = dict(zip([*layers, LAST_NORM], [EMBEDDING, *layers], strict=True))
    for name, module in modules.items():
        if name in comes_from and comes_from[name] in noted:
            hooks.append(module.register_forward_pre_hook(_given(noted[comes_from[name]])))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _given(states: torch.Tensor) -> Callable[[Any, Any], Any]:
    """A hook that replaces the first argument [1, T, H] of a module by `states`, as far as there are any."""

    def replace(_: Any, inputs: Any) -> Any:
        hidden = inputs[0].clone()
        hidden[0, : len(states)] = states.to(hidden)
        return hidden, *inputs[1:]

    return replace


def _compare(
    found: dict[str, Distance], noted: Mapping[str, torch.Tensor], name: str, _: Any, __: Any, output: Any
) -> None:
    theirs = noted.get(name)
    if theirs is None or LAYER.fullmatch(name):
        return
    ours = rows_of(name, output)[: len(theirs)].double()
    if ours.shape == theirs.shape:
        found[name] = Distance(float((ours - theirs).square().sum()), float(theirs.double().square().sum()))


def start_noting(worker: Any) -> None:
    """Note from now on what the parts of a vLLM worker process compute."""
    worker.part_notes = PartNotes(worker.model_runner.get_model())


def take_parts(worker: Any) -> Parts:
    """What was computed since `start_noting`, which ends."""
    parts: Parts = worker.part_notes.close()
    return parts
