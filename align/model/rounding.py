"""Weights rounded to the grid of a narrower format and back, so that engines load ordinary tensors of the model's dtype.

What is rounded is what quantised checkpoints quantise: the matrices of attention, of dense layers and of experts. Routers (and the gates of
shared experts), norms, biases, embeddings and the head stay as they are, but for `bfloat16`, which checkpoints have for all of a model.
"""

import re
from collections.abc import Iterable, Iterator

import torch

from align.model.names import FUSED, PARTS
from rollout import Precision

INT8_MAX = 127
BLOCK = 128
"""Rows and columns that share a scale in fp8, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.2)."""
LEFT = re.compile(
    "|".join([*(PARTS[part] for part in ("router", "norms", "embeddings", "head")), r"\.shared_expert_gate\."])
)


def on_grid(weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """`weight` [..., rows, columns] rounded to the nearest point of a grid, ties to even, in its own dtype; computed in float32.

    int8 is symmetric, with a scale for each row (an output channel): its largest |value| is 127. fp8 is e4m3 with a scale for each block of
    `BLOCK` x `BLOCK`, smaller at the edges, whose largest |value| is 448.
    """
    if precision == "model":
        return weight
    if precision == "bfloat16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    exact = weight.float()
    if precision == "int8":
        scale = (exact.abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        return ((exact / scale).round().clamp(-INT8_MAX, INT8_MAX) * scale).to(weight.dtype)
    rounded = torch.empty_like(exact)
    for rows, into in zip(exact.split(BLOCK, dim=-2), rounded.split(BLOCK, dim=-2), strict=True):
        for block, place in zip(rows.split(BLOCK, dim=-1), into.split(BLOCK, dim=-1), strict=True):
            place.copy_(_on_fp8_grid(block))
    return rounded.to(weight.dtype)


def _on_fp8_grid(block: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (block.abs().amax(dim=(-2, -1), keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (block / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * scale


def is_rounded(name: str, dimensions: int, precision: Precision) -> bool:
    """Whether a tensor with this name, in a checkpoint or in transformers, and so many dimensions is one that `precision` rounds."""
    if precision in ("model", "bfloat16"):
        return precision != "model"
    return dimensions > 1 and LEFT.search(name) is None


def rounded(
    named_tensors: Iterable[tuple[str, torch.Tensor]], precision: Precision
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors, those that `precision` rounds on its grid."""
    for name, tensor in named_tensors:
        yield name, on_grid(tensor, precision) if is_rounded(name, tensor.dim(), precision) else tensor


@torch.no_grad()
def round_parameter(name: str, parameter: torch.Tensor, precision: Precision) -> torch.Tensor | None:
    """Round a parameter of a transformers model in place, as `rounded` does its tensors in a checkpoint.

    Returns what it was, a copy in the CPU's memory; None where it is not rounded.
    """
    if not is_rounded(name, parameter.dim(), precision):
        return None
    before = parameter.detach().to("cpu", copy=True)
    fused = FUSED.match(name)
    for part in parameter.chunk(2, dim=-2) if fused and fused["kind"] == "gate_up_proj" else [parameter]:
        # One expert after the other: what the grid is computed with takes several times the memory of what is rounded.
        for matrix in part if part.dim() > 2 else [part]:
            matrix.copy_(on_grid(matrix, precision))
    return before
