"""A registered reward behind TRL's signature."""

import pickle
from typing import Any

import pytest

from reward import (
    InfrastructureError,
    ParameterError,
    Sample,
    Score,
    UnknownReward,
    Verdict,
    register,
    trl_reward_func,
)

pytestmark = pytest.mark.usefixtures("own_rewards")


def call(function: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    return function(
        prompts=["2 + 2?"] * len(completions),
        completions=completions,
        completion_ids=[[1]] * len(completions),
        trainer_state=object(),
        **columns,
    )


def test_strings_and_chat_messages_are_scored_alike() -> None:
    function = trl_reward_func("exact_answer", wrong=-1.0)
    texts = [r"\boxed{4}", r"\boxed{5}"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    for completions in (texts, chats, parts):
        assert call(function, completions, answer=["4", 4]) == [1.0, -1.0]


def test_the_last_message_is_the_answer() -> None:
    messages = [
        {"role": "assistant", "content": r"\boxed{5}"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": r"\boxed{4}"},
    ]
    assert call(trl_reward_func("exact_answer"), [messages], answer=["4"]) == [1.0]


def test_a_sample_nobody_can_judge_is_none() -> None:
    answers = [None] + ["4"] * 19
    values = call(trl_reward_func("exact_answer"), [r"\boxed{4}"] * 20, answer=answers)
    assert values == [None] + [1.0] * 19


def test_one_row_in_sixteen_without_an_answer_does_not_end_the_trainer() -> None:
    """Whether a call holds sixteen rows, or the completions of one row alone, as with one process and one group a call."""
    together, apart = (trl_reward_func("exact_answer") for _ in range(2))
    for _ in range(20):
        assert call(together, [r"\boxed{4}"] * 16, answer=[None] + ["4"] * 15) == [None] + [1.0] * 15
        for row in range(16):
            answer = "4" if row else None
            assert call(apart, [r"\boxed{4}"] * 8, answer=[answer] * 8) == [1.0 if row else None] * 8


def test_where_most_completions_cannot_be_judged_it_stops() -> None:
    function = trl_reward_func("exact_answer")
    call(function, [r"\boxed{4}"] * 1000, answer=["4"] * 1000)
    call(function, [r"\boxed{4}"] * 128, answer=[None] * 128)
    with pytest.raises(InfrastructureError, match=r"50.4% .* the limit is 50.0%.*no ground truth"):
        call(function, [r"\boxed{4}"], answer=[None])
    with pytest.raises(InfrastructureError, match=r"60.0% "):
        call(trl_reward_func("exact_answer"), [r"\boxed{4}"] * 1000, answer=[None] * 600 + ["4"] * 400)


@pytest.mark.parametrize(("limit", "masked"), [(0.0, 1), (0.05, 13), (1.0, None)])
def test_the_limit_can_be_given(limit: float, masked: int | None) -> None:
    function = trl_reward_func("exact_answer", infra_error_limit=limit)
    assert call(function, [r"\boxed{4}"], answer=["4"]) == [1.0]
    for count in range(1, 300):
        if count == masked:
            with pytest.raises(InfrastructureError):
                call(function, [r"\boxed{4}"], answer=[None])
            break
        assert call(function, [r"\boxed{4}"], answer=[None]) == [None]


def test_without_the_answer_column_it_stops() -> None:
    with pytest.raises(InfrastructureError, match=r"no ground truth.* no column 'answer'"):
        call(trl_reward_func("exact_answer"), [r"\boxed{4}"])


def test_columns_reach_the_reward_as_metadata_of_their_row() -> None:
    seen: list[Sample] = []

    @register("curious")
    def curious(sample: Sample) -> Score:
        seen.append(sample)
        return Score(0.0, Verdict.PASS)

    call(
        trl_reward_func("curious"),
        ["a", "b"],
        answer=["1", "2"],
        level=[3, 4],
        id=["x", "y"],
        domain=["m", "n"],
    )
    assert [(s.id, s.domain, s.answer, s.metadata["level"]) for s in seen] == [
        ("x", "m", "1", 3),
        ("y", "n", "2", 4),
    ]
    assert "trainer_state" not in seen[0].metadata
    assert "completion_ids" not in seen[0].metadata


def test_names_and_parameters_are_checked_at_once() -> None:
    with pytest.raises(UnknownReward):
        trl_reward_func("exact")
    with pytest.raises(ParameterError):
        trl_reward_func("exact_answer", rigth=1.0)


def test_it_carries_its_name_and_can_be_pickled() -> None:
    function = pickle.loads(pickle.dumps(trl_reward_func("exact_answer")))
    assert function.__name__ == "exact_answer"
    assert call(function, [r"\boxed{4}"], answer=["4"]) == [1.0]
