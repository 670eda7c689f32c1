"""Whether there is room for what a stage is going to write, found out before it begins."""

import shutil
from pathlib import Path

from align.errors import UserError
from align.model.sizes import empty_model, model_sizes, read_config
from align.recipe import GrpoRecipe, TrainingRecipe

GB = 10**9
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
OPTIMIZER_BYTES = 12
"""Of a trained parameter: Adam's two moments and the copy in float32."""


def check_space(recipe: TrainingRecipe, directory: Path) -> None:
    """Raise UserError where the checkpoints that stay, one more that is being written, and the model do not fit."""
    need, free = bytes_needed(recipe), shutil.disk_usage(directory).free
    if free < need:
        raise UserError(
            f"run.dir: {directory} has {free / GB:.1f} GB free, and the run writes up to {need / GB:.1f} GB: "
            f"{recipe.keep_checkpoints} checkpoints (keep_checkpoints), one more while it is written, and the model at the end. "
            "Make room, or choose another directory with run.dir=…"
        )


def bytes_needed(recipe: TrainingRecipe) -> int:
    """What the stage has on the disk at most, estimated from the model's configuration; adapters count as nothing."""
    total = model_sizes(empty_model(read_config(recipe.model.path))).total
    element = ELEMENT_BYTES[recipe.model.dtype]
    model = total * element
    state = 0 if recipe.learner.lora else total * (element + OPTIMIZER_BYTES)
    best = isinstance(recipe, GrpoRecipe) and recipe.evaluation.every is not None
    checkpoints = recipe.keep_checkpoints + 1 + best if recipe.save_every else 1
    return checkpoints * (model + state) + model * (2 if recipe.model.init == "random" else 1)
