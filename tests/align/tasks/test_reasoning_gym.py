"""Tasks of reasoning_gym: what is loaded is what the reward can judge."""

import json
import warnings
from typing import Any

import pytest

from align.data.cards import DataCard, load_card
from align.data.loader import load_split
from align.data.types import Example
from align.errors import UserError
from reward import Sample, Score, Verdict
from reward.reasoning_gym.answer import REFUSED_TASKS, reasoning_gym_answer

from ..rows import front_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from reasoning_gym.factory import DATASETS

WITHOUT_ANSWERS = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
BOXES = [
    {"Agent[0.5, 0.5]": "move(box_green, target_green)", "Agent[0.5, 1.5]": "move(box_red, target_red)"},
    {"Agent[0.5, 1.5]": "move(box_blue, target_blue)"},
]


def examples(task: str, *, seed: int = 0, size: int = 1, **params: Any) -> list[Example]:
    source = {"kind": "reasoning_gym", "task": task, "splits": {"test": {"size": size, "seed": seed}}}
    card = DataCard.model_validate(front_of(source, stages=["eval"]))
    return load_split(card, "test", params=params).examples


def judged(example: Example, completion: str) -> Score:
    sample = Sample(example.id, example.prompt_text, completion, example.answer, metadata=example.metadata)
    return reasoning_gym_answer(sample)


def test_a_task_loads_exactly_if_the_reward_takes_it() -> None:
    refused, without_answers = set(), set()
    for task in DATASETS:
        try:
            [example] = examples(task)
        except UserError:
            refused.add(task)
            continue
        assert judged(example, "I do not know.").verdict is Verdict.NO_ANSWER
        if example.answer is None:
            without_answers.add(task)
        else:
            assert isinstance(example.answer, str), task
    assert refused == REFUSED_TASKS.keys()
    assert without_answers == WITHOUT_ANSWERS


@pytest.mark.parametrize("task", sorted(REFUSED_TASKS))
def test_a_refusal_names_the_task_and_the_reason_of_the_reward(task: str) -> None:
    with pytest.raises(UserError) as refusal:
        examples(task)
    assert f"card mine: the reward refuses the task {task!r}" in str(refusal.value)
    assert REFUSED_TASKS[task] in str(refusal.value)


@pytest.mark.parametrize(
    ("task", "params", "solution", "failure"),
    [
        ("boxnet", {"max_row_num": 1, "max_column_num": 2}, json.dumps(BOXES), json.dumps(BOXES[:1])),
        ("graph_color", {}, "possible_answer", '{"0": 1}'),
        ("propositional_logic", {}, "example_answer", "Q"),
        ("rubiks_cube", {}, "example_correct_answer", "R"),
        ("rush_hour", {"max_moves": 3}, "B-1 C-1 A+4", "A+4"),
    ],
)
def test_where_a_task_gives_no_answer_its_scorer_knows_one(
    task: str, params: dict[str, Any], solution: str, failure: str
) -> None:
    """A solution of our own, or the one that the metadata have under a name."""
    [example] = examples(task, **params)
    assert example.answer is None
    found = example.metadata["reasoning_gym"]["entry"]["metadata"].get(solution, solution)
    written = found if isinstance(found, str) else json.dumps(found)
    assert judged(example, rf"\boxed{{{written}}}").verdict is Verdict.PASS
    assert judged(example, rf"\boxed{{{failure}}}").verdict is Verdict.WRONG


def test_a_problem_whose_answer_is_no_text_at_all_is_left_out() -> None:
    """In the task ab, the tokens of some programs annihilate each other: at seed 18, for one."""
    assert [example.id for example in examples("ab", seed=17, size=3)] == ["mine/test/0", "mine/test/2"]


def test_worked_solutions_end_with_the_answer_where_the_reward_looks_for_it() -> None:
    examples = load_split(load_card("gsm_symbolic"), "validation").examples
    assert len(examples) > 400
    for example in examples:
        assert example.response is not None
        assert "####" not in example.response
        assert judged(example, example.response).verdict is Verdict.PASS, example.id
