"""What a judge is shown of the policy's answers."""

from typing import Any

import pytest

from align.evaluate.hooks import EvaluationError, PolicyCheckpoint
from align.evaluate.judge_benchmarks import AlpacaEvalQuestion, MtBenchQuestion, answered


def test_a_thought_is_not_judged_and_the_conversation_goes_on_with_it(
    checkpoint: PolicyCheckpoint, scripted: Any
) -> None:
    asked: list[str] = []
    answer = "<think>Hm.</think>\nFig, which `</think>` ends, and <think> begins"
    fleet = scripted(lambda prompt: (asked.append(prompt), answer)[1])
    question = MtBenchQuestion(question_id=101, category="math", turns=("1+1?", "And 2+2?"))
    first, second = answered([question], checkpoint, fleet, max_new_tokens=64, seed=0)
    assert first.completion.strip() == second.completion.strip() == answer
    assert "Hm." not in second.fields["conversation"]
    assert second.fields["conversation"].count("Assistant: Fig, which `</think>` ends, and <think> begins") == 2
    assert "Hm." in asked[1]


def test_where_no_question_leaves_room_for_an_answer_nothing_is_judged(
    checkpoint: PolicyCheckpoint, scripted: Any
) -> None:
    question = AlpacaEvalQuestion(instruction="Name a fruit that grows on a tree.", output="An apple.")
    with pytest.raises(EvaluationError, match="none of 1 questions leaves room"):
        answered([question], checkpoint, scripted(lambda _: "Fig"), max_new_tokens=checkpoint.max_length - 3, seed=0)
