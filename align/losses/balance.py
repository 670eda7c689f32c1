"""Balance losses, which keep routers from sending most tokens to few experts (DeepSeek-V2 report, arXiv:2405.04434, section 2.2.3)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where the tokens of B sequences, or of parts of them, went in one MoE layer. The sums of a sequence's parts add up to its own."""

    tokens: Tensor
    """[B], how many there are."""
    affinities: Tensor
    """[B, E], the sum of their affinities to each expert. The only one with a gradient."""
    chosen: Tensor
    """[B, E], how many chose each expert."""
    sent: Tensor
    """[B, D], how many went to each device: once, however many of its experts they chose."""


def routing_sums(logits: Tensor, expert_ids: Tensor, mask: Tensor, devices: int = 1) -> Routing:
    """The sums over the tokens of each sequence under `mask` [B, T] bool, in float32 or the wider dtype of the logits.

    ``logits [B, T, E]`` are the router's, whose affinities are the *full* softmax, before the top-k or the limit of devices sets
    any to 0. ``expert_ids [B, T, K]`` int64 are the experts that the tokens went through. Device i of D holds the i-th E / D experts.
    """
    experts = logits.shape[-1]
    probs = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    ids = torch.where(mask[..., None], expert_ids, 0)
    real = mask[..., None].to(probs.dtype)
    chosen = probs.new_zeros(len(mask), experts).scatter_add_(1, ids.flatten(1), real.expand_as(ids).flatten(1))
    on_device = probs.new_zeros(*mask.shape, devices).scatter_(2, ids // (experts // devices), 1.0)
    affinities = torch.where(mask[..., None], probs, 0.0).sum(1)
    return Routing(real.sum((1, 2)), affinities, chosen, (on_device * real).sum(1))


def balance_losses(routing: Routing, top_k: int, devices_a_token: int = 1) -> Tensor:
    """The expert-, device- and communication-level balance losses of one MoE layer, ``[B, 3]``, before their factors.

    DeepSeek-V2 report (arXiv:2405.04434) eq. 23-31, for each sequence of T tokens apart, as in the released model (``seq_aux``)::

        expert         sum_j f_j P_j       f_j   = E / (K T) * tokens that chose expert j,   P_j = 1/T sum_t s_jt
        device         sum_i f'_i P'_i     f'_i  = mean of f_j over the experts of device i,  P'_i = sum of their P_j
        communication  sum_i f"_i P'_i     f"_i  = D / (M T) * tokens sent to device i

    with K = `top_k` and M = `devices_a_token`, the most devices that a token may be sent to. Even routing gives 1, a sequence
    without tokens 0. The gradient flows through P alone. The caller multiplies by the factors (alpha_1 to alpha_3) over the number of
    sequences in the global batch.
    """
    tokens, devices = routing.tokens.clamp(min=1)[:, None], routing.sent.shape[1]
    fractions = routing.chosen * routing.chosen.shape[1] / (top_k * tokens)
    affinities = routing.affinities / tokens
    of_devices = affinities.unflatten(1, (devices, -1)).sum(2)
    sent = routing.sent * devices / (devices_a_token * tokens)
    expert = (fractions * affinities).sum(1)
    device = (fractions.unflatten(1, (devices, -1)).mean(2) * of_devices).sum(1)
    return torch.stack([expert, device, (sent * of_devices).sum(1)], dim=1)
