"""Chat RL with GRPO: group-relative advantages, no critic (DeepSeekMath, arXiv 2402.03300; DeepSeek-V2 report, 4.2).

One step samples G completions of each prompt, scores them, and takes the policy one or more updates along the clipped
surrogate. It departs from the papers in what they leave open: the standard deviation of a group is that of a sample, with
1e-4 added (see `align.losses.group_advantages`), and samples that nobody could judge are left out of their group.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
import torch

from align.data.drawing import Source, items_of_step
from align.data.types import Example
from align.evaluate.agreement import AgreementGate, Disagreement
from align.evaluate.problems import Answer, Evaluation, encode_prompts, gather_answers, row, submit_groups
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective, Sums
from align.learner.schedule import learning_rate
from align.losses import ZERO_STD, completion_weights, group_advantages
from align.recipe import GrpoOptions, GrpoRecipe, ModelOptions
from align.run import write_samples
from align.session.engines import Engines
from align.session.run import Run
from align.session.steps import Steps
from align.session.turns import start_learner
from align.stages.alarms import Alarms, SeenSample, no_history
from align.stages.bad_numbers import BadSamples, bad_samples
from align.stages.examples import Room, training_sources
from align.stages.held_out import CENSUS_STEP, HeldOut, Problems, load_problems
from align.stages.over_optimisation import OverOptimisationGuard
from reward import SampleReward, Verdict
from rollout import Completion, FinishReason, Prompt

SHOWN = ("reward", "accuracy", "length", "agreement/mean", "step_seconds")


@dataclass(frozen=True, slots=True)
class GrpoData:
    """What the stage trains on, the prompts by the example's id, and what it is evaluated on."""

    sources: Sequence[Source[Example]]
    prompts: Mapping[str, Prompt]
    problems: Problems


def load_grpo_data(recipe: GrpoRecipe, tokenizer: Any, run: Run) -> GrpoData:
    """Everything the recipe names, read and checked. Raises UserError for what cannot be used."""
    problems = load_problems(recipe, tokenizer)
    longest = recipe.rollout.max_length - recipe.sampling.max_new_tokens
    sources = training_sources(
        recipe,
        run,
        a_step=recipe.grpo.prompts_per_step,
        a_step_key="grpo.prompts_per_step",
        held_out=problems.prompts,
        encode=lambda example: encode_prompts(tokenizer, [example])[0],
        tokens=lambda prompt: len(prompt.token_ids),
        room=Room(longest, "what rollout.max_length leaves beside sampling.max_new_tokens"),
    )
    prompts = {prompt.id: prompt for source in sources for _, prompt in source.items}
    examples = [Source(source.card, [example for example, _ in source.items], source.a_step) for source in sources]
    return GrpoData(examples, prompts, problems)


