"""From pairs of completions of any length to micro-batches: both completions of a pair in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """Two conversations of one prompt as token ids, each up to its end-of-sequence token; the first is preferred.

    `weight` carries the denominator of the whole batch; `margin` is subtracted from the difference of the rewards.
    """

    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float = 0.0
    weight: float = 0.0

    @property
    def padded_length(self) -> int:
        """The tokens of both in one batch, padding included."""
        return 2 * max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Padded tensors of B pairs: `token_ids` [2B, T] int64, the chosen ones first; `margins` and `weights` [B] float32."""

    token_ids: torch.Tensor
    margins: torch.Tensor
    weights: torch.Tensor


def collate_pairs(pairs: Sequence[TrainingPair], pad_id: int, device: torch.device) -> PairBatch:
    """The pairs as a batch on a device."""
    return PairBatch(
        token_ids=pad_right([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)], pad_id, device),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32, device=device),
        weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32, device=device),
    )


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> torch.Tensor:
    """Token ids [B, T] int64. Under a causal mask no real token attends to padding on its right, so none needs masking."""
    width = max(map(len, sequences))
    return torch.tensor([[*s, *[pad_id] * (width - len(s))] for s in sequences], dtype=torch.int64, device=device)
