"""From sequences of any length to micro-batches: by token budget, balanced over ranks, padded on the right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rollout.types import Experts, expert_dtype, not_routed

Floats = Sequence[float] | npt.NDArray[np.float32]
UNKNOWN = -2
"""In place of a token's experts where the sampler should have recorded them and did not."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSequence:
    """A prompt with what follows it, and what the loss needs to know of it.

    `token_ids` [T] begin with the prompt; `sampled` [T] is true on the S tokens that are trained on, which the policy drew or is
    to draw: false on the prompt and on what an environment wrote between turns. Each of them counts in the loss with
    `weight`, which carries the denominator of the whole batch (`align.losses.completion_weights`). For GRPO, `advantage` is the
    group-relative one, and `sampler_log_probs` and `old_log_probs` [S] are the log-probabilities that the tokens were drawn
    with and those of the learner before the step's first update. `experts` [T - 1, layers, k] are those that the tokens went
    through, where they are known. Sequences with the same `group` have the same prompt, the
    tokens before the first sampled one; where it is None, a prompt is shared with no other sequence.
    """

    token_ids: Sequence[int]
    sampled: npt.NDArray[np.bool_]
    weight: float
    advantage: float = 0.0
    sampler_log_probs: Floats | None = None
    old_log_probs: Floats | None = None
    group: int | None = None
    experts: Experts | None = None

    @classmethod
    def of_completion(cls, token_ids: Sequence[int], prompt_length: int, weight: float, **others: Any) -> Self:
        """The sequence of a prompt and one completion, all that comes after `prompt_length` tokens."""
        return cls(token_ids, np.arange(len(token_ids)) >= prompt_length, weight, **others)

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first sampled one."""
        return int(self.sampled.argmax())

    @property
    def sampled_tokens(self) -> int:
        return int(self.sampled.sum())


@dataclass(frozen=True, slots=True)
class PolicyPair:
    """The two completions of a preference, each after their prompt; the first was found to be the better one."""

    chosen: TrainingSequence
    rejected: TrainingSequence

    @property
    def both(self) -> tuple[TrainingSequence, TrainingSequence]:
        """The chosen one, then the rejected one."""
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded tensors of B sequences; K positions, the last of each row, cover all sampled tokens.

    `token_ids` [B, T] int64; `targets` [B, K] int64, `mask` [B, K] bool (true on sampled tokens), `weights` [B, K],
    `advantages` [B], `sampler_log_probs` and `old_log_probs` [B, K] float32 (None when the sequences have none).

    Where prompts are shared, rows of `token_ids` begin with the last token of a prompt; what is before it, of G different
    prompts, is `prefixes` [G, P] int64, padded on the left, with `prefix_mask` [G, P] bool, and row b goes on from prefix
    `prefix_of[b]`.

    `experts` [B, T, layers, k] int16, and `prefix_experts` [G, P, layers, k], are those that the tokens went through, -1 where there are
    none (padding, the last token) and `UNKNOWN` where they were not recorded; None where no sequence has any.
    """

    token_ids: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor
    advantages: torch.Tensor
    sampler_log_probs: torch.Tensor | None
    old_log_probs: torch.Tensor | None
    prefixes: torch.Tensor | None = None
    prefix_mask: torch.Tensor | None = None
    prefix_of: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    prefix_experts: torch.Tensor | None = None

    @property
    def routes(self) -> list[torch.Tensor]:
        """The experts that are known, of each pass through the network: before the rows where prompts are shared, then of the rows."""
        return [experts for experts in (self.prefix_experts, self.experts) if experts is not None]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the log-probabilities are computed from."""
        names = ("token_ids", "targets", "prefixes", "prefix_mask", "prefix_of")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def padded_tokens(self) -> int:
        """The tokens that pass through the network."""
        return self.token_ids.numel() + (0 if self.prefixes is None else self.prefixes.numel())

    def token_counts(self) -> list[torch.Tensor]:
        """In how many sequences that are trained on each token is: [B, T], and before it [G, P] where prompts are shared."""
        places = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        ends = torch.where(self.mask, places[-self.mask.shape[1] :] + 1, 0).amax(dim=1)
        trained_on = (self.mask & (self.weights > 0)).any(dim=1)
        rows = ((places < ends[:, None]) & trained_on[:, None]).long()
        if self.prefix_mask is None or self.prefix_of is None:
            return [rows]
        sequences = rows.new_zeros(len(self.prefix_mask)).index_add_(0, self.prefix_of, trained_on.long())
        return [self.prefix_mask * sequences[:, None], rows]

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        tensors: Any = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: t if t is None else t.to(device) for name, t in tensors.items()}
        return Batch(**moved)


def collate_after_prompts(sequences: Sequence[TrainingSequence], pad_id: int) -> Batch:
    """Each group's prompt once, all but its last token, and what comes after it of each sequence."""
    prefix_of = prompt_numbers(sequences)
    prefixes = [s.token_ids[: s.prompt_length - 1] for s in first_of_each(sequences, prefix_of)]
    width = max(1, *map(len, prefixes))
    padded = np.full((len(prefixes), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(prefixes), width), dtype=bool)
    for row, prefix in enumerate(prefixes):
        # On the left, for models whose layers see only so many places back.
        padded[row, width - len(prefix) :] = prefix
        mask[row, width - len(prefix) :] = True
    after = [
        replace(
            s,
            token_ids=s.token_ids[s.prompt_length - 1 :],
            sampled=s.sampled[s.prompt_length - 1 :],
            experts=None if s.experts is None else s.experts[s.prompt_length - 1 :],
        )
        for s in sequences
    ]
    known = [
        None if s.experts is None else s.experts[: s.prompt_length - 1] for s in first_of_each(sequences, prefix_of)
    ]
    return replace(
        collate(after, pad_id),
        prefix_experts=padded_experts(known, [width - len(prefix) for prefix in prefixes], width),
        prefixes=torch.from_numpy(padded),
        prefix_mask=torch.from_numpy(mask),
        prefix_of=torch.tensor(prefix_of),
    )


