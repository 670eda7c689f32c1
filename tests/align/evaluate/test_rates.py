"""Rates of winning and of instructions followed, against what an enumeration or another formula gives."""

import sys
from collections.abc import Mapping, Sequence
from itertools import product
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from align.data.types import Example
from align.errors import UserError
from align.evaluate.rates import count_instructions, instruction_rates, win_rate
from align.run.files import read_samples, write_samples
from reward.instructions import checkers


def scored(id_: str, *values: float | None, reward: str = "judge") -> list[dict[str, Any]]:
    return [
        {"id": id_, "prompt": "?", "completion": "", "components": {reward: value, "other": 0.0}} for value in values
    ]


def by_enumeration(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> float:
    return fmean(
        fmean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(ours[id_], theirs[id_])) for id_ in ours
    )


def test_every_answer_meets_every_other_and_prompts_count_alike() -> None:
    ours = {"a": [1.0, 0.0], "b": [0.5], "c": [0.2, 0.9, 0.9]}
    theirs = {"a": [0.5, 0.0, 1.0], "b": [0.5, 0.5], "c": [0.1]}
    rows = [row for id_, values in ours.items() for row in scored(id_, *values)]
    others = [row for id_, values in theirs.items() for row in scored(id_, *values)]
    found = win_rate(rows, others, reward="judge")
    assert found == pytest.approx(by_enumeration(ours, theirs))
    assert found == pytest.approx(fmean([(2.5 + 0.5) / 6, 0.5, 1.0]))
    assert found == win_rate(rows[::-1], others, reward="judge")
    assert win_rate(others, rows, reward="judge") == pytest.approx(1 - found)


def test_where_the_checkers_are_not_installed_no_kinds_are_counted_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "langdetect", None)
    checkers.cache_clear()
    example = Example("1", ({"role": "user", "content": "?"},), None, None, "x", metadata={"instructions": []})
    row = {"id": "1", "completion": "It is.", "finish_reason": "stop"}
    assert count_instructions([row], [example]) == [row]
    assert "moe-align[evaluation]" in caplog.text


def test_against_itself_it_is_one_half_and_against_worse_answers_one() -> None:
    rows = [row for id_ in "abcdef" for row in scored(id_, 0.0, 1.0)]
    assert win_rate(rows, rows, reward="judge") == 0.5
    best = [row for id_ in "abcdef" for row in scored(id_, 2.0)]
    assert win_rate(best, rows, reward="judge") == 1.0


def test_answers_to_other_prompts_of_the_same_id_are_not_compared() -> None:
    others = [row | {"prompt": "!"} for row in scored("a", 0.0)] + scored("b", 1.0)
    assert win_rate([*scored("a", 1.0), *scored("b", 1.0)], others, reward="judge") == 0.5


def test_prompts_without_two_scored_sides_are_left_out(tmp_path: Path) -> None:
    rows = [*scored("a", 1.0), *scored("b", nan), *scored("c", 1.0), *scored("d", None), *scored("e", 1.0, reward="x")]
    others = [*scored("a", 0.0), *scored("b", 2.0), *scored("d", 2.0), *scored("e", 2.0), *scored("f", 2.0)]
    found = win_rate(rows, others, reward="judge")
    assert found == 1.0
    write_samples(tmp_path / "rows.parquet", rows)
    assert win_rate(read_samples(tmp_path / "rows.parquet"), others, reward="judge") == found
    with pytest.raises(
        UserError, match="no prompt with the same id and text of which reward 'jugde' scored answers of both sides"
    ):
        win_rate(rows, others, reward="jugde")


SAID = "parrots are clever birds that live in warm woods and talk to us"


def instructed(id_: str, *kinds: str, unseen: bool = False) -> Example:
    metadata: dict[str, Any] = {"topic": ["parrots"], "unseen": unseen}
    metadata["instructions"] = [{"kind": kind, "args": {}, "text": ""} for kind in kinds]
    messages = ({"role": "user", "content": "Describe them."},)
    return Example(id_, messages, None, None, "instructions", metadata=metadata)  # type: ignore[arg-type]


def said(id_: str, completion: str, finish_reason: str = "stop") -> dict[str, Any]:
    return {"id": id_, "completion": completion, "finish_reason": finish_reason}


def test_shares_by_kind_and_of_what_was_and_was_not_trained_on() -> None:
    examples = [
        instructed("small", "change_case:english_lowercase", "punctuation:no_comma"),
        instructed("capital", "change_case:english_lowercase"),
        instructed("curt", "punctuation:no_comma"),
        instructed("cut off", "punctuation:no_comma"),
        instructed("json", "detectable_format:json_format", unseen=True),
    ]
    answers = [
        said("small", SAID),
        said("capital", SAID.upper()),
        said("curt", "parrots"),
        said("cut off", SAID, "length"),
        said("json", f'{{"answer": "{SAID}"}}'),
    ]
    assert instruction_rates(count_instructions(answers, examples)) == {
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
    rates = instruction_rates(count_instructions([said("good", SAID), said("odd", SAID)], examples))
    assert rates == {"degenerate_share": 0.0, "accuracy/seen_kinds": 1.0, "accuracy/kind/no_comma": 1.0}


def test_other_problems_have_none() -> None:
    other = Example("sum", ({"role": "user", "content": "1 + 1?"},), None, "2", "arithmetic")
    assert instruction_rates(count_instructions([said("sum", "2")], [other])) == {}


def test_each_greedy_answer_says_what_was_counted_of_it(tmp_path: Path) -> None:
    examples = [instructed("both", "punctuation:no_comma", "change_case:english_lowercase"), instructed("none")]
    answers = [said("both", SAID.upper()), {**said("both", SAID), "greedy": False}, said("none", SAID)]
    first, *others = count_instructions(answers, examples)
    assert first["counted"] == {
        "degenerate_share": False,
        "accuracy/seen_kinds": False,
        "accuracy/kind/no_comma": True,
        "accuracy/kind/english_lowercase": False,
    }
    assert others == answers[1:]
    write_samples(tmp_path / "rows.parquet", [first, *others])
    assert read_samples(tmp_path / "rows.parquet")[0]["counted"] == first["counted"]


def test_a_kind_that_is_asked_for_twice_is_followed_where_both_are() -> None:
    example = instructed("twice", "keywords:existence", "keywords:existence")
    for instruction, word in zip(example.metadata["instructions"], ("owls", "birds"), strict=True):
        instruction["args"] = {"keywords": [word]}
    (row,) = count_instructions([said("twice", SAID)], [example])
    assert row["counted"]["accuracy/kind/existence"] is False
