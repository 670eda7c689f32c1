"""What the commands run: a recipe, after the stage that its `init_from` names where there is one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.cards import HubSource
from align.data.entries import Notes, card_of, evaluated
from align.data.files import first_rows
from align.data.loader import NOTHING, HeldOutPrompts, domains_of
from align.errors import UserError, naming
from align.evaluate.accuracy import Evaluation
from align.evaluate.probe import notes_on
from align.model.policy import load_tokenizer
from align.recipe import (
    DpoRecipe,
    GrpoRecipe,
    ModelOptions,
    PlannedStage,
    PolicyRecipe,
    PreferencesRecipe,
    Recipe,
    RewardModelRecipe,
    SftRecipe,
    dump_recipe,
    kept_recipe,
)
from align.recipe.options import is_on_hub
from align.run import Progress, RunDirectory, read_status
from align.session.checks import check, check_reward_models, check_rewards_ready, to_be_made
from align.session.longer import make_longer
from align.session.ray import local_ray
from align.session.run import compare_stages, recorded_evaluations, refuse_changes
from align.session.session import Session, open_session
from align.stages.dpo import load_dpo_data, train_dpo
from align.stages.grpo import load_grpo_data, train_grpo
from align.stages.preferences import gather_preferences, load_prompts
from align.stages.reward_model import load_reward_model_data, show, train_reward_model
from align.stages.sft import load_sft_data, train_sft

FIRST_ROWS = 1000
"""Of each file `check_stages` looks at so many, or at as many as two steps take where that is more."""


@dataclass(slots=True)
class Findings:
    """What was found while stages were looked at: `warnings` that their runs will give, `notes`, such as what was not looked at, and `hints`
    on what is worth doing before a run."""

    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def warn(self, text: str, **data: Any) -> None:
        """Note a warning; see `align.data.entries.Notes`."""
        self.warnings.append(text)

    def tell(self, kind: str, text: str, **data: Any) -> None:
        """Leave out what is no warning."""


def check_stages(stages: Sequence[PlannedStage], *, whole: bool) -> Findings:
    """Look at all that the runs of the stages look at before they start: what `check` does, and the data, encoded.

    Of each file the first rows are read, or with `whole` all. Raises UserError, which names the stage's file, for the first mistake.
    """
    found = Findings()
    for stage in stages:
        rows = None if whole else max(FIRST_ROWS, 2 * stage.recipe.roles().trained_sequences)
        # Rows of some levels may all be behind the first ones.
        evaluation = stage.recipe.roles().evaluation
        picks = any(data.levels for data in stage.recipe.data) or (evaluation is not None and evaluation.levels)
        with first_rows(None if picks else rows):
            found.notes += check([stage])
            with naming(str(stage.file)):
                unseen = check_data(stage.recipe, rows, found)
        check_rewards_ready([stage])
        found.notes += [f"{stage.file}: not looked at: {what}" for what in unseen]
        if isinstance(stage.recipe, GrpoRecipe):
            probed = notes_on(stage.recipe.rewards, stage.recipe.model, stage.file)
            found.hints += [f"{stage.file}: {note}" for note in probed]
    found.notes = list(dict.fromkeys(found.notes))
    return found


def check_data(recipe: Recipe, rows: int | None, found: Findings) -> list[str]:
    """Read and encode the data of a stage as its run does, `rows` of each entry at most; those of the hub only where all are read.

    Raises UserError as the run does; returns what could not be looked at.
    """
    evaluation = recipe.roles().evaluation
    if any(map(to_be_made, [*(data.path for data in recipe.data), evaluation.path if evaluation else None])):
        return ["data that are still to be made"]
    entries = [(data.path, card_of(data)) for data in recipe.data]
    if isinstance(recipe, PolicyRecipe):
        entries += [(entry.path, entry.card) for entry in evaluated(recipe.evaluation, recipe.data)]
    hub = dict.fromkeys(
        card.called
        for path, card in entries
        if (isinstance(card.source, HubSource) if path is None else is_on_hub(path))
    )
    if hub and rows is not None:
        return [f"the rows of {', '.join(hub)}, which are on the hub; --whole reads them"]
    try:
        tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    except UserError:
        return []  # `check` has said so
    if rows is not None:
        limited = [data.model_copy(update={"limit": min(data.limit or rows, rows)}) for data in recipe.data]
        recipe = recipe.model_copy(update={"data": limited})
    if isinstance(recipe, SftRecipe):
        load_sft_data(recipe, tokenizer, found)
    elif isinstance(recipe, DpoRecipe):
        load_dpo_data(recipe, tokenizer, found)
    elif isinstance(recipe, GrpoRecipe):
        load_grpo_data(recipe, tokenizer, found)
    elif isinstance(recipe, RewardModelRecipe):
        load_reward_model_data(recipe, tokenizer, found)
    elif isinstance(recipe, PreferencesRecipe):
        load_prompts(recipe, tokenizer, found)
    return []


def run_stage(stage: PlannedStage, *, longer: bool = False) -> None:
    """Run a stage, and the one before it where that is not done; with `longer`, one that has finished goes on with more steps.

    Raises UserError for what `check` and `make_longer` find.
    """
    check(stage.parts)
    check_reward_models(stage.parts)
    check_rewards_ready(stage.parts)
    recipe = stage.recipe
    if longer and (later := make_longer(stage.directory, recipe)):
        print(
            f"the stages after it in the pipeline ({', '.join(later)}) are of the shorter run: give the pipeline's file the new number of steps, "
            f"and run them again by `align pipeline FILE --from {later[0]}`"
        )
    if isinstance(recipe, SftRecipe):
        run_sft(recipe)
    elif isinstance(recipe, DpoRecipe):
        run_dpo(recipe, stage.before)
    elif isinstance(recipe, GrpoRecipe):
        run_grpo(recipe, stage.before)
    elif isinstance(recipe, RewardModelRecipe):
        run_reward_model(recipe, stage.before)
    elif isinstance(recipe, PreferencesRecipe):
        run_preferences(recipe)


def run_sft(recipe: SftRecipe, also_held_out: HeldOutPrompts = NOTHING) -> None:
    """Chat SFT, from its recipe to `final/`. `also_held_out`: prompts of a stage after it that it may not be trained on."""
    with open_session(recipe) as session:
        data = load_sft_data(recipe, session.tokenizer, session.run, also_held_out)
        session.start_sampling(recipe.roles())
        trained, evaluations = session.restarting(lambda: train_sft(recipe, data, session))
        finish(session.run.progress, trained, evaluations)


def run_dpo(recipe: DpoRecipe, before: PlannedStage | None) -> None:
    """DPO, from the policy of its recipe or of the stage before it to `final/`."""
    with open_session(recipe) as session:
        data = load_dpo_data(recipe, session.tokenizer, session.run)
        evaluations = go_on_from(before, session, data.problems.prompts)
        session.start_sampling(recipe.roles())
        trained, after = session.restarting(lambda: train_dpo(recipe, data, session))
        finish(session.run.progress, trained, evaluations | after)


def run_grpo(recipe: GrpoRecipe, before: PlannedStage | None) -> None:
    """GRPO, from the policy of its recipe or of the stage before it to `final/`."""
    with open_session(recipe) as session:
        data = load_grpo_data(recipe, session.tokenizer, session.run)
        evaluations = go_on_from(before, session, data.held_out.prompts)
        session.start_sampling(recipe.roles())
        trained, after = session.restarting(lambda: train_grpo(recipe, data, session))
        finish(session.run.progress, trained, evaluations | after)


def run_reward_model(recipe: RewardModelRecipe, before: PlannedStage | None) -> None:
    """A reward model, from the policy of its recipe or of the stage before it to `final/`."""
    with open_session(recipe) as session:
        data = load_reward_model_data(recipe, session.tokenizer, session.run)
        go_on_from(before, session)
        with local_ray(gpus=recipe.roles().gpus):
            trained, evaluation = session.restarting(lambda: train_reward_model(recipe, data, session))
        show(evaluation, session.run.progress)
        session.run.progress.note(f"the reward model is in {trained.path}")


def run_preferences(recipe: PreferencesRecipe) -> None:
    """Preference data from the policy's own answers, into `final/`."""
    with open_session(recipe) as session:
        prompts = load_prompts(recipe, session.tokenizer, session.run)
        session.start_sampling(recipe.roles())
        gather_preferences(recipe, prompts, session)


