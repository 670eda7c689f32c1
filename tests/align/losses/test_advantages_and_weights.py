"""Group-relative advantages and the denominators of a batch, against plain loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from align.losses import (
    Aggregation,
    completion_weights,
    group_advantages,
)

AGGREGATIONS: list[Aggregation] = ["sample_mean", "token_mean", "sequence_sum", "constant_length"]
NAN, INF = float("nan"), float("inf")


def plain_advantages(
    rewards: list[float], groups: list[int], valid: list[bool], scale: str, baseline: str = "group"
) -> list[float]:
    result = [0.0] * len(rewards)
    if baseline == "batch":
        groups = [0] * len(rewards)
    for group in set(groups):
        members = [i for i in range(len(rewards)) if groups[i] == group and valid[i]]
        if len(members) < 2:
            continue
        mean = math.fsum(rewards[i] for i in members) / len(members)
        std = math.sqrt(math.fsum((rewards[i] - mean) ** 2 for i in members) / (len(members) - 1))
        if std <= 1e-6:
            continue
        for i in members:
            others = [rewards[j] for j in members if j != i]
            subtracted = math.fsum(others) / len(others) if baseline == "leave_one_out" else mean
            result[i] = (rewards[i] - subtracted) / (std + 1e-4 if scale == "std" else 1.0)
    compared = [
        i
        for i in range(len(rewards))
        if valid[i] and sum(groups[i] == g and v for g, v in zip(groups, valid, strict=True)) > 1
    ]
    if scale == "batch" and len(compared) > 1:
        std = math.sqrt(math.fsum(result[i] ** 2 for i in compared) / (len(compared) - 1))
        result = [value / (std + 1e-4) for value in result]
    return result


Sample = tuple[float, int, bool]
samples = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.integers(-10000, 10000).map(lambda i: i / 1000)),
        st.integers(0, 3),
        st.sampled_from([True, True, True, False]),
    ),
    min_size=1,
    max_size=24,
)


def columns(batch: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    rewards, groups, valid = zip(*batch, strict=True)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), torch.tensor(valid)


@given(samples, st.sampled_from(["std", "batch", "none"]), st.sampled_from(["group", "leave_one_out", "batch"]))
def test_advantages_match_the_plain_formula(batch: list[Sample], scale: Any, baseline: Any) -> None:
    assume((scale, baseline) != ("std", "batch"))
    rewards, groups, valid = columns(batch)
    advantages, std = group_advantages(rewards, groups, valid, scale=scale, baseline=baseline)
    assert std.tolist() == group_advantages(rewards, groups, valid)[1].tolist()
    expected = plain_advantages(rewards.tolist(), groups.tolist(), valid.tolist(), scale, baseline)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(samples)
def test_advantages_of_a_group_sum_to_zero_and_their_spread_is_one(batch: list[Sample]) -> None:
    rewards, groups, valid = columns(batch)
    advantages, std = group_advantages(rewards, groups, valid)
    for group in range(len(std)):
        members = advantages[(groups == group) & valid]
        assert members.sum().item() == pytest.approx(0, abs=1e-9)
        if std[group] > 1e-6:
            assert members.std().item() == pytest.approx((std[group] / (std[group] + 1e-4)).item())


@given(samples, st.floats(-100, 100), st.floats(0.5, 100))
def test_advantages_do_not_see_the_rewards_shift_nor_but_for_epsilon_their_scale(
    batch: list[Sample], shift: float, factor: float
) -> None:
    rewards, groups, valid = columns(batch)
    advantages, std = group_advantages(rewards, groups, valid)
    shifted, _ = group_advantages(rewards + shift, groups, valid)
    torch.testing.assert_close(shifted, advantages, rtol=1e-7, atol=1e-7)
    scaled, _ = group_advantages(rewards * factor, groups, valid)
    by_epsilon = factor * (std + 1e-4) / (factor * std + 1e-4)  # 1 for a standard deviation far above 1e-4
    torch.testing.assert_close(scaled, advantages * by_epsilon[groups])


@given(samples, st.randoms())
def test_advantages_follow_a_permutation(batch: list[Sample], random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(batch)))
    random.shuffle(order)
    advantages, std = group_advantages(*columns(batch))
    permuted, permuted_std = group_advantages(*columns([batch[i] for i in order]))
    torch.testing.assert_close(permuted, advantages[order])
    torch.testing.assert_close(permuted_std, std)


@given(samples, st.sampled_from([NAN, INF, -1e30, 7.0]))
def test_invalid_samples_get_zero_and_change_nothing(batch: list[Sample], junk: float) -> None:
    rewards, groups, valid = columns(batch)
    advantages, _ = group_advantages(rewards, groups, valid)
    other, _ = group_advantages(torch.where(valid, rewards, junk), groups, valid)
    assert torch.equal(advantages, other)
    assert (advantages[~valid] == 0).all()


@given(st.floats(-1e3, 1e3), st.integers(1, 64), st.sampled_from([torch.float32, torch.float64]))
def test_equal_rewards_give_exactly_zero(reward: float, size: int, dtype: torch.dtype) -> None:
    rewards = torch.full((size,), reward, dtype=dtype)
    advantages, _ = group_advantages(rewards, torch.zeros(size, dtype=torch.long), torch.ones(size).bool())
    assert (advantages == 0).all()
    assert advantages.dtype == dtype


def test_a_valid_reward_that_is_not_a_number_is_not_hidden() -> None:
    rewards = torch.tensor([1.0, NAN, 0.0, 1.0, 5.0])
    advantages, _ = group_advantages(
        rewards, torch.tensor([0, 0, 1, 1, 0]), torch.tensor([True, True, True, True, False])
    )
    assert advantages[:2].isnan().all()
    assert advantages[2:4].isfinite().all()
    assert advantages[4] == 0


def test_no_samples_give_no_advantages() -> None:
    advantages, std = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0).bool())
    assert advantages.shape == std.shape == (0,)


completions = st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=20)


@given(completions, st.sampled_from(AGGREGATIONS))
def test_weights_match_their_definition(batch: list[tuple[int, bool]], aggregation: Aggregation) -> None:
    lengths, kept = torch.tensor([x for x, _ in batch]), torch.tensor([k for _, k in batch])
    weights = completion_weights(lengths, kept, aggregation, longest=50)
    trained = [length for length, keep in batch if keep and length]
    assert weights.dtype == torch.float64
    for weight, (length, keep) in zip(weights.tolist(), batch, strict=True):
        if not (keep and length):
            assert weight == 0
        elif aggregation == "sample_mean":
            assert weight == pytest.approx(1 / len(trained) / length)
        elif aggregation == "token_mean":
            assert weight == pytest.approx(1 / sum(trained))
        elif aggregation == "constant_length":
            assert weight == pytest.approx(1 / len(trained) / 50)
        else:
            assert weight == pytest.approx(1 / len(trained))


@given(completions, st.sampled_from(AGGREGATIONS[:2]))
def test_weights_of_all_tokens_sum_to_one(batch: list[tuple[int, bool]], aggregation: Aggregation) -> None:
    lengths, kept = torch.tensor([x for x, _ in batch]), torch.tensor([k for _, k in batch])
    total = (completion_weights(lengths, kept, aggregation) * lengths).sum().item()
    assert total == pytest.approx(1.0 if (kept & (lengths > 0)).any() else 0.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_completion_that_is_not_kept_is_in_no_denominator(aggregation: Aggregation) -> None:
    """TRL issue 6369: truncated completions masked in the numerator only."""
    lengths, kept = torch.tensor([3, 9, 5]), torch.tensor([True, False, True])
    weights = completion_weights(lengths, kept, aggregation, longest=9)
    without = completion_weights(lengths[kept], kept[kept], aggregation, longest=9)
    assert torch.equal(weights[kept], without)