def train_grpo(
    recipe: GrpoRecipe, data: GrpoData, policy: ModelOptions, engines: Engines, run: Run
) -> tuple[ModelOptions, dict[str, Evaluation]]:
    """Run the stage from `policy`, whose weights the rollout workers hold. Returns what it trained, and evaluations."""
    options, progress = recipe.grpo, run.progress
    held_out = HeldOut(recipe, data.problems, engines, run)
    reference = None
    if options.kl_coefficient:
        reference = policy if recipe.reference is None else policy.model_copy(update={"path": str(recipe.reference)})
    learner = start_learner(recipe, policy, engines, reference)
    # After a stage of `init_from`, the policy to start from is version 1.
    state = {
        "weight_version": int(recipe.init_from is not None),
        "learning_steps": 0,
        "guard": [],
        "alarms": no_history(),
    }
    with Steps(recipe, run, learner, options.steps, data.sources, reference=reference, state=state) as steps:
        guard = OverOptimisationGuard(recipe.guard, steps.state["guard"]) if recipe.guard else None
        bad_steps = BadSamples(recipe.learner.stop_after_bad_steps, run, steps.state)
        alarms = Alarms(recipe.alarms, run, steps.state["alarms"])
        progress.stage("GRPO", options.steps, completed=steps.done)
        progress.phase("starting learners")
        engines.fleet.wait_until_ready()
        learner.wait_until_ready()
        steps.restore()
        if engines.fleet.weight_version != steps.state["weight_version"]:
            engines.send_weights(learner, steps.state["weight_version"])
        progress.note(f"policy on {recipe.learner.ranks} learner ranks: {learner.trained.description}")
        held_out.check_agreement(learner, "before GRPO")
        evaluations: dict[str, Evaluation] = {}
        if recipe.init_from is None and recipe.evaluation.before:
            evaluations["before GRPO"] = held_out.evaluate("before GRPO", 0)

        for step in steps:
            clock = Clock()
            chosen = items_of_step(data.sources, seed=recipe.seed, step=step)
            progress.phase("sampling")
            experience = sample(recipe, engines, chosen, data, step, clock)

            sequences = training_sequences(experience, options)
            clock.lap("advantages")
            progress.phase("training")
            sums, found, norm = update(recipe, held_out.gate, learner, sequences, step)
            clock.lap("training")

            version = engines.fleet.weight_version + 1
            sent = engines.send_weights(learner, version)
            steps.state["weight_version"] = version
            clock.lap("weights")

            write_samples(run.directory.samples_file(step + 1), experience.rows)
            metrics = step_metrics(experience, sums, found, norm, clock) | learner.expert_load()
            metrics["weight_bytes"] = sent
            if (lost := engines.adapter_lost(learner)) is not None:
                metrics["adapter/lost"] = lost
            run.record_step("grpo", step + 1, metrics, SHOWN)
            bad_steps.observe(step + 1, experience.bad)
            alarms.observe(step + 1, metrics, experience.seen)
            if guard and (alarm := guard.observe(experience.rewards)):
                run.warn(f"GRPO step {step + 1}: {alarm}")
            learnt = 0 < norm < math.inf
            steps.state["learning_steps"] += learnt
            if learnt and steps.state["learning_steps"] == CENSUS_STEP:
                held_out.check_gradients(learner, step + 1)
            if recipe.evaluation.every and (step + 1) % recipe.evaluation.every == 0 and step + 1 < options.steps:
                steps.rate(step + 1, held_out.to_choose_by().evaluate(f"GRPO step {step + 1}", step + 1).accuracy)

        held_out.check_agreement(learner, "after GRPO")
        evaluations["after GRPO"] = held_out.evaluate("after GRPO", options.steps)
        steps.save_final()
        trained = policy.model_copy(update={"path": str(run.directory.final_directory)})
        held_out.run_hooks(trained, options.steps)
    return trained, evaluations


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def lap(self, part: str) -> None:
        """What passed since the last lap belongs to `part`."""
        now = time.perf_counter()
        self.seconds[part] = now - self._at
        self._at = now


@dataclass(frozen=True, slots=True)
class Experience:
    """What one step sampled: N completions with their rewards and advantages, in the order of prompts and index.

    `valid` [N] is false where nobody could judge; `kept` [N] is true for what is trained on; `uniform_groups` is the
    share of groups whose rewards are all equal, which teach nothing, among those with two judged samples (NaN without
    any); `bad` tells which number of a sample is not finite, `seen` are the others that were judged, for the alarms.
    """

    completions: Sequence[Completion]
    rewards: Sequence[SampleReward]
    domains: Sequence[str]
    advantages: Sequence[float]
    valid: Sequence[bool]
    kept: Sequence[bool]
    uniform_groups: float
    bad: Mapping[str, str]
    seen: Sequence[SeenSample]
    rows: Sequence[Mapping[str, Any]]


