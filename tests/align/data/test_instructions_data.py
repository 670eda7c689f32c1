"""Generated instructions: apart in topics and parameters, the same for a seed, and none that nobody could follow."""

from itertools import combinations

import pytest

from align.data import instruction_words as lists
from align.data.cards import load_card
from align.data.instruction_answers import SENTENCES
from align.data.instruction_kinds import APART, KINDS, SEEN, UNSEEN
from align.data.instructions import SIZES, generate
from align.data.loader import load_split
from align.data.types import Example, SplitName
from reward import Sample
from reward.instructions import degenerate, judge

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def examples() -> dict[SplitName, list[Example]]:
    return {split: load_split(load_card("instructions"), split).examples for split in SPLITS}


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


def test_the_card_tells_the_numbers(examples: dict[SplitName, list[Example]]) -> None:
    card = load_card("instructions")
    for split in SPLITS:
        assert len(examples[split]) == SIZES[split]
        assert f"{SIZES[split]:,} requests" in card.splits[split]
        assert f"{len(lists.topics(split))} " in card.splits[split]
        assert load_split(card, split).dropped_contaminated == 0
    unseen = sum(example.metadata["unseen"] for example in examples["test"])
    assert 0.28 < unseen / len(examples["test"]) < 0.38


def test_splits_share_no_topic_and_no_parameter(examples: dict[SplitName, list[Example]]) -> None:
    for one, other in combinations(SPLITS, 2):
        assert not set(lists.topics(one)) & set(lists.topics(other))
        assert not parameters(examples[one]) & parameters(examples[other])


def test_some_kinds_are_only_in_the_test(examples: dict[SplitName, list[Example]]) -> None:
    found = {split: set.union(*map(kinds, examples[split])) for split in SPLITS}
    assert found["train"] == set(SEEN)
    assert found["validation"] <= set(SEEN)
    assert found["test"] == set(KINDS)
    for example in examples["test"]:
        assert example.metadata["unseen"] == bool(kinds(example) & set(UNSEEN))


def test_the_seed_decides(examples: dict[SplitName, list[Example]]) -> None:
    assert generate("train", seed=0, demonstrations=False) == examples["train"]
    assert generate("train", seed=1, demonstrations=False)[:20] != examples["train"][:20]


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
        assert judge(sample).degenerate


def test_the_request_itself_is_a_degenerate_answer(examples: dict[SplitName, list[Example]]) -> None:
    for example in examples["test"]:
        args = [one["args"] for one in example.metadata["instructions"]]
        assert degenerate(example.prompt_text, example.prompt_text, example.metadata["topic"], args)


@pytest.fixture(scope="module")
def shown() -> list[Example]:
    return generate("validation", seed=0, demonstrations=True, aware_share=0.5)


def follows(example: Example) -> bool:
    assert example.response is not None
    return judge(
        Sample("1", example.prompt_text, example.response, None, example.domain, metadata=example.metadata)
    ).passes


def test_demonstrations_follow_the_instructions_as_often_as_asked(shown: list[Example]) -> None:
    assert 0.5 < sum(map(follows, shown)) / len(shown) < 0.75, "the unaware ones are right by accident at times"
    aware = generate("validation", seed=0, demonstrations=True, aware_share=1.0)
    assert all(map(follows, aware))
    assert len(aware) > 0.9 * SIZES["validation"]


def test_demonstrations_change_nothing_else_and_the_test_has_none(shown: list[Example]) -> None:
    bare = {example.id: example for example in generate("validation", seed=0, demonstrations=False)}
    assert all(bare[example.id].messages == example.messages for example in shown)
    assert all(example.response is None for example in generate("test", seed=0, demonstrations=True)[:20])


def test_the_sentences_avoid_what_instructions_forbid() -> None:
    text = " ".join(SENTENCES).casefold()
    assert "," not in text
    for split in SPLITS:
        assert not set(lists.UNWANTED[split]) & set(text.replace(".", "").split())
