"""A recipe for tests of what surrounds training: valid, and of the stage that needs the least."""

from pathlib import Path
from typing import Any

from align.recipe import RewardModelRecipe

NANO = str(Path(__file__).parents[2] / "recipes" / "nano" / "policy")


def tiny_recipe(**keys: Any) -> RewardModelRecipe:
    """A recipe with some keys of its own."""
    return RewardModelRecipe.model_validate(
        {
            "stage": "reward_model",
            "name": "tiny",
            "model": {"path": NANO, "init": "random"},
            "data": {"card": "nano_helpful"},
            "learner": {"optimizer": {"learning_rate": 1e-3}},
            "reward_model": {"steps": 9},
            **keys,
        }
    )
