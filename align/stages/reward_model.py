"""Reward models: trained on preferences, from the Chat SFT policy (DeepSeek-V2 report, section 4.2).

The report initialises them with DeepSeek-V2 Chat (SFT) and trains "with either a point-wise or a pair-wise loss"; formulas,
batch, rate and length it leaves open, and they are the recipe's. A reward is read at the end-of-sequence token of a
conversation, from a head of one number that starts at zero. Nothing is sampled here, so that no rollout worker is needed.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from align.data.chat import encode_example
from align.data.drawing import Source, items_of_step, left_out
from align.data.entries import Notes, Reader, Room, entries_of
from align.data.loader import load_preferences, refuse_one_file
from align.data.types import Preference
from align.errors import UserError, naming
from align.evaluate.pairs import PairEvaluation, ScoredPair, evaluate_pairs, rows
from align.learner.objective import learning_rate
from align.learner.reward_model import RewardModelGroup, TrainingPair
from align.model.policy import load_tokenizer
from align.model.reward_model import tokenizer_hash, write_usage
from align.recipe import ModelOptions, RewardModelRecipe
from align.run import Progress, write_atomically
from align.session.session import Session
from align.session.steps import CENSUS_STEP

SHOWN = ("loss", "accuracy", "difference", "validation_accuracy", "training_tokens_per_second")
NOTES = "reward_model.json"


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference and its two conversations as token ids, of which `prompt_length` are the prompt's."""

    preference: Preference
    pair: TrainingPair
    prompt_length: int


@dataclass(frozen=True, slots=True)
class RewardModelData:
    """What the stage trains on, what it watches, and what it is evaluated on. `tokenizer_sha256`: see `tokenizer_hash`."""

    sources: Sequence[Source[EncodedPair]]
    validation: Sequence[EncodedPair]
    test: Sequence[EncodedPair]
    tokenizer_sha256: str


def load_reward_model_data(recipe: RewardModelRecipe, tokenizer: Any, notes: Notes) -> RewardModelData:
    """Everything the recipe names, read and checked. Raises UserError for what cannot be used."""
    options, entries = recipe.reward_model, entries_of(recipe.data, recipe.data_stage)
    for entry in entries:
        refuse_one_file(entry.card, entry.path, list(entry.card.splits))
    reader = Reader(
        load_preferences,
        partial(encode_pair, tokenizer, margin_scale=options.margin_scale),
        lambda item: item.pair.padded_length // 2,
        Room(options.max_length, "reward_model.max_length"),
        recipe.seed,
        notes,
    )
    test, held_out = reader.held_out_split(entries, "test", options.test_limit)
    validation, held_out = reader.held_out_split(entries, "validation", options.validation_limit, held_out)
    sources = reader.sources(entries, options.pairs_per_step, "reward_model.pairs_per_step", held_out)
    if options.margin_scale and not any(has_margins(source) for source in sources):
        raise UserError(
            "reward_model.margin_scale has no effect: none of the training pairs has a margin; leave it out, or take data with a column margin"
        )
    return RewardModelData(sources, validation, test, tokenizer_hash(tokenizer))


def has_margins(source: Source[EncodedPair]) -> bool:
    """Whether a pair of a source has a margin, as far as its pairs are known before a step draws them."""
    return source.encode is not None or any(item.preference.margin is not None for item in source.items)


def train_reward_model(
    recipe: RewardModelRecipe, data: RewardModelData, session: Session
) -> tuple[ModelOptions, PairEvaluation]:
    """Run the stage from the session's policy (Ray must be running). Returns the reward model and its evaluation on the test pairs."""
    options, run = recipe.reward_model, session.run
    learner = RewardModelGroup(session.policy, recipe.learner, seed=recipe.seed)
    with session.learning("reward model", recipe, learner, options.steps, data.sources) as steps:
        for step in steps:
            started = time.perf_counter()
            batch = items_of_step(data.sources, seed=recipe.seed, step=step)
            pairs = [replace(item.pair, weight=1 / len(batch)) for item in batch]
            sums = learner.accumulate(pairs, options.loss)
            rate = learning_rate(step, options.steps, recipe.learner.optimizer)
            norm = learner.apply(rate)

            seconds = time.perf_counter() - started
            metrics = {
                "loss": sums.loss,
                "accuracy": sums.right / sums.pairs,
                "difference": sums.difference / sums.pairs,
                "learning_rate": rate,
                "gradient_norm": norm,
                "training_tokens_per_second": sums.padded_tokens / seconds,
                "step_seconds": seconds,
                **left_out(data.sources),
                **learner.balance(),
            }
            if (step + 1) % options.validate_every == 0 or step + 1 == options.steps:
                metrics["validation_accuracy"] = evaluate_pairs(scores(learner, data.validation)).accuracy
            run.record_step("reward_model", step + 1, metrics, SHOWN)
            if step + 1 == min(CENSUS_STEP, options.steps):
                steps.check_gradients(step + 1)

        run.progress.phase("evaluating")
        test = scores(learner, data.test)
        evaluation = evaluate_pairs(test)
        texts = [(p.prompt_text, p.chosen, p.rejected) for p in (item.preference for item in data.test)]
        facts = {"problems": evaluation.pairs, "reliability": reliability_rows(evaluation)}
        run.record_numbers(
            "reward_model", options.steps, "held-out pairs", evaluation.numbers(), rows(test, texts), facts
        )
        trained = steps.save_final(session.policy)
        about = {
            "data": [
                {"card": entry.card, "params": entry.params} if entry.card else {"path": str(entry.path)}
                for entry in recipe.data
            ],
            "loss": options.loss,
            "accuracy": evaluation.accuracy,
            "tokenizer_sha256": data.tokenizer_sha256,
        }
        write_notes(Path(trained.path), about, scores(learner, data.validation))
    return trained, evaluation


