"""What is sampled depends on what is asked, not on who serves it."""

from rollout import Prompt, sample_seed
from rollout.engine import Request
from rollout.fleet import engine_batches


def test_a_seed_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    keys = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)
    assert [sample_seed(*key) for key in keys] == [sample_seed(*key) for key in keys]


def test_engine_batches_keep_the_order_and_are_of_like_size() -> None:
    requests = [Request(Prompt(str(i), [1]), 0, i) for i in range(10)]
    batches = engine_batches(requests, 4)
    assert [r for batch in batches for r in batch] == requests
    assert sorted(len(batch) for batch in batches) == [3, 3, 4]
    assert engine_batches([], 4) == []
