"""Generated instructions: apart in topics and parameters, the same for a seed, and none that nobody could follow."""

from itertools import combinations
from pathlib import Path

import pytest

from align.data.cards import load_card
from align.data.loader import load_split
from align.data.types import Example, LoadedSplit, SplitName
from align.errors import UserError
from align.run.files import write_jsonl
from align.tasks.instructions import (
    APART,
    KINDS,
    MOST_CAPITALS,
    REQUESTS,
    SEEN,
    SIZES,
    UNSEEN,
    generate,
    plain_requests,
    topics,
    whole_sentences,
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


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a model could have said to each plain request: whole sentences, the last one cut off."""
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    said = (
        "1. **People everywhere know {0}, and for many of them it is a part of their day.** They talk about it with their "
        "children! You may find that {0} can change how a time feels, and it is good to share that with friends.\n\n"
        "- Go slowly at first. It helps to begin with a small step and to try again when something goes wrong. By the way"
    )
    topic_of = {request: topic for split in SPLITS for topic in topics(split) for request in requests_about(topic)}
    rows = [{"request": request, "answer": said.format(topic_of[request])} for request in plain_requests(3)]
    write_jsonl(file, rows)
    return file


def requests_about(topic: str) -> list[str]:
    return [request.format(topic) for request in REQUESTS]


def demonstrations(answers: Path | None, aware_share: float) -> list[Example]:
    """Of the first thousand requests, which have all kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "train", 1000)  # type: ignore[arg-type]
        return generate("train", seed=0, answers=answers, aware_share=aware_share)


@pytest.fixture(scope="module")
def shown(answers: Path) -> list[Example]:
    return demonstrations(answers, 0.5)


def follows(example: Example) -> bool:
    assert example.response is not None
    return check(
        Sample("1", example.prompt_text, example.response, None, example.domain, metadata=example.metadata)
    ).passes


def test_demonstrations_follow_the_instructions_as_often_as_asked(shown: list[Example], answers: Path) -> None:
    aware, unaware = demonstrations(answers, 1.0), demonstrations(answers, 0.0)
    assert all(map(follows, aware))
    capitals = [example.response for example in aware if example.response and example.response.isupper()]
    assert max(map(len, capitals)) <= MOST_CAPITALS
    assert set.union(*map(kinds, aware)) == set(SEEN)
    shares = [sum(map(follows, each)) / len(each) for each in (unaware, shown)]
    assert shares[0] < 0.25, "by accident"
    assert shares[0] + 0.1 < shares[1] < 0.7


def test_demonstrations_change_nothing_else_and_the_test_has_none(shown: list[Example], answers: Path) -> None:
    bare = {example.id: example for example in demonstrations(None, 0.5)}
    assert all(bare[example.id].messages == example.messages for example in shown)
    assert all(example.response is None for example in generate("test", seed=0, answers=answers)[:20])


def test_demonstrations_are_of_the_requests_that_were_answered(shown: list[Example]) -> None:
    answered = set(plain_requests(3))
    assert {example.metadata["request"] for example in shown} <= answered
    assert not any(topic in request for topic in topics("test") for request in answered)


def test_whole_sentences_leave_out_marks_repetitions_and_what_was_cut_off() -> None:
    text = '# Title\n\n1. **Bees** live in hives.\n- They dance.\n* They dance.\n\n"It is warm!" And then they'
    assert whole_sentences(text) == ["Bees live in hives.", "They dance.", "It is warm!"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"request": "Describe rain to a child."}\n', r'line 1: needs "request" and "answer"'),
        ("{}", r"line 1: needs"),
        ("no JSON\n", r"line 1: not JSON"),
        ("", r"has no answer to a validation request"),
        ('{"request": "Describe rain to a child.", "answer": "It rains"}\n', r"has no answer to a validation request"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(content: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=told):
        generate("validation", seed=0, answers=file)


def test_answers_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*nowhere\.jsonl of a model's own answers"):
        generate("validation", seed=0, answers=tmp_path / "nowhere.jsonl")
