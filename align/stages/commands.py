"""What the commands run: one stage, or the two of a GRPO recipe that names its SFT, in a run of its own."""

from collections.abc import Mapping
from dataclasses import replace

from align.config import GrpoRecipe, ModelOptions, PreferencesRecipe, SftRecipe
from align.evaluate.problems import Evaluation
from align.stages.engines import prepare_policy, start_engines, start_judges
from align.stages.grpo import load_grpo_data, train_grpo
from align.stages.preferences import gather_preferences, load_prompts
from align.stages.run import Run, compare_stages, open_run
from align.stages.sft import load_sft_data, train_sft


def run_sft(recipe: SftRecipe) -> int:
    """Chat SFT alone, from its recipe to `final/`."""
    with open_run(recipe) as run:
        policy, tokenizer = prepare_policy(recipe, run)
        data = load_sft_data(recipe, tokenizer, run)
        with start_engines(recipe, policy, tokenizer, run) as engines:
            trained, evaluations = train_sft(recipe, data, engines, run)
        finish(run, trained, evaluations)
    return 0


def run_grpo(recipe: GrpoRecipe, first: SftRecipe | None) -> int:
    """GRPO, after the SFT stage `first` (which is a run of its own inside the run) where there is one."""
    with open_run(recipe) as run:
        policy, tokenizer = prepare_policy(recipe, run)
        data = load_grpo_data(recipe, tokenizer, run)
        if first is not None:
            first = first.model_copy(update={"rollout": recipe.rollout})
            sft_data = load_sft_data(first, tokenizer, run)
        evaluations: dict[str, Evaluation] = {}
        with start_engines(recipe, policy, tokenizer, run) as engines:
            if first is not None:
                with open_run(first, run.directory.child("sft"), run) as inner, start_judges(first) as judges:
                    policy, evaluations = train_sft(first, sft_data, replace(engines, judges=judges), inner)
            trained, after = train_grpo(recipe, data, policy, engines, run)
        finish(run, trained, evaluations | after)
    return 0


def run_preferences(recipe: PreferencesRecipe) -> int:
    """Preference data from the policy's own answers, into `final/`."""
    with open_run(recipe) as run:
        policy, tokenizer = prepare_policy(recipe, run)
        prompts = load_prompts(recipe, tokenizer)
        with start_engines(recipe, policy, tokenizer, run) as engines:
            gather_preferences(recipe, prompts, engines, run)
    return 0


def finish(run: Run, trained: ModelOptions, evaluations: Mapping[str, Evaluation]) -> None:
    """Say what came of the run."""
    compare_stages(run.progress, evaluations)
    run.progress.note(f"the policy is in {trained.path}")