def prompt_numbers(sequences: Sequence[TrainingSequence]) -> list[int]:
    """Which prompt each sequence has, numbered in the order of their first appearance."""
    numbers: dict[tuple[str, int], int] = {}
    keys = [("alone", i) if s.group is None else ("group", s.group) for i, s in enumerate(sequences)]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def first_of_each(sequences: Sequence[TrainingSequence], numbers: Sequence[int]) -> list[TrainingSequence]:
    """The first sequence of each number, in the order of the numbers."""
    return [sequences[numbers.index(number)] for number in range(max(numbers) + 1)]


def collate(sequences: Sequence[TrainingSequence], pad_id: int) -> Batch:
    """Pad sequences on the right: under a causal mask no real token attends to padding, so none needs masking."""
    width = max(len(s.token_ids) for s in sequences)
    first = min(s.prompt_length for s in sequences)
    rows, kept = len(sequences), width - first
    token_ids = np.full((rows, width), pad_id, dtype=np.int64)
    mask = np.zeros((rows, kept), dtype=bool)
    weights = np.zeros((rows, kept), dtype=np.float32)
    sampler = np.zeros((rows, kept), dtype=np.float32)
    old = np.zeros((rows, kept), dtype=np.float32)
    for row, s in enumerate(sequences):
        token_ids[row, : len(s.token_ids)] = s.token_ids
        mask[row, : len(s.token_ids) - first] = s.sampled[first:]
        weights[row, mask[row]] = s.weight
        for values, given in ((sampler, s.sampler_log_probs), (old, s.old_log_probs)):
            if given is not None:
                values[row, mask[row]] = given
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        targets=torch.from_numpy(token_ids[:, first:].copy()),
        mask=torch.from_numpy(mask),
        weights=torch.from_numpy(weights),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32),
        sampler_log_probs=None if sequences[0].sampler_log_probs is None else torch.from_numpy(sampler),
        old_log_probs=None if sequences[0].old_log_probs is None else torch.from_numpy(old),
        experts=padded_experts([s.experts for s in sequences], [0] * rows, width),
    )


def padded_experts(known: Sequence[Experts | None], starts: Sequence[int], width: int) -> torch.Tensor | None:
    """The experts [rows, width, layers, k] int16 of rows that begin at these places, as `Batch` has them; None where none are known at all."""
    some = next((experts for experts in known if experts is not None), None)
    if some is None:
        return None
    padded = np.full((len(known), width, *some.shape[1:]), -1, dtype=np.int16)
    for row, (experts, start) in enumerate(zip(known, starts, strict=True)):
        if experts is not None:
            unknown = experts == not_routed(experts.dtype)
            padded[row, start : start + len(experts)] = np.where(unknown, UNKNOWN, experts.astype(np.int16))
    return torch.from_numpy(padded)


def prompts_routed_otherwise(sequences: Sequence[TrainingSequence]) -> tuple[int, int]:
    """How many (token, layer) of prompts went to other experts in a sequence than in the first of its group, and of how many."""
    changed = compared = 0
    firsts: dict[int, Experts] = {}
    for s in sequences:
        if s.group is None or s.experts is None:
            continue
        own = np.sort(s.experts[: s.prompt_length - 1])
        if s.group in firsts:
            changed += int((own != firsts[s.group]).any(axis=-1).sum())
            compared += own.shape[0] * own.shape[1]
        firsts.setdefault(s.group, own)
    return changed, compared


def experts_of(batch: Batch, passes: Sequence[torch.Tensor]) -> list[Experts]:
    """The experts [T - 1, layers, k] of each sequence, up to its last sampled token, of [tokens, layers, k] in each pass of a batch."""
    rows, places = batch.token_ids.shape
    dtype = expert_dtype(1 + max(int(experts.max()) for experts in passes))
    *before, after = [experts.cpu().numpy().astype(dtype) for experts in passes]
    after = after.reshape(rows, places, *after.shape[1:])
    mask = batch.mask.cpu().numpy()
    ends = places - mask.shape[1] + (mask * np.arange(1, mask.shape[1] + 1)).max(axis=1)
    found = [experts[: end - 1] for experts, end in zip(after, ends, strict=True)]
    if batch.prefix_mask is None or batch.prefix_of is None:
        return found
    real = batch.prefix_mask.cpu().numpy()
    prefixes = before[0].reshape(*real.shape, *after.shape[2:])
    return [
        np.concatenate([prefixes[prefix][real[prefix]], own])
        for prefix, own in zip(batch.prefix_of.tolist(), found, strict=True)
    ]


