"""Direct preference optimisation: a policy learns from pairs of completions, without a reward model (Rafailov et al. 2023, arXiv:2305.18290).

The loss of a pair is `-log sigmoid(beta m)` of its margin m: by how much more the policy has raised the log-probability of the chosen completion
than that of the rejected one, against the policy that the stage began with. `dpo.sft_weight` adds the cross-entropy a token of the chosen
completions (RPO, Pang et al. 2024, arXiv:2404.19733). DeepSeek-V2 has no such stage: it is for pairs where nothing can be sampled and judged.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from align.data.chat import encode_example
from align.data.drawing import Source, items_of_step, left_out
from align.data.entries import Notes, Reader, Room, entries_of
from align.data.loader import held_together, load_preferences, refuse_one_file
from align.data.types import Preference
from align.errors import naming
from align.evaluate.accuracy import Evaluation
from align.learner.batch import PolicyPair, TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective, learning_rate
from align.losses import dpo_loss
from align.recipe import DpoRecipe, ModelOptions
from align.session.session import Session
from align.session.steps import CENSUS_STEP
from align.stages.guards import Alarms, no_history
from align.stages.held_out import HeldOut, Problems, load_problems

SHOWN = ("loss", "pair_accuracy", "margin", "validation_pair_accuracy", "tokens_per_second")


@dataclass(frozen=True, slots=True)
class DpoData:
    """What the stage trains on, tokenised, what it watches, and what it is evaluated on."""

    sources: Sequence[Source[PolicyPair]]
    validation: Sequence[PolicyPair]
    problems: Problems


@dataclass(frozen=True, slots=True)
class Margins:
    """By how many nats the policy has raised the log-probability of each pair's completions, against the reference: both [B] float32."""

    chosen: torch.Tensor
    rejected: torch.Tensor

    @classmethod
    def of(cls, log_probs: Sequence[npt.NDArray[np.float32]], reference: Sequence[npt.NDArray[np.float32]]) -> Self:
        """The margins by the log-probabilities [S] of the completions of pairs, in turn, under the policy and under the reference."""
        raised = torch.tensor([float((new - old).sum()) for new, old in zip(log_probs, reference, strict=True)])
        return cls(raised[::2], raised[1::2])

    @property
    def values(self) -> torch.Tensor:
        """The margins [B]."""
        return self.chosen - self.rejected

    def metrics(self, beta: float) -> dict[str, float]:
        """The mean loss of the pairs, the share that has the chosen completion ahead, equal ones counted half, and the mean margin with its two parts, in
        nats."""
        return {
            "pair_loss": float(dpo_loss(self.chosen, self.rejected, beta).mean()),
            "pair_accuracy": float((self.values.sign() + 1).mean() / 2),
            "margin": float(self.values.mean()),
            "chosen": float(self.chosen.mean()),
            "rejected": float(self.rejected.mean()),
        }


def load_dpo_data(recipe: DpoRecipe, tokenizer: Any, notes: Notes) -> DpoData:
    """Everything the recipe names, read and checked. Raises UserError for what cannot be used."""
    options, entries = recipe.dpo, entries_of(recipe.data, recipe.data_stage)
    problems = load_problems(
        recipe.evaluation, recipe.data, recipe.rewards, recipe.rollout.max_length, tokenizer, notes
    )
    for entry in entries:
        refuse_one_file(entry.card, entry.path, (entry.data.split, "validation"))
    reader = Reader(
        load_preferences,
        partial(encode_pair, tokenizer),
        lambda pair: max(len(sequence.token_ids) for sequence in pair.both),
        Room(recipe.rollout.max_length, "rollout.max_length"),
        recipe.seed,
        notes,
    )
    validation, watched = reader.held_out_split(entries, "validation", options.validation_limit)
    held_out = held_together(problems.prompts, watched)
    sources = reader.sources(entries, options.pairs_per_step, "dpo.pairs_per_step", held_out)
    return DpoData(sources, validation, problems)


def train_dpo(recipe: DpoRecipe, data: DpoData, session: Session) -> tuple[ModelOptions, dict[str, Evaluation]]:
    """Run the stage from the session's policy. Returns the trained policy, whose weights the rollout workers then hold, and its evaluations."""
    options, run, fleet = recipe.dpo, session.run, session.fleet
    objective = Objective(dpo=options)
    held_out = HeldOut(recipe, data.problems, session)
    reference = session.policy
    learner = session.new_learner(recipe.learner, recipe.seed, reference)
    with session.learning("DPO", recipe, learner, options.steps, data.sources, reference=reference) as steps:
        alarms = Alarms(recipe.alarms, run.warn, steps.state.setdefault("alarms", no_history()), "DPO")
        evaluations: dict[str, Evaluation] = {}
        if fleet.weight_version:  # of an end that was cut short, from which the stage is run again
            learner.sync_weights(fleet, 0)
        if recipe.evaluation.before and not held_out.was_asked_before():
            evaluations |= held_out.evaluate_start("before DPO", steps.done)

        for step in steps:
            started = time.perf_counter()
            pairs = items_of_step(data.sources, seed=recipe.seed, step=step)
            sums = learner.accumulate(completions_of(pairs), objective)
            rate = learning_rate(step, options.steps, recipe.learner.optimizer)
            norm = learner.apply(rate)

            seconds = time.perf_counter() - started
            metrics = {
                "loss": sums.loss,
                **Margins.of(sums.log_probs[0], sums.reference_log_probs[0]).metrics(options.beta),
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": sums.tokens,
                "tokens_per_second": sums.tokens / seconds,
                "training_tokens_per_second": sums.padded_tokens / seconds,
                "step_seconds": seconds,
                **left_out(data.sources),
                **learner.expert_load(),
            }
            if (step + 1) % options.validate_every == 0 or step + 1 == options.steps:
                watched = margins_of(learner, data.validation).metrics(options.beta)
                metrics |= {f"validation_{name}": value for name, value in watched.items()}
            run.record_step("dpo", step + 1, metrics, SHOWN)
            if step + 1 == min(CENSUS_STEP, options.steps):
                steps.check_gradients(step + 1)
            alarms.observe(step + 1, metrics)

        trained = steps.save_final(session.policy)
        learner.sync_weights(fleet, fleet.weight_version + 1)
        held_out.check_agreement(learner, "after DPO")
        evaluations["after DPO"] = held_out.evaluate("after DPO", options.steps)
        held_out.run_hooks(trained, options.steps)
    return trained, evaluations


def encode_pair(tokenizer: Any, preference: Preference) -> list[PolicyPair]:
    """A preference as the token ids of its completions, with the chat template of SFT. Raises UserError where the tokenizer has none."""
    with naming(f"preference {preference.id!r}"):
        encoded = (
            encode_example(tokenizer, preference.messages, text) for text in (preference.chosen, preference.rejected)
        )
        return [PolicyPair(*(TrainingSequence.of_completion(ids, length, 0.0) for ids, length in encoded))]


def completions_of(pairs: Sequence[PolicyPair]) -> list[TrainingSequence]:
    """The chosen and the rejected completion of each pair, in turn. They share their prompt."""
    found = [one for pair in pairs for one in pair.both]
    return [replace(one, group=place // 2, weight=1 / len(pairs)) for place, one in enumerate(found)]


def margins_of(learner: LearnerGroup, pairs: Sequence[PolicyPair]) -> Margins:
    """How far the policy has moved on the pairs from its reference."""
    sequences = completions_of(pairs)
    ours, reference = (learner.log_probs(sequences, 1.0, of_reference=frozen) for frozen in (False, True))
    return Margins.of(ours, reference)
