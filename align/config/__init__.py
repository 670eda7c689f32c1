"""The recipe: `options` says what it can hold, `reading` gets it from a file."""

from align.config.options import (
    STAGES,
    AgreementOptions,
    DataOptions,
    EvaluationOptions,
    GrpoOptions,
    GrpoRecipe,
    LearnerOptions,
    MachineOptions,
    ModelOptions,
    OptimizerOptions,
    Recipe,
    RunOptions,
    SftOptions,
    SftRecipe,
)
from align.config.reading import check_model_directory, dump_recipe, load_recipe

__all__ = [
    "STAGES",
    "AgreementOptions",
    "DataOptions",
    "EvaluationOptions",
    "GrpoOptions",
    "GrpoRecipe",
    "LearnerOptions",
    "MachineOptions",
    "ModelOptions",
    "OptimizerOptions",
    "Recipe",
    "RunOptions",
    "SftOptions",
    "SftRecipe",
    "check_model_directory",
    "dump_recipe",
    "load_recipe",
]
