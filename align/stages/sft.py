"""Chat SFT: supervised fine-tuning on chat data (DeepSeek-V2 report, section 4.1).

The loss is the cross-entropy of the completion tokens alone, the end-of-sequence token among them, averaged over the
completion tokens of a step. The report gives two epochs at a learning rate of 5e-6 for the 236B model and leaves the
rest open; batch, schedule and length are the recipe's.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from align.config import ModelOptions, SftRecipe
from align.data.cards import load_card
from align.data.chat import encode_example
from align.data.loader import load_split
from align.data.types import Example
from align.errors import UserError
from align.evaluate.problems import Evaluation
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective
from align.learner.schedule import learning_rate
from align.losses import completion_weights
from align.stages.engines import Engines
from align.stages.held_out import HeldOut
from align.stages.order import examples_of_step
from align.stages.run import Run

CENSUS_STEP = 10


def train_sft(recipe: SftRecipe, engines: Engines, run: Run) -> tuple[ModelOptions, dict[str, Evaluation]]:
    """Run the stage. Returns the trained policy, whose weights the rollout workers then hold, and its evaluations."""
    options, progress = recipe.sft, run.progress
    held_out = HeldOut(recipe, engines, run)
    training, validation = load_sequences(recipe, engines, run)
    learner = LearnerGroup(engines.policy, recipe.learner, seed=recipe.seed)
    try:
        progress.stage("SFT", options.steps)
        progress.phase("starting rollout workers and learners")
        engines.fleet.wait_until_ready()
        learner.wait_until_ready()
        progress.note(f"policy of {learner.parameters:,} trainable parameters on {recipe.learner.ranks} learner ranks")
        evaluations = {"before SFT": held_out.evaluate("before SFT", 0)}

        for step in range(options.steps):
            started = time.perf_counter()
            batch = examples_of_step(training, options.sequences_per_step, seed=recipe.seed, step=step)
            sums = learner.accumulate(mean_over_tokens(batch), Objective())
            rate = learning_rate(step, options.steps, recipe.learner.optimizer)
            norm = learner.apply(rate)

            seconds = time.perf_counter() - started
            metrics = {
                "loss": sums.loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": sums.tokens,
                "tokens_per_second": sums.padded_tokens / seconds,
                "step_seconds": seconds,
            }
            if (step + 1) % options.validate_every == 0 or step + 1 == options.steps:
                metrics["validation_loss"] = validation_loss(learner, validation)
            run.metrics.write(step + 1, "sft", metrics)
            progress.step(
                step + 1,
                {k: metrics[k] for k in ("loss", "validation_loss", "tokens_per_second") if k in metrics},
            )
            if step + 1 == min(CENSUS_STEP, options.steps):
                report_missing_gradients(learner, run)
            if recipe.save_every and (step + 1) % recipe.save_every == 0:
                learner.save(run.directory.checkpoint_directory(step + 1))

        engines.fleet.load(learner.weights(), version=engines.fleet.weight_version + 1)
        held_out.check_agreement(learner, "after SFT")
        evaluations["after SFT"] = held_out.evaluate("after SFT", options.steps)
        learner.save(run.directory.final_directory)
    finally:
        learner.close()
    return engines.policy.model_copy(update={"path": str(run.directory.final_directory)}), evaluations


def load_sequences(
    recipe: SftRecipe, engines: Engines, run: Run
) -> tuple[list[TrainingSequence], list[TrainingSequence]]:
    """The tokenised training and validation examples."""
    data = recipe.data
    card = load_card(data.card)
    loaded = load_split(
        card,
        data.split,
        path=data.path,
        limit=data.limit,
        levels=data.levels,
        seed=recipe.seed,
        params=data.params,
    )
    if loaded.dropped_contaminated:
        run.warn(f"{loaded.dropped_contaminated} training examples are held-out problems too and were left out")
    training = encode(loaded.examples, engines, recipe)
    held_out = load_split(
        card,
        "validation",
        path=data.path,
        limit=recipe.sft.validation_limit,
        levels=data.levels,
        seed=recipe.seed,
        params=data.params,
    )
    if len(training) < recipe.sft.sequences_per_step:
        raise UserError(
            f"sft.sequences_per_step is {recipe.sft.sequences_per_step}, but data card {data.card!r} gives only "
            f"{len(training)} training examples"
        )
    return training, encode(held_out.examples, engines, recipe)


def encode(examples: Sequence[Example], engines: Engines, recipe: SftRecipe) -> list[TrainingSequence]:
    """Examples as token ids. Raises UserError for one without a demonstration or longer than the context."""
    sequences = []
    for example in examples:
        if example.response is None:
            raise UserError(
                f"example {example.id!r} of data card {recipe.data.card!r} has no response to learn from; "
                "SFT needs a card whose fields name one"
            )
        token_ids, prompt_length = encode_example(engines.tokenizer, example.messages, example.response)
        if len(token_ids) > recipe.rollout.max_length:
            raise UserError(
                f"example {example.id!r} has {len(token_ids)} tokens, more than rollout.max_length "
                f"({recipe.rollout.max_length}); raise it, or leave the example out"
            )
        sequences.append(TrainingSequence(token_ids, prompt_length, 0.0))
    return sequences


def mean_over_tokens(batch: Sequence[TrainingSequence]) -> list[TrainingSequence]:
    """The batch with the weights of a mean over its completion tokens."""
    lengths = torch.tensor([s.completion_length for s in batch])
    weights = completion_weights(lengths, torch.ones(len(batch), dtype=torch.bool), "token_mean")
    return [replace(s, weight=float(w)) for s, w in zip(batch, weights, strict=True)]


def validation_loss(learner: LearnerGroup, validation: Sequence[TrainingSequence]) -> float:
    """Cross-entropy a completion token, in nats, on held-out demonstrations."""
    log_probs = learner.log_probs(validation, 1.0)
    return -float(sum(values.sum() for values in log_probs)) / sum(len(values) for values in log_probs)


def report_missing_gradients(learner: LearnerGroup, run: Run) -> None:
    """Say which parameters have had no gradient after the first steps; an expert among them is not being trained."""
    missing = learner.missing_gradients()
    if missing:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        run.warn(f"{len(missing)} trainable parameters or experts have had no gradient in {CENSUS_STEP} steps: {shown}")