def sample(
    recipe: GrpoRecipe, engines: Engines, examples: Sequence[Example], data: GrpoData, step: int, clock: Clock
) -> Experience:
    """Draw a group for each example, have groups scored as they finish, and compare each sample with its group."""
    options, judges = recipe.grpo, engines.judges
    by_id = {example.id: example for example in examples}
    groups = engines.fleet.generate(
        [data.prompts[id_] for id_ in by_id],
        options.group_size,
        recipe.sampling,
        seed=recipe.seed,
        step=step,
        keep_bad=True,
    )
    submitted = submit_groups(groups, by_id, engines.tokenizer, judges)
    clock.lap("sampling")
    answers = gather_answers(submitted, by_id, judges)
    clock.lap("scoring")

    rewards = [answer.reward for answer in answers]
    bad = bad_samples(answers, [0.0] * len(answers))
    valid = torch.tensor([answer.reward.value is not None and answer.sample_id not in bad for answer in answers])
    values = torch.tensor([reward.value or 0.0 for reward in rewards], dtype=torch.float64)
    group_of = torch.arange(len(examples)).repeat_interleave(options.group_size)
    advantages, group_std = group_advantages(values, group_of, valid, scale=options.advantage_scale)
    uniform = group_std <= ZERO_STD
    compared = torch.bincount(group_of[valid], minlength=len(examples)) > 1
    bad |= bad_samples(answers, advantages.tolist())
    kept = valid & torch.isfinite(advantages)
    if options.drop_zero_variance_groups:
        kept &= ~uniform[group_of]
    if not options.train_on_truncated:
        kept &= ~torch.tensor([answer.truncated for answer in answers])
    rows = [
        training_row(by_id[answer.completion.prompt_id], answer, float(advantage), bool(keep))
        for answer, advantage, keep in zip(answers, advantages, kept, strict=True)
    ]
    return Experience(
        completions=[answer.completion for answer in answers],
        rewards=rewards,
        domains=[by_id[answer.completion.prompt_id].domain for answer in answers],
        advantages=advantages.tolist(),
        valid=valid.tolist(),
        kept=kept.tolist(),
        uniform_groups=float(uniform[compared].double().mean()),
        bad=bad,
        seen=[
            SeenSample(answer.sample_id, value, float(np.mean(answer.completion.log_probs)), bool(alike))
            for answer, value, good, alike in zip(answers, values.tolist(), valid, uniform[group_of], strict=True)
            if good
        ],
        rows=rows,
    )


def training_row(example: Example, answer: Answer, advantage: float, trained_on: bool) -> dict[str, Any]:
    """A sample as a row of the run's table, with all that its update was made of."""
    completion = answer.completion
    return row(example, answer, greedy=False) | {
        "advantage": advantage,
        "trained_on": trained_on,
        "prompt_token_ids": list(completion.prompt_token_ids),
        "token_ids": list(completion.token_ids),
        "sampler_log_probs": list(completion.log_probs),
    }


def training_sequences(experience: Experience, options: GrpoOptions) -> list[list[TrainingSequence]]:
    """The kept samples as [update][place], each update's weights adding up to the mean that `aggregation` names."""
    per_update = len(experience.completions) // options.updates_per_step
    updates = []
    for start in range(0, len(experience.completions), per_update):
        places = range(start, start + per_update)
        lengths = torch.tensor([len(experience.completions[i].token_ids) for i in places])
        kept = torch.tensor([experience.kept[i] for i in places])
        weights = completion_weights(lengths, kept, options.aggregation).tolist()
        updates.append(
            [
                training_sequence(experience.completions[i], experience.advantages[i], weight)
                for i, weight in zip(places, weights, strict=True)
                if experience.kept[i]
            ]
        )
    return updates


def training_sequence(completion: Completion, advantage: float, weight: float) -> TrainingSequence:
    """A completion as the learner takes it: the sampler's token ids, never tokenised again."""
    return TrainingSequence(
        token_ids=[*completion.prompt_token_ids, *completion.token_ids],
        prompt_length=len(completion.prompt_token_ids),
        weight=weight,
        advantage=advantage,
        sampler_log_probs=np.asarray(completion.log_probs, dtype=np.float32),
    )


