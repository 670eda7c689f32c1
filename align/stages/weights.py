"""New weights from the learner to the rollout workers, by the recipe's transport."""

from align.config import PolicyRecipe
from align.learner.group import LearnerGroup
from align.run import RunDirectory
from rollout import Directory, Fleet, ObjectStore, Transport


def send_weights(learner: LearnerGroup, fleet: Fleet, version: int, transport: Transport) -> None:
    """Give the workers what has been trained; they sample with it, as weights of `version`, when this returns."""
    fleet.load(learner.publish(transport), version, modules=learner.trained.modules)


def transport_of(recipe: PolicyRecipe, directory: RunDirectory) -> Transport:
    """The transport that the recipe names."""
    bucket_bytes = recipe.weights.bucket_mb * 2**20
    if recipe.weights.transport == "directory":
        return Directory(directory.path.absolute() / "weights", bucket_bytes)
    return ObjectStore(bucket_bytes)
