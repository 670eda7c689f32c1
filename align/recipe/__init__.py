"""Recipes: `options` says what they can hold, `reading` gets one from a file, `pipeline` puts several in order."""

from align.recipe.changes import differences
from align.recipe.evaluation import AgainstOptions, EvaluationOptions
from align.recipe.learners import BFLOAT16_SUMS, MERGED_ADAPTERS, LearnerOptions, LoraOptions, OptimizerOptions
from align.recipe.options import (
    STAGES,
    DataOptions,
    GrpoOptions,
    GrpoRecipe,
    MachineOptions,
    ModelOptions,
    PolicyRecipe,
    PreferencesOptions,
    PreferencesRecipe,
    Recipe,
    RewardModelOptions,
    RewardModelRecipe,
    RunOptions,
    SamplingRecipe,
    ScoringOptions,
    SftOptions,
    SftRecipe,
    TrainingRecipe,
)
from align.recipe.pipeline import Pipeline, PlannedStage, load_pipeline
from align.recipe.reading import check_model_directory, dump_recipe, load_recipe, read_yaml
from align.recipe.watches import AgreementOptions, AlarmOptions, GuardOptions

__all__ = [
    "BFLOAT16_SUMS",
    "MERGED_ADAPTERS",
    "STAGES",
    "AgainstOptions",
    "AgreementOptions",
    "AlarmOptions",
    "DataOptions",
    "EvaluationOptions",
    "GrpoOptions",
    "GrpoRecipe",
    "GuardOptions",
    "LearnerOptions",
    "LoraOptions",
    "MachineOptions",
    "ModelOptions",
    "OptimizerOptions",
    "Pipeline",
    "PlannedStage",
    "PolicyRecipe",
    "PreferencesOptions",
    "PreferencesRecipe",
    "Recipe",
    "RewardModelOptions",
    "RewardModelRecipe",
    "RunOptions",
    "SamplingRecipe",
    "ScoringOptions",
    "SftOptions",
    "SftRecipe",
    "TrainingRecipe",
    "check_model_directory",
    "differences",
    "dump_recipe",
    "load_pipeline",
    "load_recipe",
    "read_yaml",
]