def scores(learner: RewardModelGroup, items: Sequence[EncodedPair]) -> list[ScoredPair]:
    """The rewards of both completions of each pair."""
    sequences = [ids for item in items for ids in (item.pair.chosen, item.pair.rejected)]
    rewards = learner.rewards(sequences)
    return [
        ScoredPair(
            id=item.preference.id,
            prompt=item.preference.prompt_key,
            domain=item.preference.domain,
            rewards=(rewards[2 * place], rewards[2 * place + 1]),
            lengths=(len(item.pair.chosen) - item.prompt_length, len(item.pair.rejected) - item.prompt_length),
        )
        for place, item in enumerate(items)
    ]


def reliability_rows(evaluation: PairEvaluation) -> list[dict[str, float]]:
    """The bins of confidence, ready for JSON."""
    return [
        {"from": b.lowest, "to": b.highest, "pairs": b.pairs, "confidence": b.confidence, "accuracy": b.accuracy}
        for b in evaluation.reliability
    ]


def show(evaluation: PairEvaluation, progress: Progress) -> None:
    """Say how often the reward model is right, beside what length alone would tell, and how sure it is of itself."""
    low, high = evaluation.interval
    domains = evaluation.by_domain if len(evaluation.by_domain) > 1 else {}
    progress.table(
        f"{evaluation.pairs} held-out pairs",
        ["what is preferred", "accuracy", "95 % interval"],
        [
            ["the higher reward", f"{evaluation.accuracy:.1%}", f"{low:.1%} to {high:.1%}"],
            *([f"... in {domain}", f"{value:.1%}", ""] for domain, value in domains.items()),
            ["the longer completion", f"{evaluation.longer:.1%}", ""],
            ["the shorter completion", f"{1 - evaluation.longer:.1%}", ""],
        ],
    )
    progress.note(f"how sure it is: expected calibration error {evaluation.calibration_error:.1%}")
    progress.table(
        "confidence",
        ["confidence", "pairs", "accuracy"],
        [[f"{b.lowest:.0%} to {b.highest:.0%}", b.pairs, f"{b.accuracy:.1%}"] for b in evaluation.reliability],
    )


def write_notes(directory: Path, about: Mapping[str, Any], validation: Sequence[ScoredPair]) -> None:
    """Write `reward_model.json` beside the weights: what the model scores, and the scale of its rewards; and how to call it.

    `mean` and `std` are of its rewards on the validation completions, chosen and rejected; the reward `reward_model` reads
    them to normalise.
    """
    rewards = [reward for pair in validation for reward in pair.rewards]
    notes = {
        "domains": list(dict.fromkeys(pair.domain for pair in validation)),
        "mean": fmean(rewards),
        "std": pstdev(rewards),
        "held_out_completions": len(rewards),
        **about,
    }
    write_atomically(directory / NOTES, json.dumps(notes, indent=2, ensure_ascii=False) + "\n")
    if not (directory / "README.md").exists():  # one that somebody has edited
        write_usage(directory, load_tokenizer(directory), fmean(rewards), pstdev(rewards))


def encode_pair(tokenizer: Any, preference: Preference, margin_scale: float) -> list[EncodedPair]:
    """A preference as the token ids of a pair, with the chat template of SFT. Raises UserError where the tokenizer has none."""
    with naming(f"preference {preference.id!r}"):
        chosen, prompt_length = encode_example(tokenizer, preference.messages, preference.chosen)
        rejected, _ = encode_example(tokenizer, preference.messages, preference.rejected)
    pair = TrainingPair(chosen, rejected, (preference.margin or 0.0) * margin_scale)
    return [EncodedPair(preference, pair, prompt_length)]
