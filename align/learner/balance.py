"""Balance losses of a learner, which keep its routers from sending most tokens to few experts (DeepSeek-V2 report, section 2.2.3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from align.errors import UserError
from align.learner.experts import chosen_by, logits_of, routers_of
from align.learner.routing import check_weights
from align.losses import Routing, balance_losses, routing_sums
from align.recipe import BalanceOptions

Balance = dict[str, tuple[float, float]]
"""By level: a sum of losses, and what to divide it by for their mean."""
LEVELS = ("expert", "device", "communication")


class BalanceLosses:
    """The balance losses of what passes through the routers of a network, of each sequence over its real tokens."""

    def __init__(self, network: Any, options: BalanceOptions):
        """To be made after what changes the routers' choice: the losses are of the experts that tokens go through.

        Raises UserError as `factors_of` does.
        """
        self._factors = factors_of(options, network.config)
        self._masks: Sequence[torch.Tensor] = ()
        self._calls: dict[int, int] = {}
        self._sums: dict[int, list[Routing]] = {}
        self._total, self._share = torch.zeros(3), 0.0
        if not any(self._factors):
            return
        self._devices = getattr(network.config, "n_group", None) or 1
        self._devices_a_token = getattr(network.config, "topk_group", None) or 1
        self._top_k = network.config.num_experts_per_tok
        routers = routers_of(network)
        self._unchecked = set(routers)
        for layer, router in routers.items():
            router.register_forward_hook(partial(self._add_up, layer))

    @contextmanager
    def watching(self, counts: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within the context, the token at [row, place] of forward pass n counts where `counts[n][row, place]` is not 0.

        The backward pass belongs inside: with gradient checkpointing it computes layers again.
        """
        self._masks, self._calls, self._sums = [count.bool() for count in counts], {}, {}
        try:
            yield
        finally:
            self._masks, self._sums = (), {}

    def loss(self, prefix_of: torch.Tensor | None, batch_size: int) -> torch.Tensor | float:
        """What the rows that have passed add to the loss, of a batch of so many sequences that are trained on, those of all ranks.

        With two passes, row b goes on from row `prefix_of[b]` of the first one, and their sums are one sequence's.
        """
        if not self._sums:
            return 0.0
        layers = []
        for passes in self._sums.values():
            own = whole = passes[-1]
            if prefix_of is not None:
                whole = Routing(*(a + b[prefix_of] for a, b in zip(own, passes[0], strict=True)))
            # A row that is not trained on may have a prefix that others are.
            losses = torch.where(
                own.tokens[:, None] > 0, balance_losses(whole, self._top_k, self._devices_a_token), 0.0
            )
            layers.append(losses.sum(0) / batch_size)
        found = torch.stack(layers)
        self._total += found.detach().mean(0).cpu()
        self._share += float((own.tokens > 0).sum()) / batch_size
        return (found.sum(0) * found.new_tensor(self._factors)).sum()

    def take(self) -> Balance:
        """The losses since this was last asked, those of layers as a mean and before their factors; of levels whose factor is not 0."""
        found = {
            level: (float(total), self._share)
            for level, total, factor in zip(LEVELS, self._total, self._factors, strict=True)
            if factor
        }
        self._total, self._share = torch.zeros(3), 0.0
        return found

    def _add_up(self, layer: int, router: Any, inputs: Any, output: Any) -> None:
        if not self._masks:
            return
        call = self._calls.get(layer, 0)
        self._calls[layer] = call + 1
        mask = self._masks[call % len(self._masks)]
        logits, chosen = logits_of(router, inputs, output), chosen_by(output)
        if layer in self._unchecked:
            check_weights(router, logits, output, "learner.balance")
            self._unchecked.discard(layer)
        rows = (*mask.shape, -1)
        sums = routing_sums(logits.view(rows), chosen.view(rows), mask, self._devices)
        # What is computed again for the backward pass, when the loss is known, is there for its gradient alone.
        if call < len(self._masks):
            self._sums.setdefault(layer, []).append(sums)


def factors_of(options: BalanceOptions, config: Any) -> tuple[float, float, float]:
    """The factors of the three levels for a model of this configuration.

    Raises UserError where it has no experts, names no factor of its own that `expert: config` could take, or has no groups of experts for
    the devices of the other two.
    """
    expert = options.expert
    if not (expert or options.device or options.communication):
        return 0.0, 0.0, 0.0
    if not getattr(config, "num_experts_per_tok", None):
        raise UserError(
            f"learner.balance is for a mixture of experts, and a {config.model_type} has none: leave it out"
        )
    if expert == "config":
        expert = getattr(config, "aux_loss_alpha", None) or getattr(config, "router_aux_loss_coef", None) or 0.0
        if not expert:
            raise UserError(
                "learner.balance.expert: config takes the factor of the checkpoint, whose config.json names none (aux_loss_alpha, "
                "router_aux_loss_coef): give a number"
            )
    if (options.device or options.communication) and (getattr(config, "n_group", None) or 1) == 1:
        raise UserError(
            "learner.balance: device and communication are for models that limit a token to some groups of experts, and the "
            f"config.json of this {config.model_type} names no groups (n_group): leave them out"
        )
    return float(expert), options.device, options.communication


def balance_metrics(parts: Sequence[Balance]) -> dict[str, float]:
    """The mean balance loss of a sequence and a layer, before its factor, of all ranks' parts: 1 where the load is even."""
    levels = parts[0] if parts else {}
    sums = {level: [sum(part[level][i] for part in parts) for i in (0, 1)] for level in levels}
    return {f"balance/{level}": total / share for level, (total, share) in sums.items() if share}
