"""What the answers of an evaluation have in common: wins against other answers, instructions that are followed, what tasks count.

All of it is computed from rows as `align.experience.row_of` writes them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from statistics import fmean
from typing import Any

import numpy as np

from align.data.cards import DataCard, GeneratorSource
from align.data.generators import generator
from align.data.types import Example
from align.errors import UserError
from reward import Sample, UnusableAnswer
from reward.instructions import check
from rollout import FinishReason

Row = Mapping[str, Any]


def task_rates(cards: Iterable[DataCard], rows: Iterable[Row], examples: Iterable[Example]) -> dict[str, float]:
    """What the tasks of generated `cards` count of greedy answers besides right and wrong, such as refusals, by name."""
    names = {card.source.name: None for card in cards if isinstance(card.source, GeneratorSource)}
    counts = [rates for name in names if (rates := generator(name).rates)]
    return {name: rate for count in counts for name, rate in count(rows, examples).items()}


def win_rate(rows: Iterable[Row], others: Iterable[Row], *, reward: str) -> float:
    """The chance that an answer of `rows` beats one of `others` to the same prompt; a tie is half a win.

    `reward` names the reward whose values are compared: one of the rows' `components`. Of a prompt every answer is compared
    to every other, and all prompts count alike. Rows without a finite value of it are left out, and so are prompts
    that one side then has no answer to. Raises UserError where no prompt is left.
    """
    ours, theirs = _values(rows, reward), _values(others, reward)
    wins = [_beats(ours[id_], theirs[id_]) for id_ in sorted(ours.keys() & theirs.keys())]
    if not wins:
        raise UserError(
            f"there is no prompt of which reward {reward!r} scored answers of both sides: is it in the recipe?"
        )
    return float(np.mean(wins))


def _values(rows: Iterable[Row], reward: str) -> dict[str, list[float]]:
    found = defaultdict(list)
    for row in rows:
        value = row["components"].get(reward)
        # A table on disk has every reward in every row, with null for those of other domains.
        if value is not None and isfinite(value):
            found[row["id"]].append(value)
    return found


def _beats(ours: Sequence[float], theirs: Sequence[float]) -> float:
    difference = np.subtract.outer(ours, theirs)
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def instruction_rates(rows: Iterable[Row], examples: Iterable[Example]) -> dict[str, float]:
    """Shares, of greedy answers to those `examples` that have checkable instructions.

    `accuracy/seen_kinds` and `accuracy/unseen_kinds`: right answers, to requests of kinds that are trained on alone, and of
    others. `accuracy/kind/KIND`: instructions of the kind that are met by an answer that is none of the degenerate ones, of
    which `degenerate_share` is the share. Left out are examples whose instructions nobody can check; empty where no example has any.
    """
    asked = {e.id: e for e in examples if {"instructions", "instruction_id_list"} & e.metadata.keys()}
    counts: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if (example := asked.get(row["id"])) is None:
            continue
        metadata, prompt = example.metadata, example.prompt_text
        try:
            found = check(Sample(example.id, prompt, row["completion"], None, example.domain, metadata=metadata))
        except UnusableAnswer:
            continue
        right = found.passes and row["finish_reason"] != FinishReason.LENGTH
        counts["accuracy/unseen_kinds" if metadata.get("unseen") else "accuracy/seen_kinds"].append(right)
        counts["degenerate_share"].append(bool(found.degenerate))
        for kind, met in zip(found.kinds, found.met, strict=True):
            counts[f"accuracy/kind/{kind.partition(':')[2]}"].append(met and not found.degenerate)
    first = ["degenerate_share", "accuracy/seen_kinds", "accuracy/unseen_kinds"]
    return {name: fmean(counts[name]) for name in [*first, *sorted(counts.keys() - set(first))] if counts[name]}
