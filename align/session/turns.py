"""Learners and rollout workers on the same GPUs: while one side works, what the other holds is in the CPU's memory."""

from align.errors import UserError
from align.learner.group import LearnerGroup
from align.recipe import ModelOptions, PolicyRecipe
from align.session.engines import Engines
from rollout import Fleet


def start_learner(
    recipe: PolicyRecipe, policy: ModelOptions, engines: Engines, reference: ModelOptions | None = None
) -> LearnerGroup:
    """The learner of a stage, which takes turns with the rollout workers where it shares GPUs with them."""
    places = engines.places
    if recipe.colocate != (places is not None):
        raise UserError("colocate: the recipe of init_from must say the same as the one that goes on from it")
    if places is not None and recipe.learner.ranks > places.bundle_count:
        raise UserError(f"learner.ranks: {recipe.learner.ranks} ranks cannot take turns on {places.bundle_count} GPUs")
    learner = LearnerGroup(policy, recipe.learner, seed=recipe.seed, reference=reference, bundles=places)
    if places is not None:
        take_turns(engines.fleet, learner)
    return learner


def take_turns(fleet: Fleet, learner: LearnerGroup) -> None:
    """Whichever side is used next, the other makes room first."""

    def workers_turn() -> None:
        learner.rest()
        fleet.wake()

    def learners_turn() -> None:
        fleet.sleep()
        learner.rise()

    fleet.before_use, learner.before_use = workers_turn, learners_turn
