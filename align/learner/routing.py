"""Routing replay: a learner's routers take the experts that tokens went through before, with weights of their own.

With the sampler's experts it is R3 (Ma et al., arXiv:2510.11370), with those of the learner before a step's first update R2 (Zheng et al.,
arXiv:2507.18071). The weights stay the learner's, so that the gradient reaches the routers: the affinities of the experts, normalised and
scaled as the model's own router does it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from align.errors import UserError
from align.learner.batch import UNKNOWN
from align.learner.experts import chosen_by, is_of_autoep, logits_of, routers_of

KEYS = "grpo.routing_replay, rollout.record_experts"
TOLERANCE = 1e-5
TIE = 1e-5
"""Two logits that are nearer than this are decided by rounding alone, in float32 too."""


class Routes(NamedTuple):
    """What was counted of a layer's tokens whose experts were given."""

    known: int
    """Tokens with experts."""
    changed: int
    """Those of them that the learner would have sent to other experts."""
    undecided: int
    """Those besides, where two logits were so near that rounding decided (`TIE`)."""
    fell_back: int
    """Tokens of which the sampler recorded no experts: they go where the learner sends them."""


Changes = dict[int, Routes]
"""What was counted, by layer."""


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
        """Within the context, the tokens of forward pass n are given `experts[n]` [rows, places, layers, k], below 0 where none are known.

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
        """How much of the routing was changed since this was last asked. Raises UserError where experts were given that no router can choose."""
        found: Changes = {}
        for layer, counts in self._changes.items():
            *routes, impossible = counts.tolist()
            if impossible:
                raise UserError(
                    f"{KEYS}: {impossible} tokens of layer {layer} are given experts that its router cannot choose, with an id twice or beyond its "
                    "last: are they of another model?"
                )
            found[layer] = Routes(*routes)
        self._changes.clear()
        return found

    def _route(self, place: int, layer: int, router: Any, inputs: Any, output: Any) -> Any:
        if not self._given and self._recorded is None:
            return None
        if not isinstance(output, tuple) or len(output) != 3:
            raise UserError(
                f"{KEYS}: {type(router).__name__} does not tell which experts it chooses; leave them out for this model"
            )
        if self._recorded is not None:
            self._recorded[layer].append(chosen_by(output).to(torch.int16))
        if not self._given:
            return None
        call = self._calls.get(layer, 0)
        self._calls[layer] = call + 1
        # What is computed again for the backward pass is of a single forward pass.
        passed = self._given[call % len(self._given)].flatten(0, 1)
        spread, logits = is_of_autoep(output), logits_of(router, inputs, output)
        weights, own = output[:2] if spread else output[1:]
        if passed.shape != (expected := (len(own), len(self.layers), own.shape[1])):
            raise UserError(
                f"{KEYS}: the experts that are given have the shape {tuple(passed.shape)}, tokens, layers and experts of a token, where this model's have "
                f"{expected}: are they of another model?"
            )
        given = passed[:, place].long()
        ordered = given.sort(dim=-1).values
        impossible = (ordered[:, 1:] == ordered[:, :-1]).any(dim=-1) | (ordered[:, -1] >= logits.shape[-1])
        given = given.clamp(max=logits.shape[-1] - 1)
        if self._forced and layer in self._unchecked:
            check_weights(router, logits, output, "grpo.routing_replay")
            self._unchecked.discard(layer)
        known = (given >= 0).all(dim=-1)
        changed = known & (ordered != own.sort(dim=-1).values).any(dim=-1)
        undecided = changed & rounding_decided(router, logits.detach(), own, given)
        fell_back = (given == UNKNOWN).any(dim=-1)
        counts = known, changed & ~undecided, undecided, fell_back, known & impossible
        counted = torch.stack([count.sum() for count in counts])
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


def rounding_decided(router: Any, logits: torch.Tensor, own: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Where [T] bool the router of `logits` [T, E] could as well have chosen the experts `given` [T, k] as its `own` [T, k]: see `is_tie`.

    A router with a correction bias of its own is taken to choose by sigmoid and bias, in the groups whose two best experts have the greatest sum (DeepSeek-V3, arXiv 2412.19437).
    """
    base = router.get_base_layer() if hasattr(router, "get_base_layer") else router
    bias = getattr(base, "e_score_correction_bias", None)
    if bias is None:
        return is_tie(logits, own, given)
    scores, groups = logits.float().sigmoid() + bias, getattr(base, "num_group", None) or 1
    if groups == 1:
        return is_tie(scores, own, given)
    of_groups = scores.unflatten(-1, (groups, -1))
    size = of_groups.shape[-1]
    sums = of_groups.topk(2, dim=-1).values.sum(dim=-1)
    return is_tie(scores, own, given) | is_tie(sums, own // size, given // size)


def is_tie(logits: torch.Tensor, own: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Where [T] bool an expert of `own` [T, k] that is not `given` [T, k] and one that is given alone have logits [T, E] within `TIE`.

    With groups too: the best experts of two groups then are that near.
    """
    same = own[:, :, None] == given[:, None, :]
    apart = logits.gather(-1, own)[:, :, None] - logits.gather(-1, given.clamp(min=0))[:, None, :]
    exchanged = ~same.any(dim=2)[:, :, None] & ~same.any(dim=1)[:, None, :]
    return (exchanged & (apart.abs() <= TIE)).flatten(1).any(dim=-1)


def add_changes(parts: Sequence[Changes]) -> Changes:
    """The counts of several ranks or passes together, without layers of which no token had experts, in order."""
    layers = sorted({layer for part in parts for layer in part})
    sums = {layer: Routes(*map(sum, zip(*(p[layer] for p in parts if layer in p), strict=True))) for layer in layers}
    return {layer: counts for layer, counts in sums.items() if counts.known}


def routing_metrics(parts: Sequence[Changes]) -> dict[str, float]:
    """The shares of tokens that the learner would have routed otherwise, of each layer and over all, and the first layer where it would.

    Also the shares over all layers that rounding decided and that had no known experts. Of all ranks' counts; empty without any.
    """
    by_layer = add_changes(parts)
    if not by_layer:
        return {}
    known, changed, undecided, fell_back = map(sum, zip(*by_layer.values(), strict=True))
    found = {
        "routing/changed": changed / known,
        "routing/undecided": undecided / known,
        "routing/fell_back": fell_back / (known + fell_back),
    }
    if changed:
        found["routing/first_layer"] = next(layer for layer, counts in by_layer.items() if counts.changed)
    return found | {f"routing/layer_{n}/changed": counts.changed / counts.known for n, counts in by_layer.items()}
