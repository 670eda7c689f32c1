"""Where learner ranks and rollout workers are that have a GPU together."""

from typing import Any

import torch

from align.errors import UserError
from align.recipe import PolicyRecipe, SamplingRecipe

A_LITTLE = 0.01
PATIENCE_S = 60.0


def shared_places(recipe: SamplingRecipe) -> Any:
    """A placement group with a bundle for each learner rank and rollout worker that take turns; None where they do not.

    Raises UserError where the cluster has not so many GPUs.
    """
    import ray

    if not (isinstance(recipe, PolicyRecipe) and recipe.colocate):
        return None
    count = max(recipe.learner.ranks, recipe.rollout.workers)
    device = {"GPU": 1.0} if torch.cuda.is_available() else {"CPU": A_LITTLE}
    places = ray.util.placement_group([device] * count)
    if not places.wait(PATIENCE_S):
        raise UserError(
            f"colocate: {count} GPUs are wanted, one for each learner rank and rollout worker, and Ray has "
            f"{ray.available_resources().get('GPU', 0):g} free; lower learner.ranks and rollout.workers"
        )
    return places
