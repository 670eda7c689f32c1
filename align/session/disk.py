"""What a run writes: how much of the disk its checkpoints take, and how long one takes to be written."""

import shutil

from align.errors import UserError
from align.learner.state import WRITTEN_A_SECOND
from align.model.sizes import ELEMENT_BYTES, model_sizes, shapes_of
from align.recipe import ModelOptions, TrainingRecipe
from align.recipe.learner import LearnerOptions

GB = 10**9
LEAST_GRACE_S = 8.0
OPTIMIZER_BYTES = 12
"""Of a trained parameter: Adam's two moments and the copy in float32."""


def check_space(recipe: TrainingRecipe, need: int) -> None:
    """Raise UserError where a run needs more bytes than the disk of its directory has free."""
    directory = recipe.directory.expanduser().absolute()
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise UserError(
            f"run.dir: {directory} has {free / GB:.1f} GB free, and the run writes up to {need / GB:.1f} GB: "
            f"{recipe.keep_checkpoints} checkpoints (keep_checkpoints), one more while it is written, and the model at the end. "
            "Make room, or choose another directory with run.dir=…"
        )


def bytes_needed(recipe: TrainingRecipe, parameters: int) -> int:
    """What a stage whose model has so many parameters has on the disk at most; adapters count as nothing."""
    model = recipe.model
    weights = parameters * ELEMENT_BYTES[model.dtype]
    written = most_checkpoints(recipe) * checkpoint_bytes(model, recipe.learner, parameters)
    return written + weights * (2 if model.init == "random" else 1)


def most_checkpoints(recipe: TrainingRecipe) -> int:
    """How many checkpoints there are at once: those that stay, the most accurate one, and the one that is being written."""
    keep, evaluation = recipe.keep_checkpoints, recipe.roles().evaluation
    best = evaluation is not None and evaluation.every is not None
    return keep + 1 + best if recipe.save_every else keep + 1 if best else 1


def checkpoint_bytes(model: ModelOptions, learner: LearnerOptions, parameters: int) -> int:
    """What a checkpoint takes: the model, and what the learner ranks need to go on, which is next to nothing of an adapter."""
    weight = ELEMENT_BYTES[model.dtype]
    return parameters * (weight if learner.lora else 2 * weight + OPTIMIZER_BYTES)


def default_grace_s(model: ModelOptions, learner: LearnerOptions | None) -> float:
    """Seconds that a run may go on after it is told to stop: what its checkpoint takes to be written, and no less than 8."""
    if learner is None:
        return LEAST_GRACE_S
    try:
        parameters = model_sizes(shapes_of(model)).total
    except UserError:  # it is told where the model is loaded
        return LEAST_GRACE_S
    return max(LEAST_GRACE_S, checkpoint_bytes(model, learner, parameters) / WRITTEN_A_SECOND)
