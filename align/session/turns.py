"""Learners and rollout workers on the same GPUs: while one side works, what the other holds is in the CPU's memory."""

from align.learner.group import LearnerGroup
from align.recipe import ModelOptions, PolicyRecipe
from align.session.engines import Engines
from rollout import Fleet


def start_learner(
    recipe: PolicyRecipe, policy: ModelOptions, engines: Engines, reference: ModelOptions | None = None
) -> LearnerGroup:
    """The learner of a stage, which takes turns with the rollout workers where it shares GPUs with them."""
    places = engines.places
    learner = LearnerGroup(
        policy,
        recipe.learner,
        seed=recipe.seed,
        reference=reference,
        weight_sync=engines.weight_sync,
        placement_group=places,
    )
    if places is not None:
        take_turns(engines.fleet, learner)
    return learner


def take_turns(fleet: Fleet, learner: LearnerGroup) -> None:
    """Whichever side is used next, the other makes room first."""

    def workers_turn() -> None:
        learner.rest()
        fleet.onload()

    def learners_turn() -> None:
        fleet.offload()
        learner.rise()

    fleet.before_use, learner.before_use = workers_turn, learners_turn
