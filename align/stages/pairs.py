"""The pairs that a reward model is trained and evaluated on, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config import DataOptions, RewardModelRecipe
from align.data.cards import DataCard, FileSource, HubSource, load_card, require_stage
from align.data.chat import encode_example
from align.data.preferences import load_preferences
from align.data.types import Preference, SplitName
from align.errors import UserError
from align.learner.pairs import TrainingPair
from align.model.reward_model import tokenizer_hash
from align.stages.examples import Source, shares
from align.stages.run import Run


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


def load_reward_model_data(recipe: RewardModelRecipe, tokenizer: Any, run: Run) -> RewardModelData:
    """Everything the recipe names, read and checked. Raises UserError for what cannot be used."""
    options = recipe.reward_model
    counts = shares(options.pairs_per_step, [data.share for data in recipe.data])
    sources: list[Source[EncodedPair]] = []
    validation: list[EncodedPair] = []
    test: list[EncodedPair] = []
    for data, count in zip(recipe.data, counts, strict=True):
        card = load_card(data.card)
        require_stage(card, recipe.data_stage)
        refuse_one_file_for_all(card, data)
        pairs = load_pairs(recipe, card, data, data.split, data.limit, tokenizer, run)
        if not 1 <= count <= len(pairs):
            raise UserError(
                f"reward_model.pairs_per_step is {options.pairs_per_step}, of which data card {data.card!r} is to give "
                f"{count}, but it gives {len(pairs)} pairs; change reward_model.pairs_per_step or data.share"
            )
        sources.append(Source(data.card, pairs, count))
        validation += load_pairs(recipe, card, data, "validation", options.validation_limit, tokenizer, run)
        test += load_pairs(recipe, card, data, "test", options.test_limit, tokenizer, run)
    return RewardModelData(sources, validation, test, tokenizer_hash(tokenizer))


def refuse_one_file_for_all(card: DataCard, data: DataOptions) -> None:
    """Raise UserError where one file would be read as training, validation and test pairs alike."""
    if data.path is None or data.path.is_dir() or not isinstance(card.source, HubSource | FileSource):
        return
    if len({split.table for split in card.source.splits.values()}) > 1:
        raise UserError(
            f"data.path: {data.path} is one file, and data card {card.name} has its splits in several: give a directory "
            f"with {', '.join(Path(split.table).stem + '.jsonl' for split in card.source.splits.values())}"
        )


def load_pairs(
    recipe: RewardModelRecipe,
    card: DataCard,
    data: DataOptions,
    split: SplitName,
    limit: int | None,
    tokenizer: Any,
    run: Run,
) -> list[EncodedPair]:
    """The pairs of a split that are short enough; warns of the others, and of held-out prompts among training ones.

    Raises UserError where none is left.
    """
    loaded = load_preferences(card, split, path=data.path, limit=limit, seed=recipe.seed, params=data.params)
    where = f"data card {card.name}, split {split}"
    if loaded.dropped_contaminated:
        run.warn(f"{where}: {loaded.dropped_contaminated} preferences have held-out prompts and were left out")
    if loaded.unchecked:
        run.warn(f"{where}: could not be checked for prompts of the splits {', '.join(loaded.unchecked)}")
    options = recipe.reward_model
    encoded = [encode(tokenizer, preference, options.margin_scale) for preference in loaded.preferences]
    kept = [item for item in encoded if item.pair.padded_length <= 2 * options.max_length]
    if not kept:
        raise UserError(f"{where}: every pair is longer than reward_model.max_length ({options.max_length} tokens)")
    if len(kept) < len(encoded):
        run.warn(
            f"{where}: {len(encoded) - len(kept)} of {len(encoded)} pairs are longer than reward_model.max_length "
            f"({options.max_length} tokens) and were left out"
        )
    return kept


def encode(tokenizer: Any, preference: Preference, margin_scale: float) -> EncodedPair:
    """A preference as token ids, with the chat template of SFT. Raises UserError where the tokenizer has none."""
    chosen, prompt_length = encode_example(tokenizer, preference.messages, preference.chosen)
    rejected, _ = encode_example(tokenizer, preference.messages, preference.rejected)
    return EncodedPair(
        preference, TrainingPair(chosen, rejected, (preference.margin or 0.0) * margin_scale), prompt_length
    )
