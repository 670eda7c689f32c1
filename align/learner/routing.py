"""Routing replay: a learner's routers take the experts that tokens went through before, with weights of their own.

With the sampler's experts it is R3 (Ma et al., arXiv:2510.11370), with those of the learner before a step's first update R2 (Zheng et al.,
arXiv:2507.18071). The weights stay the learner's, so that the gradient reaches the routers: the affinities of the experts, normalised and
scaled as the model's own router does it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from align.errors import UserError
from align.learner.experts import chosen_by, is_of_autoep, logits_of, routers_of

TOLERANCE = 1e-5
Changes = dict[int, tuple[int, int]]
"""By layer: how many tokens the learner would have sent to other experts than those given, of how many."""


class RoutingReplay:
    """Compares what the routers of a network choose with experts that are given, and can put these in the place of their own.

    Of a network without routers (a dense one) `layers` is empty.
    """

    def __init__(self, network: torch.nn.Module):
        """To be made when DeepSpeed's blocks are in place, and before whatever else hooks on the routers to see what is used."""
        self._given: Sequence[torch.Tensor] = ()
        self._forced = False
        self._recorded: dict[int, list[torch.Tensor]] | None = None
        self._calls: dict[int, int] = {}
        self._changes: dict[int, torch.Tensor] = {}
        routers = routers_of(network)
        self.layers = list(routers)
        self._unchecked = set(self.layers)
        for place, (layer, router) in enumerate(routers.items()):
            router.register_forward_hook(partial(self._route, place, layer))

    @contextmanager
    def given(self, experts: Sequence[torch.Tensor], *, forced: bool) -> Iterator[None]:
        """Within the context, the tokens of forward pass n are given `experts[n]` [rows, places, layers, k], -1 where none are known.

        They go through these where `forced`. The backward pass belongs inside: with gradient checkpointing it computes layers again.
        """
        self._given, self._forced, self._calls = experts, forced, {}
        try:
            yield
        finally:
            self._given = ()

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        """Note what the routers choose within the context: after it, the list has [tokens, layers, k] int16 of each forward pass."""
        own: dict[int, list[torch.Tensor]] = {layer: [] for layer in self.layers}
        passes: list[torch.Tensor] = []
        self._recorded = own
        try:
            yield passes
        finally:
            self._recorded = None
        passes += [torch.stack(chosen, dim=1) for chosen in zip(*own.values(), strict=True)]

    def take(self) -> Changes:
        """How much of the routing was changed since this was last asked."""
        found = {layer: (int(changed), int(known)) for layer, (changed, known) in self._changes.items()}
        self._changes.clear()
        return found

    def _route(self, place: int, layer: int, router: Any, inputs: Any, output: Any) -> Any:
        if self._recorded is not None:
            self._recorded[layer].append(chosen_by(output).to(torch.int16))
        if not self._given:
            return None
        call = self._calls.get(layer, 0)
        self._calls[layer] = call + 1
        # What is computed again for the backward pass is of a single forward pass.
        given = self._given[call % len(self._given)][:, :, place].flatten(0, 1).long()
        spread, logits = is_of_autoep(output), logits_of(router, inputs, output)
        weights, own = output[:2] if spread else output[1:]
        if layer in self._unchecked:
            check_weights(router, logits, output, "grpo.routing_replay")
            self._unchecked.discard(layer)
        known = (given >= 0).all(dim=-1)
        changed = known & (given.sort(dim=-1).values != own.sort(dim=-1).values).any(dim=-1)
        counted = torch.stack([changed.sum(), known.sum()])
        self._changes[layer] = self._changes.get(layer, 0) + counted
        if not self._forced:
            return None
        # Where the experts are the router's own, so are their order and the bits of their weights.
        chosen = torch.where(changed[:, None], given, own)
        weights = torch.where(changed[:, None], weights_of(router, logits, chosen).to(weights.dtype), weights)
        if not spread:
            return logits, weights, chosen
        tokens = torch.zeros_like(output[-1])
        return (
            weights,
            chosen,
            tokens.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=tokens.dtype)),
        )


def check_weights(router: Any, logits: torch.Tensor, output: tuple[torch.Tensor, ...], key: str) -> None:
    """Raise UserError, naming `key`, for a router whose weights for its own experts are not those of `weights_of`."""
    weights, own = output[:2] if is_of_autoep(output) else output[1:]
    ours = weights_of(router, logits.detach(), own).to(weights.dtype)
    if not torch.allclose(ours, weights.detach(), rtol=TOLERANCE if weights.dtype == torch.float32 else 1e-2):
        raise UserError(
            f"{key}: {type(router).__name__} weighs experts in a way that is not known here; leave it out for this model"
        )


def weights_of(router: Any, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The weights [T, k] float32 that a softmax router gives to the experts `chosen` [T, k], with gradient to its `logits` [T, E]."""
    base = router.get_base_layer() if hasattr(router, "get_base_layer") else router
    picked = logits.softmax(dim=-1, dtype=torch.float32).gather(-1, chosen)
    if getattr(base, "route_norm", getattr(base, "norm_topk_prob", type(base).__name__.startswith("Mixtral"))):
        picked = picked / picked.sum(dim=-1, keepdim=True)
    scale: float = getattr(base, "route_scale", getattr(base, "routed_scaling_factor", 1.0))
    return picked * scale


def routing_metrics(parts: Sequence[Changes]) -> dict[str, float]:
    """The share of tokens that the learner would have routed otherwise, of each layer and over all; of all ranks' counts, empty without any."""
    layers = sorted({layer for part in parts for layer in part})
    sums = {layer: [sum(part.get(layer, (0, 0))[i] for part in parts) for i in (0, 1)] for layer in layers}
    shares = {f"routing/layer_{layer}/changed": changed / known for layer, (changed, known) in sums.items() if known}
    if not shares:
        return {}
    changed, known = (sum(count[i] for count in sums.values()) for i in (0, 1))
    return {"routing/changed": changed / known} | shares
