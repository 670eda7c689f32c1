"""Pairs of a policy's own answers: right beside wrong, no text twice, nothing that nobody could judge."""

from pathlib import Path

from align.data.types import Example
from align.evaluate.problems import Answer
from align.recipe import PreferencesRecipe
from align.stages.preferences import pairs_of
from reward import SampleReward, Verdict
from rollout import Completion, FinishReason

EXAMPLE = Example("e", ({"role": "user", "content": "What is 1 + 1?"},), None, "2", "arithmetic")


def recipe(pairs_per_prompt: int) -> PreferencesRecipe:
    return PreferencesRecipe.model_validate(
        {
            "stage": "preferences",
            "name": "pairs",
            "model": {"path": str(Path("policy"))},
            "data": [{"card": "nano_math"}],
            "rewards": [{"name": "exact_answer"}],
            "preferences": {"pairs_per_prompt": pairs_per_prompt},
        }
    )


def answer(text: str, verdict: Verdict) -> Answer:
    completion = Completion("e", 0, [], [], [], FinishReason.STOP, 0, 0)
    value = None if verdict is Verdict.INFRA_ERROR else 1.0
    return Answer(completion, text, SampleReward(value, verdict, {}))


RIGHT = [answer(f"right {i}", Verdict.PASS) for i in (1, 2, 2, 3)]
WRONG = [answer("wrong 1", Verdict.WRONG), answer("wrong 2", Verdict.TIMEOUT), answer("wrong 2", Verdict.TIMEOUT)]
MASKED = [answer("nobody knows", Verdict.INFRA_ERROR)]


def test_each_pair_has_a_right_answer_and_a_wrong_one_and_each_text_comes_once() -> None:
    pairs = list(pairs_of(EXAMPLE, RIGHT + WRONG + MASKED, recipe(5)))
    assert len(pairs) == 2
    assert all(pair["chosen"].startswith("right") and pair["rejected"].startswith("wrong") for pair in pairs)
    assert len({pair["chosen"] for pair in pairs} | {pair["rejected"] for pair in pairs}) == 4
    assert [pair["id"] for pair in pairs] == ["e/0", "e/1"]
    assert pairs[0]["messages"] == [{"role": "user", "content": "What is 1 + 1?"}]


def test_the_recipe_limits_the_pairs_of_a_prompt_and_they_are_drawn_by_its_seed() -> None:
    one = list(pairs_of(EXAMPLE, RIGHT + WRONG, recipe(1)))
    assert len(one) == 1
    assert one == list(pairs_of(EXAMPLE, RIGHT + WRONG, recipe(1)))


def test_a_prompt_that_is_too_easy_or_too_hard_gives_none() -> None:
    assert list(pairs_of(EXAMPLE, RIGHT, recipe(2))) == []
    assert list(pairs_of(EXAMPLE, WRONG + MASKED, recipe(2))) == []
