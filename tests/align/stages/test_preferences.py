"""Pairs of a policy's own answers: right beside wrong, no text twice, nothing that nobody could judge."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.data.types import Example
from align.errors import UserError
from align.experience import Problem, ScoredGroup, ScoredTrajectory
from align.stages.preferences import judged, pairs_of, write_pairs
from reward import SampleReward, Score, Verdict
from rollout import FinishReason, Prompt, Trajectory

EXAMPLE = Example("e", ({"role": "user", "content": "What is 1 + 1?"},), None, "2", "arithmetic")
PROMPT = Prompt("e", [1])


def pairs(*answers: ScoredTrajectory, most: int) -> list[dict[str, Any]]:
    return list(pairs_of(ScoredGroup(Problem(EXAMPLE, PROMPT), answers), most, seed=0))


def answer(text: str, verdict: Verdict) -> ScoredTrajectory:
    drawn = Trajectory.of_one_turn(PROMPT, 0, [], [], FinishReason.STOP)
    value = None if verdict is Verdict.INFRA_ERROR else 1.0
    return ScoredTrajectory(drawn, text, SampleReward(value, verdict, {}))


RIGHT = [answer(f"right {i}", Verdict.PASS) for i in (1, 2, 2, 3)]
WRONG = [answer("wrong 1", Verdict.WRONG), answer("wrong 2", Verdict.TIMEOUT), answer("wrong 2", Verdict.TIMEOUT)]
MASKED = [answer("nobody knows", Verdict.INFRA_ERROR)]
# Where the reward that failed has no weight, there is a value.
MASKED.append(replace(MASKED[0], text="nor here", reward=SampleReward(1.0, Verdict.INFRA_ERROR, {})))


def test_each_pair_has_a_right_answer_and_a_wrong_one_and_each_text_comes_once() -> None:
    found = pairs(*RIGHT, *WRONG, *MASKED, most=5)
    assert len(found) == 2
    assert all(pair["chosen"].startswith("right") and pair["rejected"].startswith("wrong") for pair in found)
    assert len({pair["chosen"] for pair in found} | {pair["rejected"] for pair in found}) == 4
    assert [pair["id"] for pair in found] == ["e/0", "e/1"]
    assert found[0]["messages"] == [{"role": "user", "content": "What is 1 + 1?"}]


def test_an_empty_text_and_one_found_both_right_and_wrong_are_in_no_pair() -> None:
    empty, both = answer(" ", Verdict.NO_ANSWER), [answer("twice", Verdict.PASS), answer("twice", Verdict.TIMEOUT)]
    assert pairs(empty, *RIGHT, most=5) == []
    assert pairs(*both, most=5) == []


def test_a_right_answer_that_was_cut_off_is_not_chosen_and_a_wrong_one_may_be_rejected() -> None:
    def cut_off(one: ScoredTrajectory) -> ScoredTrajectory:
        return replace(one, trajectory=replace(one.trajectory, finish_reason=FinishReason.LENGTH))

    assert pairs(*map(cut_off, RIGHT), *WRONG, most=5) == []
    assert len(pairs(*RIGHT, *map(cut_off, WRONG), most=5)) == 2


def test_the_recipe_limits_the_pairs_of_a_prompt_and_they_are_drawn_by_its_seed() -> None:
    one = pairs(*RIGHT, *WRONG, most=1)
    assert len(one) == 1
    assert one == pairs(*RIGHT, *WRONG, most=1)


def test_a_prompt_that_is_too_easy_or_too_hard_gives_none() -> None:
    assert pairs(*RIGHT, most=2) == []
    assert pairs(*WRONG, *MASKED, most=2) == []


def test_where_nothing_could_be_judged_the_reason_is_said_and_not_that_the_prompts_are_too_hard() -> None:
    failed = {"code": Score(0.0, Verdict.INFRA_ERROR, "no sandbox: bwrap is missing")}
    unjudged = [replace(one, reward=replace(one.reward, components=failed)) for one in MASKED]
    group = ScoredGroup(Problem(EXAMPLE, PROMPT), unjudged)
    with pytest.raises(UserError, match="none of 2 answers could be judged: no sandbox"):
        judged([group])
    assert judged([group, replace(group, trajectories=RIGHT)]) == RIGHT


def test_a_split_without_pairs_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    found = pairs(*RIGHT, *WRONG, most=1)
    of_splits: Any = {
        ("sums", "validation"): [],
        ("sums", "test"): found,
        ("code", "test"): [],
        ("code", "train"): found,
    }
    with pytest.raises(
        UserError, match="no validation prompt of domain sums and no test prompt of domain code had both"
    ):
        write_pairs(of_splits, tmp_path, print)
    with pytest.raises(
        UserError, match=r"7 right answers were cut off, and are in no pair: raise sampling\.max_new_tokens"
    ):
        write_pairs({("sums", "train"): []}, tmp_path, print, cut_off=7)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.jsonl")) == [
        "code/train.jsonl",
        "sums/test.jsonl",
    ]
