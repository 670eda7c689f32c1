"""The head and the softmax after it in tiles of positions: the logits of a micro-batch are never in memory as a whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from align.losses import token_entropies, token_log_probs

TILE = 2**24  # logits, which are 64 MiB in float32: up to four copies are in memory at a time
MARK = 1000.0  # no cap and no scale leaves it as it is


@contextmanager
def head_replaced(head: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, `forward` is what the module `head` computes.

    The module that is called is still the head: what DeepSpeed does around it, gathering its weights under ZeRO-3 and sharing out its
    gradient, is done.
    """
    before = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def head_is_last(policy: Any, **arguments: Any) -> bool:
    """Whether a transformers model returns what its head computes: Gemma 2 caps its logits after it, and Granite scales them.

    It is called once, on one token, with `arguments`.
    """
    was_training, token = policy.training, torch.zeros(1, 1, dtype=torch.int64, device=policy.device)
    marks = head_replaced(policy.get_output_embeddings(), lambda states: torch.full_like(states[..., :1], MARK))
    with torch.no_grad(), marks:
        logits = policy.eval()(input_ids=token, **arguments).logits
    policy.train(was_training)
    return bool((logits == MARK).all())


def head_log_probs(
    head: Any,
    forward: Callable[[Tensor], Tensor],
    states: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    with_entropy: bool = False,
) -> Tensor:
    """`align.losses.token_log_probs` of the logits that `head`, whose forward pass is `forward`, computes from `states` [B, K, H].

    `targets` is [B, K] int64. The result is [1, B, K] float32, in nats, and [2, B, K] `with_entropy`, which comes second and has no gradient.
    Backward computes the logits of each tile again. The gradient of a linear layer adds up in float32, whatever the dtype of its weights. Any
    other head, such as a LoRA adapter on one, is differentiated tile by tile.
    """
    rows, tokens = states.flatten(0, 1), targets.flatten()
    if type(head) is torch.nn.Linear:
        found = LinearLogProbs.apply(rows, head.weight, head.bias, tokens, temperature, with_entropy)
    else:

        def of_tile(rows: Tensor, tokens: Tensor) -> Tensor:
            return of_logits(forward(rows), tokens, temperature, with_entropy)

        size = rows_of_a_tile(head.out_features)
        tiles = zip(rows.split(size), tokens.split(size), strict=True)
        found = torch.cat([checkpoint(of_tile, *tile, use_reentrant=False) for tile in tiles], dim=1)
    return found.view(-1, *targets.shape)


def of_logits(logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> Tensor:
    """What `head_log_probs` returns, of logits [..., V] and targets [...]: [1 or 2, ...]."""
    log_probs = token_log_probs(logits[None], targets[None], temperature)
    return torch.cat([log_probs, token_entropies(logits[None], temperature)]) if with_entropy else log_probs


def rows_of_a_tile(vocabulary: int) -> int:
    """How many positions make a tile."""
    return max(1, TILE // vocabulary)


class LinearLogProbs(torch.autograd.Function):
    """`of_logits` of ``states @ weight.T + bias``, with ``states`` [N, H] and targets [N].

    The gradient of the log-probabilities by the logits is ``gradient * (onehot(target) - softmax) / temperature``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> Tensor:
        ctx.save_for_backward(states, weight, bias, targets)
        ctx.temperature = temperature
        found = states.new_empty(1 + with_entropy, len(states), dtype=torch.float32)
        for tile in tiles_of(states, weight):
            found[:, tile] = of_logits(linear(states[tile], weight, bias), targets[tile], temperature, with_entropy)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets = ctx.saved_tensors
        of_states, of_weight, of_bias, *_ = ctx.needs_input_grad
        by_states = torch.empty_like(states) if of_states else None
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        by_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        for tile in tiles_of(states, weight):
            gradient, target = gradients[0][0, tile, None], targets[tile, None]
            logits = linear(states[tile], weight, bias).float().div_(ctx.temperature)
            logits.sub_(logits.logsumexp(-1, keepdim=True)).exp_().mul_(-gradient)
            by_logits = logits.scatter_add_(-1, target, gradient).div_(ctx.temperature).to(states.dtype)
            if by_states is not None:
                by_states[tile] = by_logits @ weight
            if by_weight is not None:
                add_product(by_weight, by_logits.T, states[tile])
            if by_bias is not None:
                by_bias += by_logits.sum(0)
        return by_states, *(x if x is None else x.to(weight.dtype) for x in (by_weight, by_bias)), None, None, None


def tiles_of(states: Tensor, weight: Tensor) -> Iterator[slice]:
    """The positions of each tile."""
    size = rows_of_a_tile(weight.shape[0])
    return (slice(start, start + size) for start in range(0, len(states), size))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to a float32 total, without a copy where that is the dtype of all."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
