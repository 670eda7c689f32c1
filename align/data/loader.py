"""The examples of a split of a data card, held apart from what they will be evaluated on."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.data import instructions, nano_chat, nano_code, nano_math
from align.data.cards import GENERATED, DataCard, GeneratorSource, ReasoningGymSource, check
from align.data.reasoning_gym_tasks import generate_task
from align.data.tables import comparable, normalised, read_table
from align.data.types import Example, LoadedSplit, SplitName
from align.errors import UserError

HELD_OUT_FROM: Mapping[SplitName, tuple[SplitName, ...]] = {
    "train": ("validation", "test"),
    "validation": ("test",),
    "test": (),
}
GENERATORS: Mapping[str, Callable[..., list[Example]]] = {
    "instructions": instructions.generate,
    "nano_chat": nano_chat.generate,
    "nano_code": nano_code.generate,
    "nano_math": nano_math.generate,
}


def load_split(
    card: DataCard,
    split: SplitName,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    levels: Sequence[int] | None = None,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
) -> LoadedSplit:
    """The examples of `split`, in the order of the source, or `limit` of them after a shuffle by `seed`.

    Those whose prompt occurs in a split held out from this one are dropped and counted, before anything else
    is chosen. `path`: local file or directory in place of the hub, see `read_table`; with one file alone,
    some splits cannot be compared, and are named. `levels`: difficulties to keep. `seed` also draws what a
    generator leaves to chance. `params` go before those of the card's source. Raises UserError when nothing
    is left.
    """
    held_out = held_out_splits(card, split)
    local = Path(path) if path is not None else None
    overrides = dict(params or {})
    examples = _read(card, split, local, seed, overrides)
    unchecked = tuple(name for name in held_out if not _comparable(card, split, name, local))
    clean = without_prompts_of(
        examples,
        [
            example
            for name in held_out
            if name not in unchecked
            for example in _read(card, name, local, seed, overrides)
        ],
    )
    chosen = _at_levels(clean, levels, f"data card {card.name}, split {split}")
    if not chosen:
        raise UserError(f"data card {card.name}, split {split}: no examples ({len(examples) - len(clean)} dropped)")
    if limit is not None:
        if limit < 1:
            raise UserError(f"a limit of {limit} leaves no examples; leave it out for all of them")
        random.Random(seed).shuffle(chosen)
        chosen = chosen[:limit]
    return LoadedSplit(
        examples=[_instructed(example, card.instruction) for example in chosen],
        dropped_contaminated=len(examples) - len(clean),
        unchecked=unchecked,
    )


def held_out_splits(card: DataCard, split: SplitName) -> list[SplitName]:
    """The splits whose prompts may not occur in `split`. Raises UserError where the card has no such split."""
    if split not in card.splits:
        raise UserError(f"data card {card.name} has no split {split!r}, only {', '.join(sorted(card.splits))}")
    return [name for name in HELD_OUT_FROM[split] if name in card.splits and name in card.decontamination.against]


def without_prompts_of(examples: Sequence[Example], held_out: Sequence[Example]) -> list[Example]:
    """The examples whose prompt occurs in no held-out one, case and white space aside."""
    forbidden = {normalised(example.prompt_text) for example in held_out}
    return [example for example in examples if normalised(example.prompt_text) not in forbidden]


def _read(card: DataCard, split: SplitName, path: Path | None, seed: int, params: dict[str, Any]) -> list[Example]:
    source = card.source
    if isinstance(source, GeneratorSource | ReasoningGymSource):
        if path is not None:
            raise UserError(f"data card {card.name} is generated: it takes no path, and {path} would be ignored")
        if isinstance(source, ReasoningGymSource):
            return generate_task(card, source, split, params)
        merged = check(GENERATED[source.name], source.params | params, where=f"params of data card {card.name}")
        return GENERATORS[source.name](split, **merged.model_dump(), seed=seed, domain=card.domain)
    if params:
        raise UserError(f"data card {card.name} is not generated: it takes no params ({', '.join(params)})")
    return read_table(card, source, split, path)


def _comparable(card: DataCard, split: SplitName, other: SplitName, path: Path | None) -> bool:
    if isinstance(card.source, GeneratorSource | ReasoningGymSource):
        return True
    return comparable(card.source, split, other, path)


def _at_levels(examples: list[Example], levels: Sequence[int] | None, where: str) -> list[Example]:
    if levels is None:
        return examples
    known = sorted({example.level for example in examples if example.level is not None})
    if unknown := sorted(set(levels) - set(known)):
        has = f"only {', '.join(map(str, known))}" if known else "none at all"
        raise UserError(f"{where}: no level {', '.join(map(str, unknown))}; there are {has}")
    return [example for example in examples if example.level in levels]


def _instructed(example: Example, instruction: str | None) -> Example:
    if instruction is None:
        return example
    *earlier, last = example.messages
    return replace(example, messages=(*earlier, {"role": last["role"], "content": f"{last['content']}\n{instruction}"}))