def go_on_from(
    before: PlannedStage | None, session: Session, held_out: HeldOutPrompts = NOTHING
) -> dict[str, Evaluation]:
    """Give the session the policy of the stage `before`, where there is one, and return that one's evaluations; see `policy_of`."""
    if before is None:
        return {}
    session.policy, evaluations = policy_of(before, session.policy, session.run, held_out)
    return evaluations


def policy_of(
    before: PlannedStage, policy: ModelOptions, notes: Notes, held_out: HeldOutPrompts = NOTHING
) -> tuple[ModelOptions, dict[str, Evaluation]]:
    """What the stage `before` another makes of that one's policy, and its evaluations; it is run where it is not done.

    Raises UserError where it was done with another recipe.
    """
    directory, recipe = RunDirectory(before.directory.absolute()), before.recipe
    assert isinstance(recipe, SftRecipe)
    status = read_status(directory.path)
    if status is not None:
        # What the two share is this run's, whose changes have been told or refused.
        directory.save_recipe(dump_recipe(kept_recipe(directory.recipe_file, before.overrides)))
    if status is not None and status["state"] == "finished":
        refuse_changes(directory, recipe)
        notes.tell("init_from", "SFT: done before")
    else:
        if before.replaced:
            notes.tell("init_from", f"SFT takes over what it shares with this recipe: {'; '.join(before.replaced)}")
        run_sft(recipe, held_out)
    domains = list(
        dict.fromkeys(
            domain for entry in evaluated(recipe.evaluation, recipe.data) for domain in domains_of(entry.card)
        )
    )
    trained = policy.model_copy(update={"path": str(directory.final_directory)})
    return trained, recorded_evaluations(directory, domains)


def finish(progress: Progress, trained: ModelOptions, evaluations: Mapping[str, Evaluation]) -> None:
    """Say what came of the run."""
    compare_stages(progress, evaluations)
    progress.note(f"the policy is in {trained.path}")
