"""Which examples a stage trains on, and which of them a step takes."""

from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import TypeVar

from align.config import Recipe
from align.data.cards import load_card, require_stage
from align.data.loader import load_split
from align.data.types import Example, LoadedSplit, SplitName
from align.errors import UserError
from align.stages.run import Run

T = TypeVar("T")


def training_examples(recipe: Recipe, run: Run, *, a_step: int, a_step_key: str) -> list[Example]:
    """What `recipe.data` names, warning of held-out problems in it. Raises UserError for fewer than `a_step` takes."""
    loaded = load_examples(recipe, recipe.data.split, limit=recipe.data.limit)
    if loaded.dropped_contaminated:
        run.warn(f"{loaded.dropped_contaminated} training examples are held-out problems too and were left out")
    if loaded.unchecked:
        run.warn(
            f"data.path is one file, so it could not be checked for problems of the held-out splits "
            f"{', '.join(loaded.unchecked)}; give a directory with a file for each split"
        )
    if len(loaded.examples) < a_step:
        raise UserError(
            f"{a_step_key} is {a_step}, but data card {recipe.data.card!r} gives only {len(loaded.examples)} examples"
        )
    return loaded.examples


def load_examples(recipe: Recipe, split: SplitName, *, limit: int | None) -> LoadedSplit:
    """A split of the training data's card. Raises UserError where the card is not meant for the stage."""
    data = recipe.data
    card = load_card(data.card)
    require_stage(card, recipe.stage)
    return load_split(
        card, split, path=data.path, limit=limit, levels=data.levels, seed=recipe.seed, params=data.params
    )


def examples_of_step(examples: Sequence[T], count: int, *, seed: int, step: int) -> list[T]:
    """The `count` examples of a step: every example once an epoch, in an order drawn anew for each epoch.

    It is a function of (seed, step), so that a resumed run goes on where it stopped.
    Within a step no example comes twice; so `count` may not be more than there are.
    """
    total = len(examples)
    if count > total:
        raise ValueError(f"a step takes {count} examples, but there are only {total}")
    epoch_steps = total // count
    epoch, place = divmod(step, epoch_steps)
    order = permutation(total, seed, epoch)
    return [examples[i] for i in order[place * count : (place + 1) * count]]


@lru_cache(maxsize=4)
def permutation(total: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of 0..total-1."""
    order = list(range(total))
    Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
