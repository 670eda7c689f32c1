"""What an evaluation says about checkable instructions: by kind, seen or not, and how many answers are none."""

from typing import Any

from align.data.types import Example
from align.evaluate.instruction_rates import instruction_rates

SAID = "parrots are clever birds that live in warm woods and talk to us"


def example(id_: str, *kinds: str, unseen: bool = False) -> Example:
    metadata: dict[str, Any] = {"topic": ["parrots"], "unseen": unseen}
    metadata["instructions"] = [{"kind": kind, "args": {}, "text": ""} for kind in kinds]
    messages = ({"role": "user", "content": "Describe them."},)
    return Example(id_, messages, None, None, "instructions", metadata=metadata)  # type: ignore[arg-type]


def answer(id_: str, completion: str, finish_reason: str = "stop") -> dict[str, Any]:
    return {"id": id_, "completion": completion, "finish_reason": finish_reason}


def test_shares_by_kind_and_of_what_was_and_was_not_trained_on() -> None:
    examples = [
        example("small", "change_case:english_lowercase", "punctuation:no_comma"),
        example("capital", "change_case:english_lowercase"),
        example("curt", "punctuation:no_comma"),
        example("cut off", "punctuation:no_comma"),
        example("json", "detectable_format:json_format", unseen=True),
    ]
    answers = [
        answer("small", SAID),
        answer("capital", SAID.upper()),
        answer("curt", "parrots"),
        answer("cut off", SAID, "length"),
        answer("json", f'{{"answer": "{SAID}"}}'),
    ]
    assert instruction_rates(answers, examples) == {
        "degenerate_share": 1 / 5,
        "accuracy/seen_kinds": 1 / 4,
        "accuracy/unseen_kinds": 1.0,
        "accuracy/kind/english_lowercase": 1 / 2,
        # Met by the curt one too, which is no answer; the one that was cut off is not right, but met this.
        "accuracy/kind/no_comma": 2 / 3,
        "accuracy/kind/json_format": 1.0,
    }


def test_published_rows_count_and_what_nobody_can_judge_does_not() -> None:
    messages = ({"role": "user", "content": "Describe them."},)
    published = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
    examples = [
        Example("good", messages, None, None, "user", metadata=published),  # type: ignore[arg-type]
        Example("odd", messages, None, None, "user", metadata={**published, "kwargs": []}),  # type: ignore[arg-type]
    ]
    rates = instruction_rates([answer("good", SAID), answer("odd", SAID)], examples)
    assert rates == {"degenerate_share": 0.0, "accuracy/seen_kinds": 1.0, "accuracy/kind/no_comma": 1.0}


def test_other_problems_have_none() -> None:
    other = Example("sum", ({"role": "user", "content": "1 + 1?"},), None, "2", "arithmetic")
    assert instruction_rates([answer("sum", "2")], [other]) == {}