def sampled_values(values: torch.Tensor, batch: Batch) -> list[npt.NDArray[np.float32]]:
    """Of `values` [B, K], those of the sampled tokens of each sequence: [S] on the CPU."""
    rows = values.float().cpu().numpy()
    return [row[mask] for row, mask in zip(rows, batch.mask.cpu().numpy(), strict=True)]


Padded = Callable[[Sequence[int]], int]
"""The tokens, padding included, of a micro-batch of these items."""


def whole_rows(lengths: Sequence[int]) -> tuple[list[int], Padded]:
    """Items that are a row each: their order for a plan, and what a micro-batch of them takes."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return order, lambda items: max(lengths[i] for i in items) * len(items)


def rows_after_prompts(sequences: Sequence[TrainingSequence]) -> tuple[list[int], Padded]:
    """The same for sequences that `collate_after_prompts` puts together.

    By length, though it takes groups apart: what that saves of padding is more than the prompts that are computed once more.
    """
    prompts = prompt_numbers(sequences)
    before = [max(1, s.prompt_length - 1) for s in first_of_each(sequences, prompts)]
    after = [1 + len(s.token_ids) - s.prompt_length for s in sequences]

    def padded(items: Sequence[int]) -> int:
        different = {prompts[i] for i in items}
        return len(different) * max(before[p] for p in different) + len(items) * max(after[i] for i in items)

    return sorted(range(len(sequences)), key=lambda i: (-after[i], prompts[i], i)), padded


def plan_micro_batches(
    order: Sequence[int], padded: Padded, token_budget: int, ranks: int, together: int = 1
) -> list[list[list[int]]]:
    """Items, in this order, as [rank][micro-batch][place], a micro-batch being no larger than the budget.

    With `together` of 2, items 0 and 1 stay together, and so on, each pair where the first of its items is in the order.

    Every rank gets the same number of micro-batches, as ZeRO's collectives demand, and about the same number of tokens:
    of that number, the micro-batches are those whose largest is smallest. An item that is larger than the budget is a
    micro-batch of its own, with those that it stays together with. Where there are fewer items than micro-batches, some are empty lists.
    """
    if together > 1:
        tuples = list(dict.fromkeys(i // together for i in order))
        of_tuples = plan_micro_batches(tuples, lambda some: padded(members(some, together)), token_budget, ranks)
        return [[members(micro_batch, together) for micro_batch in rank] for rank in of_tuples]
    fewest = len(fill(order, padded, token_budget))
    count = -(-fewest // ranks) * ranks
    too_small, enough = 0, token_budget
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        if len(fill(order, padded, middle)) <= count:
            enough = middle
        else:
            too_small = middle
    micro_batches = fill(order, padded, enough)
    micro_batches += [[] for _ in range(count - len(micro_batches))]

    def cost(micro_batch: list[int]) -> int:
        return padded(micro_batch) if micro_batch else 0

    micro_batches.sort(key=cost, reverse=True)
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for start in range(0, len(micro_batches), ranks):
        lightest = sorted(range(ranks), key=lambda r: (sum(map(cost, plan[r])), r))
        for rank, micro_batch in zip(lightest, micro_batches[start : start + ranks], strict=True):
            plan[rank].append(micro_batch)
    return plan


def members(tuples: Sequence[int], size: int) -> list[int]:
    """The items of these tuples of so many items."""
    return [size * each + place for each in tuples for place in range(size)]


def fill(order: Sequence[int], padded: Padded, capacity: int) -> list[list[int]]:
    """Micro-batches of at most `capacity` padded tokens, filled one after the other."""
    micro_batches: list[list[int]] = []
    for i in order:
        current = micro_batches[-1] if micro_batches else None
        if current and padded([*current, i]) <= capacity:
            current.append(i)
        else:
            micro_batches.append([i])
    return micro_batches


def share_out(items: Sequence[T], plan: Sequence[Sequence[Sequence[int]]], *idle: T) -> list[list[list[T]]]:
    """The items as [rank][micro-batch][place].

    A micro-batch that would be empty holds `idle`, which should have weight 0: it takes part in the collectives and leaves
    the gradient as it is.
    """
    return [[[items[i] for i in m] or list(idle) for m in rank] for rank in plan]


def in_order(plan: Sequence[Sequence[Sequence[int]]], results: Sequence[Sequence[Sequence[T]]]) -> list[T]:
    """What the ranks found for each item, [rank][micro-batch][place] as in the plan, in the order of the items."""
    found: dict[int, T] = {}
    for rank_indices, rank_results in zip(plan, results, strict=True):
        for indices, values in zip(rank_indices, rank_results, strict=True):
            found |= dict(zip(indices, values, strict=False))
    return [found[i] for i in range(len(found))]
