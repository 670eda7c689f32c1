"""Chat SFT: supervised fine-tuning on chat data (DeepSeek-V2 report, section 4.1).

The loss is the cross-entropy of the completion tokens alone, the end-of-sequence token among them, averaged over the
completion tokens of a step. The report gives two epochs at a learning rate of 5e-6 for the 236B model and leaves the
rest open; batch, schedule and length are the recipe's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from align.data.chat import encode_conversation
from align.data.drawing import Source, items_of_step, left_out
from align.data.entries import Notes, Reader, Room, entries_of
from align.data.loader import NOTHING, HeldOutPrompts, held_together, load_split, refuse_one_file
from align.data.rows import refuse_lost_thoughts
from align.data.types import Example, Message
from align.errors import UserError, naming
from align.evaluate.accuracy import Evaluation
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective, learning_rate
from align.losses import completion_weights
from align.recipe import ModelOptions, SftRecipe
from align.session.session import Session
from align.session.steps import CENSUS_STEP
from align.stages.guards import Alarms, no_history
from align.stages.held_out import HeldOut, Problems, load_problems


@dataclass(frozen=True, slots=True)
class SftData:
    """What the stage trains on, tokenised, and what it is evaluated on."""

    sources: Sequence[Source[TrainingSequence]]
    validation: Sequence[TrainingSequence]
    problems: Problems


def load_sft_data(recipe: SftRecipe, tokenizer: Any, notes: Notes, also_held_out: HeldOutPrompts = NOTHING) -> SftData:
    """Everything the recipe names, read and checked; `also_held_out` is what the stage after it is evaluated on.

    Raises UserError for what cannot be used.
    """
    options = recipe.sft
    problems = load_problems(
        recipe.evaluation, recipe.data, recipe.rewards, recipe.rollout.max_length, tokenizer, notes
    )
    reader = Reader(
        load_split,
        partial(encode_demonstration, tokenizer, turns=options.turns),
        lambda sequence: len(sequence.token_ids),
        Room(recipe.rollout.max_length, "rollout.max_length"),
        recipe.seed,
        notes,
    )
    entries = entries_of(recipe.data, recipe.data_stage)
    for entry in entries:
        refuse_one_file(entry.card, entry.path, (entry.data.split, "validation"))
    validation, prompts = reader.held_out_split(entries, "validation", options.validation_limit)
    held_out = held_together(problems.prompts, also_held_out, prompts)
    sources = reader.sources(entries, options.sequences_per_step, "sft.sequences_per_step", held_out)
    return SftData(sources, validation, problems)


def train_sft(recipe: SftRecipe, data: SftData, session: Session) -> tuple[ModelOptions, dict[str, Evaluation]]:
    """Run the stage. Returns the trained policy, whose weights the rollout workers then hold, and its evaluations."""
    options, run = recipe.sft, session.run
    held_out = HeldOut(recipe, data.problems, session)
    learner = session.new_learner(recipe.learner, recipe.seed)
    with session.learning("SFT", recipe, learner, options.steps, data.sources) as steps:
        alarms = Alarms(recipe.alarms, run.warn, steps.state.setdefault("alarms", no_history()), "SFT")
        evaluations = {}
        if session.fleet.weight_version:  # of an end that was cut short, from which the stage is run again
            learner.sync_weights(session.fleet, 0)
        if recipe.evaluation.before:
            evaluations["before SFT"] = held_out.evaluate("before SFT", 0)

        for step in steps:
            started = time.perf_counter()
            batch = items_of_step(data.sources, seed=recipe.seed, step=step)
            sums = learner.accumulate(mean_over_tokens(batch), Objective())
            rate = learning_rate(step, options.steps, recipe.learner.optimizer)
            norm = learner.apply(rate)

            seconds = time.perf_counter() - started
            metrics = {
                "loss": sums.loss,
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
                metrics["validation_loss"] = validation_loss(learner, data.validation)
            run.record_step("sft", step + 1, metrics, ("loss", "validation_loss", "tokens_per_second"))
            if step + 1 == min(CENSUS_STEP, options.steps):
                steps.check_gradients(step + 1)
            alarms.observe(step + 1, metrics)

        trained = steps.save_final(session.policy)
        learner.sync_weights(session.fleet, session.fleet.weight_version + 1)
        held_out.check_agreement(learner, "after SFT")
        evaluations["after SFT"] = held_out.evaluate("after SFT", options.steps)
        held_out.run_hooks(trained, options.steps)
    return trained, evaluations


def encode_demonstration(
    tokenizer: Any, example: Example, turns: Literal["all", "last"] = "all"
) -> list[TrainingSequence]:
    """The sequences that an example is learned from: one, unless the chat template writes earlier turns of its conversation otherwise.

    `turns` are those of `trained_turns`. Raises UserError for an example without a demonstration.
    """
    conversation, places = trained_turns(example, turns)
    if not places:
        raise UserError(
            f"example {example.id!r}: every turn of the assistant has weight 0, so there is nothing to learn"
        )
    if not any(turn["role"] == "user" for turn in conversation[: places[0]]):
        raise UserError(
            f"example {example.id!r}: message {places[0] + 1} is the assistant's, and no message of the user comes before it: "
            "give it a weight of 0, or set sft.turns=last"
        )
    for place in places:
        refuse_lost_thoughts(conversation[: place + 1], f"example {example.id!r}")
    with naming(f"example {example.id!r}"):
        encoded = encode_conversation(tokenizer, conversation, places, example.tools)
    return [TrainingSequence(token_ids, np.array(learned), 0.0) for token_ids, learned in encoded]


def trained_turns(example: Example, turns: Literal["all", "last"] = "all") -> tuple[tuple[Message, ...], Sequence[int]]:
    """The conversation of a demonstration, and the places of the assistant's turns in it that are trained on; of all, those to which the data
    give no weight of 0. Raises UserError for an example without a demonstration."""
    if example.response is None:
        raise UserError(f"example {example.id!r} has no response to learn from; SFT needs a card whose fields name one")
    answered: Message = {"role": "assistant", "content": example.response}
    conversation = example.conversation or (*example.messages, answered)
    places = [i for i, m in enumerate(conversation) if m["role"] == "assistant" and m.get("weight") != 0]
    return conversation, places if example.conversation and turns == "all" else places[-1:]


def mean_over_tokens(batch: Sequence[TrainingSequence]) -> list[TrainingSequence]:
    """The batch with the weights of a mean over its completion tokens."""
    lengths = torch.tensor([s.sampled_tokens for s in batch])
    weights = completion_weights(lengths, torch.ones(len(batch), dtype=torch.bool), "token_mean")
    return [replace(s, weight=float(w)) for s, w in zip(batch, weights, strict=True)]


def validation_loss(learner: LearnerGroup, validation: Sequence[TrainingSequence]) -> float:
    """Cross-entropy a completion token, in nats, on held-out demonstrations."""
    log_probs = learner.log_probs(validation, 1.0)
    return -float(sum(values.sum() for values in log_probs)) / sum(len(values) for values in log_probs)
