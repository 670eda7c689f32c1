"""Which examples a step takes: each once an epoch, from every source its share, as a function of seed and step."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from align.stages.examples import Source, drawn, items_of_step, shares


@given(st.integers(1, 500), st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_shares_add_up_and_miss_the_exact_share_by_less_than_one(total: int, weights: list[float]) -> None:
    counts = shares(total, weights)
    assert sum(counts) == total
    assert all(abs(count - total * w / sum(weights)) < 1 for count, w in zip(counts, weights, strict=True))


@given(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9))
def test_every_item_comes_once_an_epoch(seed: int, count: int, epoch: int) -> None:
    items = range(41)
    steps = len(items) // count
    taken = [
        item for step in range(epoch * steps, (epoch + 1) * steps) for item in drawn(items, count, seed=seed, step=step)
    ]
    assert len(taken) == steps * count
    assert max(Counter(taken).values()) == 1


def test_a_step_has_each_source_s_part_evenly_mixed() -> None:
    sources = [Source("math", [f"m{i}" for i in range(100)], 4), Source("code", [f"c{i}" for i in range(60)], 2)]
    step = items_of_step(sources, seed=0, step=3)
    assert [item[0] for item in step] in (["m", "c", "m", "m", "c", "m"], ["m", "m", "c", "m", "c", "m"])
    assert step == items_of_step(sources, seed=0, step=3)
    assert step != items_of_step(sources, seed=1, step=3)
    assert not set(step) & set(items_of_step(sources, seed=0, step=4))


def test_the_parts_of_a_single_source_are_what_they_are_alone() -> None:
    items = list(range(50))
    assert items_of_step([Source("math", items, 8)], seed=2, step=5) == drawn(items, 8, seed=2, step=5)
