"""What a recipe names, looked up before any process starts."""

from pathlib import Path

from align.config import Recipe
from align.data.cards import load_card, require_stage
from align.errors import UserError
from reward import Mixture, RewardError


def check_names(recipe: Recipe, path: Path) -> None:
    """Raise UserError for a reward or data card of the recipe that is not there, or not meant for its stage."""
    try:
        Mixture(recipe.rewards)
    except RewardError as error:
        raise UserError(f"{path}: rewards: {error}") from None
    training = load_card(recipe.data.card)
    require_stage(training, recipe.stage)
    evaluation = load_card(recipe.evaluation.card or recipe.data.card)
    require_stage(evaluation, "eval")
    for key, card, split in (
        ("data.split", training, recipe.data.split),
        ("evaluation.split", evaluation, recipe.evaluation.split),
    ):
        if split not in card.splits:
            raise UserError(
                f"{path}: {key}: data card {card.name} has no split {split!r}, only {', '.join(sorted(card.splits))}"
            )
