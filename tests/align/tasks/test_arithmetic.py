import re
from collections import Counter

import pytest

from align.tasks.arithmetic import (
    generate,
    problem_level,
    problem_split,
    problems,
    question,
    result,
    worked_solution,
)

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize(
    ("problem", "solution"),
    [
        ((37, "+", 48), r"7+8=15, 3+4+1=8 \boxed{85}"),
        ((21, "+", 34), r"1+4=5, 2+3=5 \boxed{55}"),
        ((95, "+", 17), r"5+7=12, 9+1+1=11 \boxed{112}"),
        ((3, "+", 4), r"3+4=7, 0+0=0 \boxed{7}"),
        ((53, "-", 27), r"13-7=6, 5-2-1=2 \boxed{26}"),
        ((58, "-", 27), r"8-7=1, 5-2=3 \boxed{31}"),
        ((3, "-", 45), r"45-3: 5-3=2, 4-0=4 \boxed{-42}"),
        ((27, "-", 53), r"53-27: 13-7=6, 5-2-1=2 \boxed{-26}"),
        ((53, "-", 53), r"3-3=0, 5-5=0 \boxed{0}"),
    ],
)
def test_worked_solutions_have_exactly_the_documented_form(problem, solution):
    assert worked_solution(*problem) == solution


def test_every_step_of_every_worked_solution_is_true_and_leads_to_the_answer():
    for problem in problems():
        text = worked_solution(*problem)
        steps, answer = re.fullmatch(r"(?:\d+-\d+: )?(.*) \\boxed\{(-?\d+)\}", text).groups()
        values = []
        for step in steps.split(", "):
            expression, value = step.split("=")
            assert sum(map(int, re.findall(r"[+-]?\d+", expression))) == int(value), text
            values.append(int(value))
        assert int(answer) == result(*problem)
        assert values[0] % 10 + 10 * values[1] == abs(int(answer)), text


@pytest.mark.parametrize(
    ("problem", "level"),
    [
        ((7, "+", 8), 1),
        ((3, "-", 8), 1),
        ((21, "+", 34), 2),
        ((90, "+", 20), 2),
        ((5, "+", 10), 2),
        ((37, "+", 48), 3),
        ((58, "-", 27), 2),
        ((53, "-", 27), 3),
        ((27, "-", 53), 3),
        ((27, "-", 58), 2),
    ],
)
def test_levels(problem, level):
    assert problem_level(*problem) == level


def test_the_splits_partition_all_problems_ninety_to_five_to_five():
    by_split = {split: generate(split, worked_share=0.5, seed=0) for split in SPLITS}
    prompts = [example.prompt_text for examples in by_split.values() for example in examples]
    assert sorted(prompts) == sorted(question(*problem) for problem in problems())
    assert len(set(prompts)) == 20_000
    shares = {split: len(examples) / 20_000 for split, examples in by_split.items()}
    assert shares == pytest.approx({"train": 0.90, "validation": 0.05, "test": 0.05}, abs=0.01)
    assert all({example.level for example in examples} == {1, 2, 3} for examples in by_split.values())


def test_a_problem_and_its_mirror_image_share_a_split():
    for a, operation, b in problems():
        assert problem_split(a, operation, b) == problem_split(b, operation, a)


@pytest.mark.parametrize(
    ("problem", "split"),
    [
        ((11, "+", 12), "train"),
        ((11, "+", 23), "test"),
        ((11, "+", 25), "validation"),
        ((11, "-", 12), "train"),
        ((11, "-", 17), "test"),
        ((11, "-", 75), "validation"),
    ],
)
def test_the_split_of_a_problem_never_changes(problem, split):
    assert problem_split(*problem) == split


def test_seed_and_share_draw_the_kind_of_the_one_demonstration():
    first, again, other = (generate("train", worked_share=0.45, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert [example.id for example in first] == [example.id for example in other]
    assert [example.response for example in first] != [example.response for example in other]
    kinds = Counter(example.metadata["kind"] for example in first)
    assert kinds["worked"] / len(first) == pytest.approx(0.45, abs=0.02)
    for example in first:
        assert (example.response == rf"\boxed{{{example.answer}}}") == (example.metadata["kind"] == "direct")


@pytest.mark.parametrize(("share", "kind"), [(0.0, "direct"), (1.0, "worked")])
def test_extreme_shares_leave_one_kind(share, kind):
    assert {example.metadata["kind"] for example in generate("test", worked_share=share, seed=3)} == {kind}


def test_differences_may_have_a_share_of_their_own():
    examples = generate("test", worked_share=1.0, worked_differences=0.0, seed=3)
    kinds = {(" + " in example.prompt_text, example.metadata["kind"]) for example in examples}
    assert kinds == {(True, "worked"), (False, "direct")}
