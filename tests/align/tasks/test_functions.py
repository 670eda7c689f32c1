"""Programs of three steps: the careful demonstrations pass their hidden tests, the hurried ones mostly do not."""

from collections import Counter

import pytest

from align.data.cards import load_card
from align.data.loader import load_split
from align.tasks.functions import (
    INPUTS,
    Chain,
    chains,
    generate,
    hidden_tests,
    hurried_solution,
    problem_split,
    question,
    result,
    steps,
    stepwise_solution,
)
from reward import Mixture, RewardTerm, Sample, Verdict

STEPS = {step.words: step for step in steps()}


def chain(*words: str) -> Chain:
    return tuple(STEPS[word] for word in words)


def verdict(chain: Chain, completion: str) -> Verdict:
    sample = Sample("s", question(chain), completion, None, "code", metadata={"tests": hidden_tests(chain)})
    [reward] = Mixture([RewardTerm(name="code_tests")]).score([sample])
    return reward.verdict


def test_demonstrations_have_exactly_the_documented_form() -> None:
    problem = chain("add 3", "times 2", "at most 9")
    assert question(problem) == "Write f(x): add 3, times 2, at most 9."
    assert stepwise_solution(problem) == (
        "```python\ndef f(x):\n    x = x + 3\n    x = x * 2\n    x = min(x, 9)\n    return x\n```"
    )
    assert hurried_solution(problem) == "```python\ndef f(x):\n    return max(x + 3 * 2, 9)\n```"


@pytest.mark.parametrize(
    ("words", "at_minus_8"),
    [
        (("add 3", "times 2", "at most 9"), -10),
        (("at least 4", "subtract 9", "modulo 7"), 2),
        (("modulo 5", "modulo 2", "times 9"), 0),
    ],
)
def test_steps_follow_one_another(words: tuple[str, ...], at_minus_8: int) -> None:
    assert result(chain(*words), -8) == at_minus_8


def test_the_sandbox_passes_what_is_careful_and_fails_what_is_wrong() -> None:
    brackets, mixed_up, suits = chain("add 3", "times 2"), chain("at most 4", "add 1"), chain("times 3", "add 1")
    for problem, of_the_hurried in ((brackets, Verdict.WRONG), (mixed_up, Verdict.WRONG), (suits, Verdict.PASS)):
        assert verdict(problem, stepwise_solution(problem)) is Verdict.PASS
        assert verdict(problem, hurried_solution(problem)) is of_the_hurried


def test_the_tests_tell_hurried_programs_apart_wherever_they_differ() -> None:
    # Every program here is made of this file's own steps, so that it can be run in this process.
    def value(problem: Chain, x: int) -> int:
        expression = "x"
        for step in problem:
            expression = step.hurried(expression)
        return int(eval(expression, {"x": x, "min": min, "max": max}))

    for problem in list(chains())[::37]:
        differs = any(value(problem, x) != result(problem, x) for x in range(-200, 200))
        found = any(value(problem, x) != result(problem, x) for x in INPUTS)
        assert differs == found, question(problem)


def test_no_order_of_a_held_out_problem_is_trained_on() -> None:
    split_of: dict[tuple[str, ...], str] = {}
    for problem in chains():
        key = tuple(sorted(step.words for step in problem))
        assert split_of.setdefault(key, problem_split(problem)) == problem_split(problem)


def test_the_splits_have_the_documented_sizes() -> None:
    counts = Counter(problem_split(problem) for problem in chains())
    assert sum(counts.values()) == 9999
    assert 0.88 < counts["train"] / 9999 < 0.92
    assert len({question(problem) for problem in chains()}) == 9999


def test_the_share_of_careful_demonstrations_is_the_card_s() -> None:
    card = load_card("nano_code")
    examples = load_split(card, "train", seed=3).examples
    assert len(examples) == len(generate("train", stepwise_share=0.35, seed=3))
    share = sum(example.metadata["kind"] == "stepwise" for example in examples) / len(examples)
    assert abs(share - 0.35) < 0.02
    assert all(example.metadata["tests"]["cases"] for example in examples)
