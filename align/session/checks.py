"""What a recipe names, looked up before any process starts."""

from collections import Counter
from pathlib import Path

from align.data.cards import Stage, load_card, require_stage
from align.data.types import SplitName
from align.errors import UserError
from align.evaluate import hooks
from align.recipe import PolicyRecipe, Recipe, SamplingRecipe
from reward import Mixture, RewardError


def check_names(recipe: Recipe, path: Path) -> None:
    """Raise UserError for a reward or data card of the recipe that is not there, or not meant for its stage."""
    if isinstance(recipe, SamplingRecipe):
        try:
            Mixture(recipe.rewards)
        except RewardError as error:
            raise UserError(f"{path}: rewards: {error}") from None
        domains = {load_card(data.card).domain for data in recipe.data}
        if isinstance(recipe, PolicyRecipe):
            domains |= {load_card(name).domain for name in recipe.evaluation_cards}
        for domain in sorted(domains):
            if not any(term.weight and term.applies_to(domain) for term in recipe.rewards):
                raise UserError(
                    f"{path}: rewards: none with a weight is for the domain {domain!r} of the recipe's data or evaluation; "
                    f"add one such as {{name: NAME, domains: [{domain}]}}"
                )
    for data in recipe.data:
        check_split(data.card, data.split, recipe.data_stage, f"{path}: data.split")
    if isinstance(recipe, PolicyRecipe):
        for name in recipe.evaluation_cards:
            check_split(name, recipe.evaluation.split, "eval", f"{path}: evaluation.split")
        check_evaluation_cards(recipe, f"{path}: evaluation")
        for hook in recipe.evaluation.hooks:
            hooks.check_params(hook.name, hook.params)


def check_evaluation_cards(recipe: PolicyRecipe, where: str) -> None:
    """Raise UserError for two cards of one name, and where no card has problems to choose checkpoints by."""
    cards = [load_card(name) for name in recipe.evaluation_cards]
    for name, count in Counter(card.name for card in cards).items():
        if count > 1:
            raise UserError(
                f"{where}.cards: {count} cards are named {name!r}, and their results could not be told apart"
            )
    if recipe.evaluation.every and not any("validation" in card.splits for card in cards):
        raise UserError(
            f"{where}.every: checkpoints are chosen by the validation split, and {', '.join(card.name for card in cards)} "
            "has none: add a card with one to evaluation.cards, or leave every out"
        )


def check_ready(recipe: Recipe) -> None:
    """Raise UserError where an evaluation hook of the recipe could not be run now, such as one whose judge is down."""
    if isinstance(recipe, PolicyRecipe):
        for hook in recipe.evaluation.hooks:
            hooks.check_ready(hook.name, hook.params)


def check_split(name: str, split: SplitName, stage: Stage, where: str) -> None:
    """Raise UserError where a data card is not meant for the stage or lacks the split."""
    card = load_card(name)
    require_stage(card, stage)
    if split not in card.splits:
        raise UserError(f"{where}: data card {card.name} has no split {split!r}, only {', '.join(sorted(card.splits))}")