def update(
    recipe: GrpoRecipe,
    gate: AgreementGate,
    learner: LearnerGroup,
    updates: list[list[TrainingSequence]],
    step: int,
) -> tuple[Sums, Disagreement, float]:
    """The optimizer updates of a step; the gate compares sampler and learner before the first of them is applied."""
    temperature = recipe.sampling.temperature
    objective = Objective(recipe.grpo, temperature)
    if len(updates) > 1:
        everything = [sequence for part in updates for sequence in part]
        old = iter(learner.log_probs(everything, temperature))
        updates = [[replace(sequence, old_log_probs=next(old)) for sequence in part] for part in updates]
    rate = learning_rate(step, recipe.grpo.steps, recipe.learner.optimizer)
    total, norm = Sums(), 0.0
    for part in updates:
        if part:
            sums = learner.accumulate(part, objective)
            if isfinite(sums.loss):
                gate.check(Disagreement.of(sums), f"GRPO step {step + 1}")
            applied = learner.apply(rate)
            # An update that was left out is what the step's metrics have to show, whatever came after it.
            norm = applied if isfinite(norm) else norm
            total.add(sums)
    return total, Disagreement.of(total), norm


def step_metrics(
    experience: Experience, sums: Sums, found: Disagreement, norm: float, clock: Clock
) -> dict[str, float]:
    """The statistics of a step; NaN where there was nothing to take a mean of.

    Lengths in tokens, log-probabilities and entropy in nats, times in seconds.
    """
    judged = [reward for reward in experience.rewards if reward.value is not None]
    values = [float(reward.value) for reward in judged if reward.value is not None]
    lengths = np.array([len(c.token_ids) for c in experience.completions])
    tokens = sums.tokens or math.nan
    seconds = sum(clock.seconds.values())
    metrics = {
        "reward": float(np.mean(values)) if judged else float("nan"),
        "reward_std": float(np.std(values)) if judged else float("nan"),
        "accuracy": float(np.mean([reward.verdict is Verdict.PASS for reward in judged])) if judged else float("nan"),
        "uniform_groups": experience.uniform_groups,
        "not_judged": 1 - float(np.mean(experience.valid)),
        "trained_on": float(np.mean(experience.kept)),
        "bad_samples": float(len(experience.bad)),
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "truncated": float(np.mean([c.finish_reason is FinishReason.LENGTH for c in experience.completions])),
        "weight_version": float(experience.completions[0].weight_version),
        "loss": sums.loss,
        "kl": sums.kl,
        "entropy": sums.entropy / tokens,
        "clip_fraction": sums.clipped / tokens,
        "gradient_norm": norm,
        "agreement/mean": found.mean,
        "agreement/max": found.largest,
        "agreement/k3": found.k3,
        "step_seconds": seconds,
        "tokens_per_second": float(lengths.sum()) / seconds,
        "sampling_tokens_per_second": float(lengths.sum()) / clock.seconds["sampling"],
        "training_tokens_per_second": sums.padded_tokens / clock.seconds["training"],
    }
    for name in dict.fromkeys(name for reward in judged for name in reward.components):
        scores = [reward.components[name].value for reward in judged if name in reward.components]
        metrics[f"reward/{name}"] = float(np.mean(scores))
    if len(domains := dict.fromkeys(experience.domains)) > 1:
        for domain in domains:
            metrics[f"accuracy/{domain}"] = domain_accuracy(experience, domain)
    return metrics | {f"seconds/{part}": value for part, value in clock.seconds.items()}


def domain_accuracy(experience: Experience, domain: str) -> float:
    """The share of right answers among those to the prompts of a domain that could be judged; nan without any."""
    right = [
        reward.verdict is Verdict.PASS
        for reward, its_domain in zip(experience.rewards, experience.domains, strict=True)
        if its_domain == domain and reward.value is not None
    ]
    return float(np.mean(right)) if right else float("nan")
