"""Stages one after the other in one run."""

from align.config import GrpoRecipe, SftRecipe
from align.evaluate.problems import Evaluation
from align.stages.engines import start_engines
from align.stages.grpo import train_grpo
from align.stages.run import compare_stages, open_run
from align.stages.sft import train_sft


def run_sft(recipe: SftRecipe) -> int:
    """Chat SFT alone, from its recipe to `final/`."""
    with open_run(recipe) as run, start_engines(recipe, run) as engines:
        policy, evaluations = train_sft(recipe, engines, run)
        compare_stages(run.progress, evaluations)
        run.progress.note(f"the policy is in {policy.path}")
    return 0


def run_grpo(recipe: GrpoRecipe, first: SftRecipe | None) -> int:
    """GRPO, after the SFT stage `first` (which is a run of its own inside the run) where there is one."""
    with open_run(recipe) as run, start_engines(recipe, run) as engines:
        policy = engines.policy
        evaluations: dict[str, Evaluation] = {}
        if first is not None:
            first = first.model_copy(update={"rollout": recipe.rollout})
            with open_run(first, run.directory.child("sft"), run.progress) as inner:
                policy, evaluations = train_sft(first, engines, inner)
        policy, after = train_grpo(recipe, policy, engines, run)
        compare_stages(run.progress, evaluations | after)
        run.progress.note(f"the policy is in {policy.path}")
    return 0
