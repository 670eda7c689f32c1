"""Chat RL with GRPO: group-relative advantages, no critic (DeepSeekMath, arXiv 2402.03300; DeepSeek-V2 report, 4.2).

One step samples G completions of each prompt, scores them, and takes the policy one or more updates along the clipped
surrogate. It departs from the papers in what they leave open: the standard deviation of a group is that of a sample, with
1e-4 added (see `align.losses.group_advantages`), and samples that could not be scored are left out of their group.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from align.data.drawing import Source, items_of_step, left_out, refill_of_step
from align.data.entries import Notes, entries_of
from align.evaluate.accuracy import Evaluation
from align.experience import Problem, ScoredGroup, gather, reader_of_prompts, row_of, submit, token_columns
from align.learner.objective import Objective, learning_rate
from align.losses import DistillOptions
from align.recipe import GrpoOptions, GrpoRecipe, ModelOptions
from align.report.habits import step_found
from align.session.checks import check_columns
from align.session.session import Session
from align.session.steps import CENSUS_STEP
from align.stages.advantages import Advantages, compare, updates_of
from align.stages.guards import Guards
from align.stages.held_out import HeldOut, Problems, load_problems
from align.stages.step_metrics import Clock, option_metrics, step_metrics
from rollout import SamplingOptions

SHOWN = ("reward", "accuracy", "distill/kl", "length", "agreement/mean", "step_seconds")


@dataclass(frozen=True, slots=True)
class GrpoData:
    """What the stage trains on, and what it is evaluated on."""

    sources: Sequence[Source[Problem]]
    held_out: Problems


def load_grpo_data(recipe: GrpoRecipe, tokenizer: Any, notes: Notes) -> GrpoData:
    """Everything the recipe names, read and checked. Raises UserError for what cannot be used."""
    held_out = load_problems(
        recipe.evaluation, recipe.data, recipe.rewards, recipe.rollout.max_length, tokenizer, notes
    )
    reader = reader_of_prompts(recipe, tokenizer, notes)
    entries = entries_of(recipe.data, recipe.data_stage)
    sources = reader.sources(entries, recipe.grpo.prompts_per_step, "grpo.prompts_per_step", held_out.prompts)
    items = (item for source in sources for item in source.items)
    check_columns(recipe.rewards, (item.example if isinstance(item, Problem) else item for item in items))
    return GrpoData(sources, held_out)


def train_grpo(recipe: GrpoRecipe, data: GrpoData, session: Session) -> tuple[ModelOptions, dict[str, Evaluation]]:
    """Run the stage from the session's policy. Returns the trained policy and its evaluations."""
    options, run, fleet = recipe.grpo, session.run, session.fleet
    objective = Objective(options, recipe.sampling.temperature)
    held_out = HeldOut(recipe, data.held_out, session)
    reference = reference_of(session.policy, recipe.reference, options.kl_coefficient)
    teacher = teacher_of(session.policy, options.distill)
    learner = session.new_learner(recipe.learner, recipe.seed, reference, options.routing_replay, teacher)
    # After a stage of `init_from`, the policy to start from is version 1.
    state = {"weight_version": int(recipe.init_from is not None), "learning_steps": 0}
    with session.learning(
        "GRPO", recipe, learner, options.steps, data.sources, reference=reference, teacher=teacher, state=state
    ) as steps:
        limit, state = recipe.learner.stop_after_bad_steps, steps.state
        samples = partial(step_found, run.directory)
        guards = Guards(
            recipe.alarms, recipe.guard, non_finite_limit=limit, samples=samples, warn=run.warn, state=state
        )
        # What goes on may have workers that got their weights from a learner that is gone.
        if steps.done or fleet.weight_version != state["weight_version"] or recipe.weights.precision != "model":
            learner.sync_weights(fleet, state["weight_version"])
        held_out.check_agreement(learner, "before GRPO")
        evaluations: dict[str, Evaluation] = {}
        if recipe.evaluation.before and not held_out.was_asked_before():
            evaluations |= held_out.evaluate_start("before GRPO", steps.done)

        def rate_policy(step: int) -> None:
            steps.note_accuracy(step, held_out.on_validation().evaluate(f"GRPO step {step}", step).accuracy)

        unrated = state.pop("unrated", None)  # where the run ended in its evaluation
        if unrated and recipe.evaluation.every:
            rate_policy(unrated)
        for step in steps:
            clock, name = Clock(), f"GRPO step {step + 1}"
            problems = items_of_step(data.sources, seed=recipe.seed, step=step)
            run.progress.phase("sampling")
            sample = partial(sample_and_score, session, recipe.sampling, options.group_size, recipe.seed, step, clock)
            scored, refill_seconds = sample(problems), dict[str, float]()
            if options.refill_rounds:
                further = partial(refill_of_step, data.sources, seed=recipe.seed, step=step)
                before = clock.total
                scored = refilled(scored, options, further, sample)
                refill_seconds = {"refill/seconds": clock.total - before}

            advantages = compare(scored, options)
            updates = updates_of(scored, advantages, options, recipe.sampling.max_new_tokens)
            clock.lap("advantages")
            run.progress.phase("training")
            rate = learning_rate(step, options.steps, recipe.learner.optimizer)
            sums, norm = learner.update(updates, objective, rate, partial(held_out.check_update, learner, when=name))
            clock.lap("training")
            sent = learner.sync_weights(fleet, fleet.weight_version + 1)
            state["weight_version"] = fleet.weight_version
            synced = held_out.check_sync(learner, name)
            clock.lap("weights")

            rows = sample_rows(scored, advantages, sums.log_probs, with_experts=recipe.rollout.record_experts)
            run.record_samples("grpo", step + 1, rows)
            metrics = (
                step_metrics(scored, advantages, sums, norm, clock, rewarded=recipe.is_rewarded)
                | option_metrics(options, advantages, sums)
                | refill_seconds
                | synced
                | learner.expert_load()
                | left_out(data.sources)
            )
            lost = learner.adapter_lost()
            sent_and_lost = {"learning_rate": rate, "weight_bytes": sent, "adapter/lost": lost}
            run.record_step("grpo", step + 1, metrics | sent_and_lost, SHOWN)
            state["learning_steps"] += 0 < norm < math.inf
            if 0 < norm < math.inf and state["learning_steps"] == CENSUS_STEP:
                steps.check_gradients(step + 1)
            if recipe.evaluation.every and (step + 1) % recipe.evaluation.every == 0 and step + 1 < options.steps:
                state["unrated"] = step + 1
                rate_policy(step + 1)
                del state["unrated"]
            guards.observe(step + 1, scored, advantages, metrics)

        trained = steps.save_final(session.policy)
        held_out.check_agreement(learner, "after GRPO")
        evaluations["after GRPO"] = held_out.evaluate("after GRPO", options.steps)
        held_out.run_hooks(trained, options.steps)
    return trained, evaluations


