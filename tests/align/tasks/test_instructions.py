"""Generated instructions: apart in topics and parameters, the same for a seed, and none that nobody could follow."""

from itertools import combinations

import pytest

from align.data.cards import load_card
from align.data.loader import load_split
from align.data.types import Example, LoadedSplit, SplitName
from align.tasks.instructions import (
    APART,
    KINDS,
    SEEN,
    SIZES,
    UNSEEN,
    generate,
    topics,
)
from reward import Sample
from reward.instructions import check
from reward.prose import degenerate

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def loaded() -> dict[SplitName, LoadedSplit[Example]]:
    return {split: load_split(load_card("instructions"), split) for split in SPLITS}


@pytest.fixture(scope="module")
def examples(loaded: dict[SplitName, LoadedSplit[Example]]) -> dict[SplitName, list[Example]]:
    return {split: found.examples for split, found in loaded.items()}


def kinds(example: Example) -> set[str]:
    return {one["kind"] for one in example.metadata["instructions"]}


def parameters(examples: list[Example]) -> set[tuple[str, str]]:
    found = set()
    for example in examples:
        for one in example.metadata["instructions"]:
            for name, value in one["args"].items():
                if name not in ("relation", "let_relation"):
                    found |= {(name, str(each)) for each in (value if isinstance(value, list) else [value])}
    return found


def test_the_card_tells_the_numbers(loaded: dict[SplitName, LoadedSplit[Example]]) -> None:
    card = load_card("instructions")
    for split in SPLITS:
        assert len(loaded[split].examples) == SIZES[split]
        assert f"{SIZES[split]:,} requests" in card.splits[split]
        assert f"{len(topics(split))} " in card.splits[split]
        assert loaded[split].dropped_contaminated == 0
    unseen = [example.metadata["unseen"] for example in loaded["test"].examples]
    assert 0.28 < sum(unseen) / len(unseen) < 0.38


def test_splits_share_no_topic_and_no_parameter(examples: dict[SplitName, list[Example]]) -> None:
    for one, other in combinations(SPLITS, 2):
        assert not set(topics(one)) & set(topics(other))
        assert not parameters(examples[one]) & parameters(examples[other])


def test_some_kinds_are_only_in_the_test(examples: dict[SplitName, list[Example]]) -> None:
    found = {split: set.union(*map(kinds, examples[split])) for split in SPLITS}
    assert found["train"] == set(SEEN)
    assert found["validation"] <= set(SEEN)
    assert found["test"] == set(KINDS)
    for example in examples["test"]:
        assert example.metadata["unseen"] == bool(kinds(example) & set(UNSEEN))


def test_the_seed_decides(examples: dict[SplitName, list[Example]]) -> None:
    assert generate("validation", seed=0) == examples["validation"]
    assert generate("validation", seed=1)[:20] != examples["validation"][:20]


def test_no_request_is_at_odds_with_itself(examples: dict[SplitName, list[Example]]) -> None:
    for split in SPLITS:
        for example in examples[split]:
            asked = kinds(example)
            assert len(asked) == len(example.metadata["instructions"]) <= 3
            assert not any(len(asked & apart) > 1 for apart in APART)


def test_every_request_shows_what_is_asked_and_can_be_judged(examples: dict[SplitName, list[Example]]) -> None:
    for example in examples["test"]:
        assert all(one["text"] in example.prompt_text for one in example.metadata["instructions"])
        assert any(word in example.prompt_text for word in example.metadata["topic"])
        sample = Sample("1", example.prompt_text, "Nothing.", None, example.domain, metadata=example.metadata)
        assert check(sample).degenerate


def test_the_request_itself_is_a_degenerate_answer(examples: dict[SplitName, list[Example]]) -> None:
    for example in examples["test"]:
        args = [one["args"] for one in example.metadata["instructions"]]
        assert degenerate(example.prompt_text, example.prompt_text, example.metadata["topic"], args)


def test_some_training_requests_are_plain_where_that_is_asked_for(examples: dict[SplitName, list[Example]]) -> None:
    mixed = generate("train", seed=0, plain_share=0.3)
    plain = [example for example in mixed if not example.metadata["instructions"]]
    assert 0.2 < len(plain) / len(mixed) < 0.3
    bare = {example.id: example for example in examples["train"]}
    for example in plain[:50]:
        assert bare[example.id].prompt_text != example.prompt_text
        sample = Sample("1", example.prompt_text, "Nothing.", None, example.domain, metadata=example.metadata)
        assert check(sample).degenerate
    assert generate("test", seed=0, plain_share=0.3) == examples["test"]
