"""How evenly a mixture-of-experts policy spreads the tokens that it is trained on over its experts.

A router that sends most tokens to few experts leaves the others untrained: the load is what balance losses (DeepSeek-V2
report, arXiv 2405.04434, section 2.2.3) hold even, and neither Chat SFT nor GRPO has such a loss here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

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
        for name, block in network.named_modules():
            router = getattr(block, "gate", getattr(block, "router", None))
            layer = re.search(r"layers\.(\d+)", name)
            if hasattr(block, "experts") and isinstance(router, torch.nn.Module) and layer:
                router.register_forward_hook(partial(self._count, int(layer[1])))

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
        # transformers' routers return (logits [T, E], weights, chosen), AutoEP's (weights, chosen, tokens of each expert [E]).
        spread = output[-1].dim() == 1
        chosen, experts = (output[1], len(output[-1])) if spread else (output[-1], output[0].shape[-1])
        if chosen.is_floating_point():
            return
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(experts, dtype=torch.long, device=chosen.device)
        times = self._counted[self._passes.get(layer, 0)]
        self._passes[layer] = self._passes.get(layer, 0) + 1
        # No boolean index and no bincount: on a GPU both would wait for it.
        self._counts[layer].scatter_add_(0, chosen.flatten(), times.repeat_interleave(chosen.shape[-1]))


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
