"""What an evaluation says of right, wrong and unjudged answers."""

from math import isnan

import pytest

from align.data.types import Example
from align.evaluate.problems import Answer, summarise
from reward import SampleReward, Verdict
from rollout import Completion, FinishReason

DOMAINS = {"a": "arithmetic", "b": "arithmetic", "c": "code"}
EXAMPLES = {
    id_: Example(id_, ({"role": "user", "content": "?"},), None, None, domain) for id_, domain in DOMAINS.items()
}
RIGHT, WRONG, UNJUDGED = Verdict.PASS, Verdict.WRONG, Verdict.INFRA_ERROR


def answer(id_: str, verdict: Verdict, *, tokens: int = 3, finish: FinishReason = FinishReason.STOP) -> Answer:
    completion = Completion(id_, 0, [1], [2] * tokens, [-0.1] * tokens, finish, 0, 0)
    return Answer(completion, "text", SampleReward(None if verdict is UNJUDGED else 1.0, verdict, {}))


def greedy(a: Verdict, b: Verdict, c: Verdict) -> list[Answer]:
    return [answer("a", a), answer("b", b), answer("c", c)]


def test_accuracy_is_the_share_of_right_answers_in_all_and_by_domain() -> None:
    found = summarise(EXAMPLES, greedy(RIGHT, WRONG, RIGHT), [])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.by_domain == {"arithmetic": 0.5, "code": 1.0}
    assert (found.problems, found.pass_at) == (3, {})
    assert found.summary()["accuracy/code"] == 1.0


def test_an_answer_that_nobody_could_judge_is_not_a_wrong_one() -> None:
    found = summarise(EXAMPLES, greedy(RIGHT, UNJUDGED, UNJUDGED), [])
    assert found.accuracy == 1.0
    assert found.by_domain["arithmetic"] == 1.0
    assert isnan(found.by_domain["code"])
    assert found.verdicts == {"pass": 1, "infra_error": 2}


def test_pass_at_k_is_over_the_problems_with_k_judged_samples() -> None:
    drawn = [
        *(answer("a", verdict) for verdict in (RIGHT, WRONG)),
        *(answer("b", verdict) for verdict in (WRONG, WRONG)),
        *(answer("c", verdict) for verdict in (RIGHT, UNJUDGED)),
    ]
    found = summarise(EXAMPLES, greedy(RIGHT, RIGHT, RIGHT), drawn)
    assert found.pass_at == {1: pytest.approx((0.5 + 0 + 1) / 3), 2: pytest.approx((1 + 0) / 2)}


def test_lengths_and_cut_off_answers_are_those_of_the_greedy_ones() -> None:
    answers = [
        answer("a", WRONG, tokens=5, finish=FinishReason.LENGTH),
        answer("b", RIGHT),
        answer("c", RIGHT, tokens=1),
    ]
    found = summarise(EXAMPLES, answers, [answer(id_, RIGHT, tokens=50) for id_ in EXAMPLES])
    assert (found.mean_length, found.truncated) == (3.0, pytest.approx(1 / 3))
    assert [row["greedy"] for row in found.rows] == [True] * 3 + [False] * 3
