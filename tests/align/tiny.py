"""Recipes for tests of what surrounds training: valid, and with as little in them as their stages allow."""

from pathlib import Path
from typing import Any

from align.recipe import STAGES, RewardModelRecipe
from align.run import read_jsonl

NANO = str(Path(__file__).parents[2] / "recipes" / "nano" / "policy")


def tiny_recipe(**keys: Any) -> RewardModelRecipe:
    """A recipe of the stage that needs the least, with some keys of its own."""
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


def small_recipe(stage: str, directory: Path, **keys: Any) -> Any:
    """A recipe of any stage, whose run is in `run` below a directory, with some keys of its own."""
    made: dict[str, Any] = {"stage": stage, "name": "small", "run": {"dir": directory / "run"}}
    made |= {"model": {"path": "recipes/nano/policy"}}
    if stage != "preferences":
        made |= {"learner": {"optimizer": {"learning_rate": 1e-3}}}
    if stage != "reward_model":
        made |= {"rollout": {"max_length": 128}}
    if stage in ("grpo", "preferences"):
        made |= {"rewards": [{"name": "exact_answer"}]}
    own = {
        "sft": {"sft": {"steps": 1, "sequences_per_step": 2}},
        "grpo": {"grpo": {"steps": 1, "prompts_per_step": 2, "group_size": 2}},
        "reward_model": {"reward_model": {"steps": 1, "pairs_per_step": 2}},
        "preferences": {},
    }
    return STAGES[stage].model_validate(made | own[stage] | keys)


def events(directory: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """What the run of a small recipe has noted, or what of a kind."""
    return [event for event in read_jsonl(directory / "run" / "events.jsonl") if kind in (None, event["kind"])]
