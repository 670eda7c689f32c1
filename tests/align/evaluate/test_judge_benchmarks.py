"""What a judge is shown of the policy's answers."""

from typing import Any

from align.evaluate.hooks import PolicyCheckpoint
from align.evaluate.judge_benchmarks import MtBenchQuestion, answered


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
