"""Micro-batches: every sequence once, the same number on every rank, within the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.learner.batch import TrainingSequence, collate, plan_micro_batches, whole_rows


@pytest.mark.parametrize("together", [1, 2])
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(10, 200), st.integers(1, 4))
def test_the_plan_holds_every_sequence_once_within_the_budget(
    together: int, lengths: list[int], budget: int, ranks: int
) -> None:
    lengths = lengths * together
    plan = plan_micro_batches(*whole_rows(lengths), budget, ranks, together)
    assert sorted(i for rank in plan for micro_batch in rank for i in micro_batch) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan}) == 1
    for micro_batch in (m for rank in plan for m in rank if len(m) > together):
        assert max(lengths[i] for i in micro_batch) * len(micro_batch) <= budget


def test_the_two_of_a_pair_stay_together_and_in_turn() -> None:
    lengths = [9, 2, 3, 3, 1, 8, 4, 4]
    plan = plan_micro_batches(*whole_rows(lengths), 20, 1, 2)
    assert sorted(map(tuple, plan[0])) == [(0, 1), (4, 5), (6, 7, 2, 3)]


def test_ranks_get_like_shares() -> None:
    """Greedy filling of a budget of 4096 would leave one rank a third more."""
    lengths = [64 + i % 20 for i in range(128)]
    plan = plan_micro_batches(*whole_rows(lengths), 4096, 2)
    first, second = (sum(max(lengths[i] for i in m) * len(m) for m in rank) for rank in plan)
    assert max(first, second) < 1.02 * min(first, second)


def test_collate_lines_up_targets_masks_and_values() -> None:
    a = TrainingSequence.of_completion([5, 6, 7, 8], 2, 0.5, advantage=1.0, sampler_log_probs=[-1.0, -2.0])
    b = TrainingSequence.of_completion([5, 6, 9], 1, 0.25, advantage=-1.0, sampler_log_probs=[-3.0, -4.0])
    batch = collate([a, b], pad_id=0)
    assert batch.token_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]]
    assert batch.targets[batch.mask].tolist() == [7, 8, 6, 9]
    assert batch.weights[batch.mask].tolist() == [0.5, 0.5, 0.25, 0.25]
    assert batch.sampler_log_probs is not None
    assert batch.sampler_log_probs[batch.mask].tolist() == [-1.0, -2.0, -3.0, -4.0]
