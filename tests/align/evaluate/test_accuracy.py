"""What an evaluation says of right, wrong and unjudged answers, and of prompts that are too long to be answered."""

from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import pytest

from align.data.types import Example
from align.evaluate.accuracy import Evaluation, evaluate, summarise
from align.evaluate.hooks import PolicyCheckpoint
from align.experience import Problem, ScoredGroup, ScoredTrajectory, encode_problems
from reward import Sample, SampleReward, Verdict
from rollout import FinishReason, Prompt, Trajectory

DOMAINS = {"a": "arithmetic", "b": "arithmetic", "c": "code"}
PROBLEMS = {
    id_: Problem(Example(id_, ({"role": "user", "content": "?"},), None, None, domain), Prompt(id_, [1]))
    for id_, domain in DOMAINS.items()
}
RIGHT, WRONG, UNJUDGED = Verdict.PASS, Verdict.WRONG, Verdict.INFRA_ERROR


def group(id_: str, *verdicts: Verdict, tokens: int = 3, finish: FinishReason = FinishReason.STOP) -> ScoredGroup:
    problem = PROBLEMS[id_]
    drawn = Trajectory.of_one_turn(problem.prompt, 0, [2] * tokens, [-0.1] * tokens, finish)
    rewards = [SampleReward(None if verdict is UNJUDGED else 1.0, verdict, {}) for verdict in verdicts]
    return ScoredGroup(problem, [ScoredTrajectory(drawn, "text", reward) for reward in rewards])


def greedy(a: Verdict, b: Verdict, c: Verdict) -> list[ScoredGroup]:
    return [group("a", a), group("b", b), group("c", c)]


def test_accuracy_is_the_share_of_right_answers_in_all_and_by_domain() -> None:
    found = summarise(greedy(RIGHT, WRONG, RIGHT), [])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.by_domain == {"arithmetic": 0.5, "code": 1.0}
    assert (found.problems, found.pass_at) == (3, {})
    assert found.summary()["accuracy/code"] == 1.0


def test_an_answer_that_nobody_could_judge_is_not_a_wrong_one() -> None:
    found = summarise(greedy(RIGHT, UNJUDGED, UNJUDGED), [])
    assert found.accuracy == 1.0
    assert found.by_domain["arithmetic"] == 1.0
    assert isnan(found.by_domain["code"])
    assert found.verdicts == {"pass": 1, "infra_error": 2}
    assert (found.problems, found.judged) == (3, 1)


def test_without_rewards_there_is_no_accuracy_but_answers_to_read(
    scripted: Callable[[Callable[[str], str]], Any], checkpoint: PolicyCheckpoint
) -> None:
    examples = [
        Example(id_, ({"role": "user", "content": id_},), None, None, "user") for id_ in ("short", "long " * 50)
    ]
    problems = encode_problems(checkpoint.tokenizer, examples)
    found = evaluate(
        scripted(lambda asked: "4"),
        checkpoint.tokenizer,
        problems,
        None,
        samples=0,
        max_new_tokens=8,
        longest=40,
        seed=0,
    )
    assert not found.scored
    assert found.summary().keys() == {"mean_length", "truncated"}
    assert [(row["completion"], row["reward"], row["verdict"]) for row in found.rows] == [
        ("4", None, "unscored"),
        ("", None, "unscored"),
    ]
    record = found.summary() | {"problems": 2, "verdicts": dict(found.verdicts), "name": "after SFT"}
    assert not Evaluation.of_record(record, ["user"]).scored


def test_pass_at_k_is_over_the_problems_with_k_judged_samples() -> None:
    drawn = [group("a", RIGHT, WRONG), group("b", WRONG, WRONG), group("c", RIGHT, UNJUDGED)]
    found = summarise(greedy(RIGHT, RIGHT, RIGHT), drawn)
    assert found.pass_at == {1: pytest.approx((0.5 + 0 + 1) / 3), 2: pytest.approx((1 + 0) / 2)}


def test_lengths_and_cut_off_answers_are_those_of_the_greedy_ones() -> None:
    answers = [
        group("a", WRONG, tokens=5, finish=FinishReason.LENGTH),
        group("b", RIGHT),
        group("c", RIGHT, tokens=1),
    ]
    found = summarise(answers, [group(id_, RIGHT, tokens=50) for id_ in PROBLEMS])
    assert (found.mean_length, found.truncated) == (3.0, pytest.approx(1 / 3))
    assert [row["greedy"] for row in found.rows] == [True] * 3 + [False] * 3


class KindJudges:
    """Finds every answer right."""

    def submit(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        return samples

    def gather(self, tickets: Sequence[Sequence[Sample]], *, alone: bool = False) -> list[list[SampleReward]]:
        assert alone, "the answers of an evaluation are judged by themselves, and not beside the steps before it"
        return [[SampleReward(1.0, RIGHT, {}) for _ in samples] for samples in tickets]


def test_a_prompt_that_is_too_long_stays_in_the_denominator_and_is_counted(
    checkpoint: PolicyCheckpoint, scripted: Callable[[Callable[[str], str]], Any]
) -> None:
    asked = {"short": "1 + 1?", "long": "1" * 200}
    examples = [Example(i, ({"role": "user", "content": text},), None, "2", "arithmetic") for i, text in asked.items()]
    problems = encode_problems(checkpoint.tokenizer, examples)
    fleet = scripted(lambda prompt: "2")
    fleet.weight_version = 0
    judges: Any = KindJudges()
    found = evaluate(fleet, checkpoint.tokenizer, problems, judges, samples=1, max_new_tokens=8, longest=50, seed=0)
    assert (found.problems, found.accuracy, found.pass_at, found.too_long) == (2, 0.5, {1: 0.5}, 1)
    assert found.verdicts == {"pass": 1, "no_answer": 1}
    assert (found.mean_length, found.truncated) == (2.0, 0.0)
    record = {**found.summary(), "problems": 2, "verdicts": dict(found.verdicts), "too_long": 1}
    again = Evaluation.of_record(record, ["arithmetic"])
    assert (again.too_long, again.rates) == (1, {})


def test_a_conversation_that_is_too_long_is_answered_with_nothing(
    checkpoint: PolicyCheckpoint, scripted: Callable[[Callable[[str], str]], Any], caplog: pytest.LogCaptureFixture
) -> None:
    said = checkpoint.ask(
        scripted(lambda prompt: "2"),
        {"short": [{"role": "user", "content": "1 + 1?"}], "long": [{"role": "user", "content": "1" * 600}]},
        max_new_tokens=8,
    )
    assert (said["short"].text, said["long"].text, said["long"].tokens) == ("2", "", 0)
    assert "1 of 2 conversations have more than the 504 tokens" in caplog.text
