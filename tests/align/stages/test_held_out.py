"""What a stage asks of its policy."""

from pathlib import Path
from typing import Any

import pytest

from align.model.policy import load_tokenizer
from align.recipe import load_recipe
from align.stages.held_out import load_problems


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_problems_are_of_the_split_that_is_held_out(split: str) -> None:
    recipe: Any = load_recipe(Path("recipes/nano/sft.yaml"), [f"evaluation.split={split}", "evaluation.limit=40"])
    tokenizer = load_tokenizer(recipe.model.path)
    problems = load_problems(recipe.evaluation, recipe.data, recipe.rewards, recipe.rollout.max_length, tokenizer)
    assert len(problems.problems) == 40
    assert all(problem.prompt.id.startswith(f"nano_math/{split}/") for problem in problems.problems)
    assert {prompt.id for prompt in problems.probe} <= {problem.prompt.id for problem in problems.problems}
