"""reasoning_gym's own verifiers, without their holes."""

import inspect
from typing import Any

import pytest

from reward import Mixture, RewardTerm, Sample, UnusableAnswer, Verdict, normalise
from reward.reasoning_gym_answer import PLAIN_TASKS, reasoning_gym_answer


def sample(completion: str, task: str, entry: dict[str, Any]) -> Sample:
    metadata = {"reasoning_gym": {"task": task, "entry": entry}}
    return Sample(id="s", prompt="?", completion=completion, answer=None, metadata=metadata)


@pytest.mark.parametrize("task", sorted(PLAIN_TASKS))
def test_every_plain_task_passes_its_own_answers_and_no_others(task: str) -> None:
    import reasoning_gym

    for entry in list(reasoning_gym.create_dataset(task, size=5, seed=1)):
        gold = entry["answer"]
        right = reasoning_gym_answer(sample(rf"\boxed{{{gold}}}", task, entry))
        assert (right.verdict, right.value) == (Verdict.PASS, 1.0)
        for wrong in (gold + "1", f"{gold} or 5", f"-{gold}x", "", "1e9999999", "sNaN"):
            assert reasoning_gym_answer(sample(rf"\boxed{{{wrong}}}", task, entry)).value == 0.0


@pytest.mark.parametrize("task", sorted(PLAIN_TASKS))
def test_no_plain_verifier_evaluates_the_answer(task: str) -> None:
    from reasoning_gym import get_score_answer_fn

    source = inspect.getsource(get_score_answer_fn(task))
    assert not any(word in source for word in ("eval", "parse_expr", "sympy", "json"))


@pytest.mark.parametrize(
    ("task", "gold", "hole"),
    [
        ("gsm_symbolic", "288", "-288"),
        ("gsm_symbolic", "288", "288 or 5"),
        ("gsm_symbolic", "288", "\N{ARABIC-INDIC DIGIT TWO}\N{ARABIC-INDIC DIGIT EIGHT}" * 2),
        ("chain_sum", "5", "\N{FULLWIDTH DIGIT FIVE}"),
        ("chain_sum", "5", "15"),
        ("chain_sum", "15", "1_5"),
        ("gcd", "5", "1 2 3 4 5"),
    ],
)
def test_the_holes_of_the_verifiers_are_closed(task: str, gold: str, hole: str) -> None:
    score = reasoning_gym_answer(sample(rf"\boxed{{{hole}}}", task, {"answer": gold, "metadata": {}}))
    assert (score.verdict, score.value) == (Verdict.WRONG, 0.0)


def test_the_tasks_verifier_can_still_refuse_an_equal_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward.reasoning_gym_answer._verifier", lambda task: lambda answer, entry: 0.9)
    assert reasoning_gym_answer(sample(r"\boxed{5}", "gcd", {"answer": "5"})).verdict is Verdict.WRONG


def test_a_spray_or_no_answer_never_reaches_the_verifier() -> None:
    entry = {"answer": "5", "metadata": {}}
    assert reasoning_gym_answer(sample(r"\boxed{5} \boxed{6}", "gcd", entry)).verdict is Verdict.WRONG
    assert reasoning_gym_answer(sample("5", "gcd", entry)).verdict is Verdict.NO_ANSWER


@pytest.mark.parametrize("task", ["polynomial_equations", "codeio", "no such task"])
def test_other_tasks_are_refused(task: str) -> None:
    with pytest.raises(UnusableAnswer, match="not a plain one"):
        reasoning_gym_answer(sample(r"\boxed{5}", task, {"answer": "5"}))


@pytest.mark.parametrize("metadata", [{}, {"reasoning_gym": {}}, {"reasoning_gym": {"task": "gcd", "entry": {}}}])
def test_metadata_without_the_entry_is_unusable(metadata: dict[str, Any]) -> None:
    bare = Sample(id="s", prompt="?", completion=r"\boxed{5}", answer="5", metadata=metadata)
    with pytest.raises(UnusableAnswer, match="metadata needs"):
        reasoning_gym_answer(bare)


def test_it_works_by_name_in_a_mixture() -> None:
    mixture = Mixture([RewardTerm(name="reasoning_gym")])
    judged = mixture.score([sample(r"\boxed{1,234}", "chain_sum", {"answer": "1234"})])
    assert judged[0].value == 1.0
    assert normalise("1,234") == "1234"
