"""The learner of a reward model: ranks that compare the two completions of a pair, and their group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from align.learner.balance import Balance, BalanceLosses, balance_metrics
from align.learner.batch import in_order, plan_micro_batches, share_out, whole_rows
from align.learner.group import RankGroup
from align.learner.loading import load_from_rank_0
from align.learner.rank import LearnerRank, Trained
from align.losses import pairwise_loss, pointwise_loss
from align.model.reward_model import load_reward_model
from align.recipe import LearnerOptions, ModelOptions

PairLoss = Literal["pairwise", "pointwise"]


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
    """Padded tensors of B pairs: `token_ids` [2B, T] int64, the chosen ones first; `margins` and `weights` [B] float32.

    `trained` [2B, T] bool is true on the tokens of pairs that have a weight.
    """

    token_ids: torch.Tensor
    trained: torch.Tensor
    margins: torch.Tensor
    weights: torch.Tensor


def collate_pairs(pairs: Sequence[TrainingPair], pad_id: int, device: torch.device) -> PairBatch:
    """The pairs as a batch on a device."""
    both = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    trained = [[pair.weight > 0] * len(tokens) for pair, tokens in zip([*pairs, *pairs], both, strict=True)]
    return PairBatch(
        token_ids=pad_right(both, pad_id, device),
        trained=pad_right(trained, False, device).bool(),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32, device=device),
        weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32, device=device),
    )


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> torch.Tensor:
    """Token ids [B, T] int64. Under a causal mask no real token attends to padding on its right, so none needs masking."""
    width = max(map(len, sequences))
    return torch.tensor([[*s, *[pad_id] * (width - len(s))] for s in sequences], dtype=torch.int64, device=device)


class Rewards(torch.nn.Module):
    """A reward model as a function from conversations to numbers; DeepSpeed wraps this module."""

    def __init__(self, reward_model: Any):
        super().__init__()
        self.reward_model = reward_model

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`token_ids` [B, T], padded on the right -> the rewards [B] at their end-of-sequence tokens, float32."""
        rewards: torch.Tensor = self.reward_model(input_ids=token_ids, use_cache=False).logits[:, 0]
        return rewards.float()


@dataclass(slots=True)
class PairSums:
    """Sums over the pairs of a batch; add those of all micro-batches and ranks, then divide by `pairs`.

    `loss` is already divided by the batch's denominator. A pair with equal rewards is half right.
    """

    loss: float = 0.0
    pairs: int = 0
    right: float = 0.0
    difference: float = 0.0
    padded_tokens: int = 0

    def add(self, other: "PairSums") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class RewardModelRank(LearnerRank):
    """A rank that trains a reward model on pairs."""

    @property
    def _network(self) -> Any:
        return self._engine.module.reward_model

    def setup(self, master: str, port: int, seed: int) -> Trained:
        """Join the other ranks and load the reward model."""
        self._join(master, port, seed)
        loaded = load_from_rank_0(partial(load_reward_model, self._model, self._tokenizer), self._device)
        reward_model = self._with_adapter(loaded, "SEQ_CLS")
        self._pad_id = self._tokenizer.pad_token_id
        trained = self._start_engine(Rewards(reward_model), reward_model)
        self._balance = BalanceLosses(reward_model, self._options.balance)
        self._settle()
        return trained

    def accumulate(self, micro_batches: list[list[TrainingPair]], loss: PairLoss, batch_size: int = 1) -> PairSums:
        """Forward and backward passes of this rank's micro-batches, of a batch of `batch_size` pairs on all ranks; gradients add up until `apply`."""
        total = PairSums()
        self._engine.train()
        for pairs in micro_batches:
            batch = collate_pairs(pairs, self._pad_id, self._device)
            with self._balance.watching([batch.trained]):
                chosen, rejected = self._engine(batch.token_ids).chunk(2)
                if loss == "pairwise":
                    losses = pairwise_loss(chosen, rejected, batch.margins)
                else:
                    losses = pointwise_loss(chosen, rejected)
                weighted = (losses * batch.weights).sum()
                self._backward(weighted + self._balance.loss(None, 2 * batch_size))
            difference = (chosen - rejected).detach()[batch.weights > 0]
            total.add(
                PairSums(
                    loss=float(weighted.detach()),
                    pairs=difference.numel(),
                    right=float((difference > 0).sum() + 0.5 * (difference == 0).sum()),
                    difference=float(difference.sum()),
                    padded_tokens=batch.token_ids.numel(),
                )
            )
        return total

    def take_balance(self) -> Balance:
        """The balance losses of this rank since they were last asked for."""
        return self._balance.take()

    def rewards(self, micro_batches: list[list[Sequence[int]]]) -> list[list[float]]:
        """The reward of every conversation, in the shape of the micro-batches."""
        self._engine.eval()
        results = []
        for sequences in micro_batches:
            with torch.no_grad():
                results.append(self._engine(pad_right(sequences, self._pad_id, self._device)).tolist())
        return results


class RewardModelGroup(RankGroup):
    """The learner of a reward model."""

    def __init__(self, model: ModelOptions, options: LearnerOptions, *, seed: int):
        super().__init__(RewardModelRank, model, options, seed)

    def accumulate(self, pairs: Sequence[TrainingPair], loss: PairLoss) -> PairSums:
        """Forward and backward over a batch; its gradient waits for `apply`."""
        work = share_out(pairs, self._plan([pair.padded_length for pair in pairs]), replace(pairs[0], weight=0.0))
        trained = max(1, sum(pair.weight > 0 for pair in pairs))
        calls = [r.accumulate.remote(part, loss, trained) for r, part in zip(self._ranks, work, strict=True)]
        total = PairSums()
        for sums in self._gather(calls, "computing gradients"):
            total.add(sums)
        return total

    def balance(self) -> dict[str, float]:
        """The balance losses of all `accumulate` since the last time; see `balance_metrics`."""
        return balance_metrics(self._gather([rank.take_balance.remote() for rank in self._ranks], "balancing experts"))

    def rewards(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each conversation: token ids up to the end-of-sequence token."""
        plan = self._plan([len(sequence) for sequence in sequences])
        work = share_out(sequences, plan, sequences[0])
        calls = [r.rewards.remote(part) for r, part in zip(self._ranks, work, strict=True)]
        return in_order(plan, self._gather(calls, "computing rewards"))

    def _plan(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        return plan_micro_batches(*whole_rows(lengths), self._options.micro_batch_tokens, self._options.ranks)
