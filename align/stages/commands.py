"""What the commands run: one stage, or the two of a GRPO recipe that names its SFT, in a run of its own."""

from collections.abc import Mapping

from align.evaluate.problems import Evaluation
from align.recipe import GrpoRecipe, ModelOptions, PreferencesRecipe, SftRecipe, differences
from align.session.engines import prepare_policy, start_engines
from align.session.run import Run, compare_stages, open_run
from align.session.steps import restarting
from align.stages.grpo import load_grpo_data, train_grpo
from align.stages.preferences import gather_preferences, load_prompts
from align.stages.sft import finished_sft, load_sft_data, sft_before, train_sft


def run_sft(recipe: SftRecipe) -> int:
    """Chat SFT alone, from its recipe to `final/`."""
    with open_run(recipe) as run:
        policy, tokenizer = prepare_policy(recipe, run)
        data = load_sft_data(recipe, tokenizer, run)
        with start_engines(recipe, policy, tokenizer, run) as engines:
            trained, evaluations = restarting(run, lambda: train_sft(recipe, data, engines, run))
        finish(run, trained, evaluations)
    return 0


def run_grpo(recipe: GrpoRecipe, first: SftRecipe | None) -> int:
    """GRPO, after the SFT stage `first` (which is a run of its own inside the run) where there is one."""
    before = None
    with open_run(recipe) as run:
        policy, tokenizer = prepare_policy(recipe, run)
        data = load_grpo_data(recipe, tokenizer, run)
        if first is not None:
            first = with_engines_of(first, recipe, run)
            sft_data = load_sft_data(first, tokenizer, run, data.problems.prompts)
            before = finished_sft(first, sft_data, policy, run)
        evaluations: dict[str, Evaluation] = {}
        if before is not None:
            policy, evaluations = before
        with start_engines(recipe, policy, tokenizer, run) as engines:
            if first is not None and before is None:
                policy, evaluations = sft_before(first, sft_data, engines, run)
            trained, after = restarting(run, lambda: train_grpo(recipe, data, policy, engines, run))
        finish(run, trained, evaluations | after)
    return 0


def with_engines_of(first: SftRecipe, recipe: GrpoRecipe, run: Run) -> SftRecipe:
    """The SFT recipe as it is run inside the run of `recipe`, whose policy and rollout workers it has. What that changes is noted.

    Its own `rollout.max_length` still says which examples and answers there is room for.
    """
    own = {"max_length": first.rollout.max_length}
    inside = first.model_copy(update={"rollout": recipe.rollout.model_copy(update=own)})
    if changed := differences(first, inside.model_copy(update={"model": recipe.model})):
        run.tell("init_from", f"SFT starts from this run's policy and has its rollout workers: {'; '.join(changed)}")
    return inside


def run_preferences(recipe: PreferencesRecipe) -> int:
    """Preference data from the policy's own answers, into `final/`."""
    with open_run(recipe) as run:
        policy, tokenizer = prepare_policy(recipe, run)
        prompts = load_prompts(recipe, tokenizer, run)
        with start_engines(recipe, policy, tokenizer, run) as engines:
            gather_preferences(recipe, prompts, engines, run)
    return 0


def finish(run: Run, trained: ModelOptions, evaluations: Mapping[str, Evaluation]) -> None:
    """Say what came of the run."""
    compare_stages(run.progress, evaluations)
    run.progress.note(f"the policy is in {trained.path}")
