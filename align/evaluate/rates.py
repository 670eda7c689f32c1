"""What the answers of an evaluation have in common: wins against other answers, instructions that are followed, what tasks count.

All of it is computed from rows as `align.experience.row_of` writes them.
"""

import logging
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
from reward import RewardError, Sample, UnusableAnswer
from reward.instructions import check, checkers
from reward.rows import added_metadata
from rollout import FinishReason

Row = Mapping[str, Any]
_log = logging.getLogger(__name__)


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
    ours, theirs = values_of(rows, reward), values_of(others, reward)
    wins = [_beats(ours[asked], theirs[asked]) for asked in sorted(ours.keys() & theirs.keys())]
    if not wins:
        raise UserError(
            f"evaluation.against.judge: there is no prompt with the same id and text of which reward {reward!r} scored answers of both sides. It must be the name of "
            "one of the recipe's rewards, here and in the run to compare with"
        )
    return float(np.mean(wins))


def values_of(rows: Iterable[Row], reward: str) -> dict[tuple[str, str], list[float]]:
    """The values of a reward by id and prompt: ids that number the rows of a file may be those of other prompts elsewhere."""
    found = defaultdict(list)
    for row in rows:
        value = row["components"].get(reward)
        # A table on disk has every reward in every row, with null for those of other domains.
        if value is not None and isfinite(value):
            found[row["id"], row["prompt"]].append(value)
    return found


def _beats(ours: Sequence[float], theirs: Sequence[float]) -> float:
    difference = np.subtract.outer(ours, theirs)
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def count_instructions(rows: Iterable[Row], examples: Iterable[Example]) -> list[dict[str, Any]]:
    """`rows` with what `instruction_rates` counts of a greedy answer in a column `counted`: whether it is so, by the name of the rate.

    `accuracy/seen_kinds` and `accuracy/unseen_kinds`: the answer is right, to a request of kinds that are trained on alone, or of
    others. `accuracy/kind/KIND`: the instructions of the kind are met by an answer that is none of the degenerate ones, which
    `degenerate_share` counts. Rows of those `examples` without checkable instructions, or with such as nobody can check, stay as they are.
    """
    asked = {e.id: e for e in examples if {"instructions", "instruction_id_list"} & e.metadata.keys()}
    try:
        if asked:
            checkers()
    except RewardError as error:
        _log.warning("the data have checkable instructions, and which are followed is not counted: %s", error)
        return [dict(row) for row in rows]
    return [
        {**row, "counted": counted}
        if row.get("greedy", True) and row["id"] in asked and (counted := _counted(row, asked[row["id"]]))
        else dict(row)
        for row in rows
    ]


def instruction_rates(rows: Iterable[Row]) -> dict[str, float]:
    """The shares of what `count_instructions` counted, each of the answers that it was counted of; empty where it was of none."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        for name, value in row.get("counted", {}).items():
            counts[name].append(value)
    first = ["degenerate_share", "accuracy/seen_kinds", "accuracy/unseen_kinds"]
    return {name: fmean(counts[name]) for name in [*first, *sorted(counts.keys() - set(first))] if counts[name]}


def _counted(row: Row, example: Example) -> dict[str, bool]:
    metadata = {**example.metadata, **added_metadata(example.messages, None)}
    try:
        found = check(
            Sample(example.id, example.prompt_text, row["completion"], None, example.domain, metadata=metadata)
        )
    except UnusableAnswer:
        return {}
    if not found.kinds:
        return {}
    right = found.passes and row["finish_reason"] != FinishReason.LENGTH
    counted = {"degenerate_share": bool(found.degenerate)}
    counted["accuracy/unseen_kinds" if metadata.get("unseen") else "accuracy/seen_kinds"] = right
    for kind, met in zip(found.kinds, found.met, strict=True):
        name = f"accuracy/kind/{kind.partition(':')[2]}"
        counted[name] = counted.get(name, True) and met and not found.degenerate
    return counted