def reference_of(policy: ModelOptions, path: Path | None, kl_coefficient: float) -> ModelOptions | None:
    """The model that the KL is measured to: the policy to start from, or the one at `path`; None where there is no KL."""
    if not kl_coefficient:
        return None
    return policy if path is None else policy.model_copy(update={"path": str(path)})


def teacher_of(policy: ModelOptions, distill: DistillOptions | None) -> ModelOptions | None:
    """The model that is learned from, computed in the policy's dtype; None without distillation. Code that comes with it is not run."""
    if distill is None:
        return None
    return policy.model_copy(update={"path": distill.teacher, "trust_remote_code": False})


def sample_and_score(
    session: Session,
    sampling: SamplingOptions,
    group_size: int,
    seed: int,
    step: int,
    clock: Clock,
    problems: Sequence[Problem],
) -> list[ScoredGroup]:
    """A group of scored completions of each problem, in their order. Groups are scored while others are sampled."""
    prompts = [problem.prompt for problem in problems]
    groups = session.fleet.sample(prompts, group_size, sampling, seed=seed, step=step, keep_bad=True)
    submitted = submit(groups, problems, session.tokenizer, session.pool)
    clock.lap("sampling")
    scored = gather(submitted, problems, session.pool)
    clock.lap("scoring")
    return scored


def refilled(
    groups: Sequence[ScoredGroup],
    options: GrpoOptions,
    further: Callable[..., list[Problem | None]],
    sample: Callable[[Sequence[Problem]], list[ScoredGroup]],
) -> list[ScoredGroup]:
    """The groups of a step, groups of further problems in the place of those without variance; after them, those that these replaced.

    DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), in `options.refill_rounds` rounds at most. `further(round=n)` has a problem for each
    place, or None where there are no more.
    """
    trained, replaced = list(groups), list[ScoredGroup]()
    for number in range(1, options.refill_rounds + 1):
        places = compare(trained, options).zero_variance.nonzero().flatten().tolist()
        problems = further(round=number) if places else []
        found = {place: problem for place in places if (problem := problems[place]) is not None}
        if not found:
            break
        for place, group in zip(found, sample(list(found.values())), strict=True):
            replaced.append(trained[place])
            trained[place] = group
    return trained + replaced


def sample_rows(
    groups: Sequence[ScoredGroup],
    advantages: Advantages,
    log_probs: Sequence[Sequence[npt.NDArray[np.float32]]],
    *,
    with_experts: bool,
) -> list[dict[str, Any]]:
    """The samples of a step as rows of the run's table, with all that its update was made of.

    `log_probs` [update][sequence] [S] are the learner's, of what it computed, in the order of `updates_of`.
    """
    rows, learned = [], chain.from_iterable(log_probs)
    for p, group in enumerate(groups):
        for g, answer in enumerate(group.trajectories):
            found = next(learned) if advantages.computed[p, g] else None
            rows.append(
                row_of(group.problem.example, answer)
                | token_columns(answer.trajectory, found, with_experts=with_experts)
                | {"advantage": float(advantages.values[p, g]), "trained_on": bool(advantages.kept[p, g])}
            )
    return rows
