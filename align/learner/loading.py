"""How a model gets to all ranks though rank 0 alone reads it: the other ranks never hold more of it in memory than they keep.

Rank 0 loads the checkpoint, the others make the same model without content (`load_from_rank_0`). The parameters' content follows one after
the other: DeepSpeed's engine broadcasts them from rank 0, its `zero.Init` does as it partitions them under ZeRO-3, and for what has no
engine there is `fill_from_rank_0`. Experts that AutoEP spreads must be there before it divides them: `scatter_experts`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from align.errors import UserError


def load_from_rank_0(load: Callable[..., Any], device: torch.device) -> Any:
    """What `load()` returns on rank 0, and elsewhere what `load(empty=True)` does, with rank 0's buffers, dtypes and random state.

    All of it is on the CPU; `device` is where the ranks' process group can send from. Raises on all ranks what rank 0's `load` raises, and
    UserError on a rank that makes another model, as its node has another `config.json`.
    """
    if dist.get_world_size() == 1:
        return load()
    if dist.get_rank() == 0:
        try:
            model = load()
        except Exception as error:
            told = error if isinstance(error, UserError) else RuntimeError(f"rank 0 cannot load the model: {error!r}")
            dist.broadcast_object_list([told, None])
            raise
        dist.broadcast_object_list([layout(model), torch.get_rng_state()])
    else:
        received: list[Any] = [None, None]
        dist.broadcast_object_list(received)
        found, random_state = received
        if isinstance(found, Exception):
            raise found
        model = load(empty=True)
        follow(model, found)
        # What is drawn from here on, such as dropout, is as if this rank had loaded the model itself.
        torch.set_rng_state(random_state)
    for buffer in model.buffers():
        sent = buffer.data.to(device).contiguous()
        dist.broadcast(sent, 0)
        if dist.get_rank() > 0:
            buffer.data = sent.to(buffer.device)
    return model


def layout(model: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and dtype of each parameter and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.shape, tensor.dtype) for name, tensor in named}


def follow(model: torch.nn.Module, expected: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Give a model without content rank 0's dtypes. Raises UserError where its tensors have other names or shapes."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := sorted(shapes.items() ^ {name: shape for name, (shape, _) in expected.items()}.items()):
        raise UserError(
            f"model.path: learner rank {dist.get_rank()} makes another model of it than rank 0: {wrong[0][0]} is not the same. Cause: its "
            "node has another config.json. Cure: copy the model's small files from rank 0's node"
        )
    for name, tensor in tensors.items():
        tensor.data = tensor.data.to(expected[name][1])


def fill_from_rank_0(model: torch.nn.Module) -> None:
    """Give the parameters of a model that is on the ranks' device the content that they have on rank 0."""
    if dist.get_world_size() > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)


def scatter_experts(model: torch.nn.Module, size: int, device: torch.device) -> None:
    """Give each rank, from rank 0, the content of the experts that AutoEP leaves to it when `size` ranks share those of a layer."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, parameter in model.named_parameters():
        if ".experts." not in name or parameter.dim() != 3:
            continue
        own = parameter.data.chunk(size)[rank % size]
        received = torch.empty_like(own, device=device)
        parts = parameter.data.to(device).chunk(size) if rank == 0 else ()
        dist.scatter(received, [parts[other % size] for other in range(ranks)] if parts else None)
        own.copy_(received)
