"""A recipe's rewards probed with cheap tricks, on answers of the policy that it starts from, or on those of a file."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from align.data.chat import answer_text
from align.data.drawing import Source, items_of_step
from align.errors import UserError, naming, reward_errors
from align.evaluate.probe import Effect, keep, probe, record_of
from align.experience import Problem, reward_sample
from align.model.policy import load_tokenizer, write_random_policy
from align.recipe import GrpoRecipe, ModelOptions, PlannedStage
from align.run import read_status, write_atomically
from align.run.files import refuse_existing
from align.session.checks import check, check_names
from align.stages.commands import Findings
from align.stages.grpo import load_grpo_data
from align.tools.offline import running_fleet
from align.tools.score_file import rows_of, sample_of_line
from reward import Mixture, Sample
from reward.tricks import TRICKS, Trick, own_trick
from rollout import Group

PROMPTS, SAMPLES = 64, 2
"""How many answers are sampled of the start policy when not said."""


def probe_recipe(
    stage: PlannedStage,
    console: Console,
    *,
    answers: Path | None = None,
    prompts: int | None = None,
    samples: int | None = None,
    tricks: Sequence[str] = (),
    out: Path | None = None,
) -> None:
    """Probe the rewards of a GRPO recipe, print a table for each, keep the result, and write it to `out` as JSON where that is given.

    The answers are those in the file `answers`, or `samples` each (SAMPLES when None) of the start policy to `prompts` (PROMPTS) of the recipe's prompts, drawn as in
    training. `tricks` are of one's own, in files. Raises UserError before an engine starts for what cannot be probed.
    """
    recipe = stage.recipe
    if not isinstance(recipe, GrpoRecipe) or not recipe.is_rewarded:
        raise UserError(
            f"{stage.file}: stage {recipe.stage} trains on no rewards; a probe is for recipes of the stage grpo that do"
        )
    if out is not None:
        refuse_existing(out)
    all_tricks = tricks_with(tricks)
    check_names(recipe.data, recipe.data_stage, recipe.roles())
    with naming("rewards"), reward_errors():
        mixture = Mixture(recipe.rewards, infra_error_limit=1.0)
        mixture.check_ready()
    if answers is not None:
        if prompts is not None or samples is not None:
            raise UserError(
                "--prompts and --samples have no effect with --answers, of which all are probed: leave them out"
            )
        found = [sample_of_line(row) for row in rows_of(answers)]
        refuse_other_domains(mixture, found, answers)
    else:
        check(stage.parts)
        tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
        problems = first_problems(
            load_grpo_data(recipe, tokenizer, Findings()).sources, recipe.seed, prompts or PROMPTS
        )
        with tempfile.TemporaryDirectory() as place:
            policy = start_policy(stage.before, recipe.model, recipe.seed, Path(place), console)
            with (
                console.status(f"{policy.path} answers {len(problems)} prompts"),
                running_fleet(policy, recipe.rollout, tokenizer) as fleet,
            ):
                fleet.wait_until_ready()
                drawn = fleet.sample(
                    [p.prompt for p in problems], samples or SAMPLES, recipe.sampling, seed=recipe.seed, step=0
                )
                found = samples_of(drawn, problems, tokenizer)
    effects = probe(mixture, found, all_tricks, scale=recipe.grpo.advantage_scale)
    record = record_of(effects, recipe.model.path, len(found))
    try:
        keep(record, recipe.rewards, recipe.model)
    except OSError as error:
        console.print(f"the probe could not be kept for `align check`: {error}")
    for name in dict.fromkeys(effect.reward for effect in effects):
        show([effect for effect in effects if effect.reward == name], len(found), console)
    if out is not None:
        write_atomically(out, json.dumps(record, indent=1))
        console.print(f"the numbers are in {out}")


def tricks_with(own: Sequence[str]) -> list[Trick]:
    """All tricks, and those in files of the user's own. Raises UserError for one that cannot be used, or has the name of another."""
    with naming("--trick"), reward_errors():
        added = [own_trick(name) for name in own]
    names = [*TRICKS, *(trick.name for trick in added)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--trick: two tricks are called {twice!r}: give the function another name")
    return [*TRICKS.values(), *added]


def refuse_other_domains(mixture: Mixture, samples: Sequence[Sample], answers: Path) -> None:
    """Raise UserError for answers of a domain that no reward with a weight is for."""
    for domain in dict.fromkeys(sample.domain for sample in samples):
        if not any(term.weight and term.applies_to(domain) for term in mixture.terms):
            terms = "; ".join(map(str, mixture.terms))
            raise UserError(
                f"--answers {answers}: no reward with a weight is for answers of the domain {domain!r}, such as {samples[0].id!r}; the "
                f"recipe's rewards: {terms}. Give each row a column `domain`, or the answers that a run of the recipe has stored"
            )


def samples_of(groups: Iterable[Group], problems: Sequence[Problem], tokenizer: Any) -> list[Sample]:
    """What was drawn for the problems, as the rewards see it."""
    examples = {problem.example.id: problem.example for problem in problems}
    return [
        reward_sample(e, t, answer_text(tokenizer, e.messages, t.token_ids, e.tools))
        for group in groups
        for e in [examples[group.prompt.id]]
        for t in group.trajectories
    ]


def first_problems(sources: Sequence[Source[Any]], seed: int, count: int) -> list[Problem]:
    """The first `count` problems that the steps of a run take, each once; fewer where the data have no more."""
    found: dict[str, Problem] = {}
    for step in range(count):
        for problem in items_of_step(sources, seed=seed, step=step):
            found.setdefault(problem.example.id, problem)
        if len(found) >= count:
            break
    return list(found.values())[:count]


def start_policy(
    before: PlannedStage | None, model: ModelOptions, seed: int, place: Path, console: Console
) -> ModelOptions:
    """The policy that GRPO starts from: what the stage `before` it has made where it is done, or else the recipe's model."""
    if before is not None:
        if (read_status(before.directory) or {}).get("state") == "finished":
            final = before.directory.absolute() / "final"
            return model.model_copy(update={"path": str(final), "init": "pretrained"})
        console.print(f"{before.file} has not been run yet: the answers are those of the model before it")
    if model.init == "random":
        write_random_policy(model, place / "initial", seed)
        return model.model_copy(update={"path": str(place / "initial"), "init": "pretrained"})
    return model


def show(effects: Sequence[Effect], answers: int, console: Console) -> None:
    """Print the effects on a reward, those first that raise it most, and a line on which pay."""
    first = effects[0]
    if not first.prompts:
        console.print(f"{first.reward} is for none of the {answers} answers, or could score none: it is not probed\n")
        return
    table = Table(
        title=f"{first.reward}: {first.before:.3f} on average of {first.prompts} prompts ({answers} answers)",
        title_justify="left",
    )
    for column in ("trick", "changed", "mean reward moves by", "advantage", ""):
        table.add_column(column, justify="left" if column in ("trick", "") else "right")
    applied = [effect for effect in effects if effect.changed]
    for effect in sorted(applied, key=lambda effect: -effect.change):
        told = ", ".join(word for word, holds in (("pays", effect.pays), ("reinforced", effect.reinforced)) if holds)
        table.add_row(
            effect.trick,
            f"{effect.changed:.0%}",
            with_interval(effect.change, effect.interval),
            with_interval(effect.advantage, effect.advantage_interval),
            told,
        )
    console.print(table)
    paid = [effect.trick for effect in applied if effect.pays]
    told = f"{first.reward} pays for {len(paid)} of {len(applied)} tricks{': ' + ', '.join(paid) if paid else ''}"
    if len(applied) < len(effects):
        told += f"; {', '.join(effect.trick for effect in effects if not effect.changed)}: no answer to apply to"
    if not any(effect.change for effect in applied):
        told += (
            f"\nNo trick moves {first.reward} at all: the answers are all worth the same to it, which says nothing of better ones. Probe it again "
            "when the policy has learned something, or on such answers with --answers FILE"
        )
    console.print(f"{told}\n")


def with_interval(mean: float, interval: tuple[float, float] | None) -> str:
    """A mean and half the width of its interval."""
    return f"{round(mean, 3) + 0.0:+.3f}" + (f" ± {(interval[1] - interval[0]) / 2:.3f}" if interval else "")
