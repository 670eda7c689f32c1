"""The pairs that a reward model is trained and evaluated on, as token ids."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from align.data.cards import require_stage
from align.data.chat import encode_example
from align.data.drawing import Source, shares
from align.data.loader import held_together
from align.data.preferences import LoadedPreferences, load_preferences
from align.data.tables import refuse_one_file
from align.data.types import Preference, SplitName
from align.errors import UserError, naming
from align.learner.reward_model import TrainingPair
from align.model.reward_model import tokenizer_hash
from align.recipe import RewardModelRecipe
from align.session.run import Run
from align.stages.examples import Entry, Room, entries_of, short_enough, tell_compared


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
    options, entries = recipe.reward_model, entries_of(recipe)
    counts = shares(options.pairs_per_step, [entry.data.share for entry in entries])
    for entry in entries:
        require_stage(entry.card, recipe.data_stage)
        refuse_one_file(entry.card, entry.data.path, list(entry.card.splits))
    held_out: dict[str, set[str]] = {}

    def pairs_of(split: SplitName, limit: Callable[[Entry], int | None]) -> list[list[EncodedPair]]:
        """By entry, the pairs of a split that are in no other entry's held-out ones and short enough."""
        loaded = [load_pairs(recipe, entry, split, limit(entry), held_out) for entry in entries]
        for entry, found in zip(entries, loaded, strict=True):
            if split == "train":
                tell_compared(run, entry, found)
            held_out.update(held_together(held_out, {f"{entry.name}/{split}": found.prompts}))
        return [
            short_pairs(recipe, e, split, f.preferences, tokenizer, run) for e, f in zip(entries, loaded, strict=True)
        ]

    test = pairs_of("test", lambda entry: options.test_limit)
    validation = pairs_of("validation", lambda entry: options.validation_limit)
    sources = []
    for entry, pairs, count in zip(entries, pairs_of("train", lambda entry: entry.data.limit), counts, strict=True):
        if not 1 <= count <= len(pairs):
            raise UserError(
                f"reward_model.pairs_per_step is {options.pairs_per_step}, of which data card {entry.name!r} is to give "
                f"{count}, but it gives {len(pairs)} pairs; change reward_model.pairs_per_step or data.share"
            )
        sources.append(Source(entry.name, pairs, count))
    return RewardModelData(sources, [*chain(*validation)], [*chain(*test)], tokenizer_hash(tokenizer))


def load_pairs(
    recipe: RewardModelRecipe,
    entry: Entry,
    split: SplitName,
    limit: int | None,
    held_out: Mapping[str, Collection[str]],
) -> LoadedPreferences:
    """The preferences of a split of an entry, their ids unlike those of other entries."""
    data = entry.data
    loaded = load_preferences(
        entry.card, split, path=data.path, limit=limit, seed=recipe.seed, params=data.params, held_out=held_out
    )
    return replace(loaded, preferences=[replace(pair, id=pair.id + entry.mark) for pair in loaded.preferences])


def short_pairs(
    recipe: RewardModelRecipe,
    entry: Entry,
    split: SplitName,
    preferences: Sequence[Preference],
    tokenizer: Any,
    run: Run,
) -> list[EncodedPair]:
    """The preferences as token ids, those that `reward_model.max_length` has room for."""
    options = recipe.reward_model
    encoded = [encode(tokenizer, preference, options.margin_scale) for preference in preferences]
    room = Room(options.max_length, "reward_model.max_length")
    return short_enough(encoded, [item.pair.padded_length // 2 for item in encoded], room, entry, split, run)


def encode(tokenizer: Any, preference: Preference, margin_scale: float) -> EncodedPair:
    """A preference as token ids, with the chat template of SFT. Raises UserError where the tokenizer has none."""
    with naming(f"preference {preference.id!r}"):
        chosen, prompt_length = encode_example(tokenizer, preference.messages, preference.chosen)
        rejected, _ = encode_example(tokenizer, preference.messages, preference.rejected)
    return EncodedPair(
        preference, TrainingPair(chosen, rejected, (preference.margin or 0.0) * margin_scale), prompt_length
    )
