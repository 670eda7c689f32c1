"""Problems that the library reasoning_gym generates."""

import json
import warnings
from typing import Any

from align.data.cards import DataCard, ReasoningGymSource, nearest
from align.data.types import Example, SplitName
from align.errors import UserError


def generate_task(
    card: DataCard, source: ReasoningGymSource, split: SplitName, params: dict[str, Any]
) -> list[Example]:
    """The problems of a split, with the task's own entry in the metadata, where its verifier looks for it.

    `params` go before those of the card. Raises UserError where the task does not take them.
    """
    with warnings.catch_warnings():
        # A dependency of the library compares with `is`, of which Python warns when it compiles it.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        hint = nearest(source.task, DATASETS)
        raise UserError(f"data card {card.name}: reasoning_gym has no task {source.task!r}{hint}")
    if clash := {"seed", "size"} & set(params | source.params):
        raise UserError(f"data card {card.name}: {', '.join(sorted(clash))} belongs to splits, not to params")
    seeds = source.splits[split]
    try:
        entries = reasoning_gym.create_dataset(source.task, size=seeds.size, seed=seeds.seed, **source.params | params)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"data card {card.name}: task {source.task} refuses {source.params | params}: {error}"
        ) from error
    return [_example(card, source.task, f"{card.name}/{split}/{i}", entry) for i, entry in enumerate(entries)]


def _example(card: DataCard, task: str, identity: str, entry: dict[str, Any]) -> Example:
    if not isinstance(entry["answer"], str) or not entry["answer"]:
        raise UserError(f"{identity}: task {task} gives no answer, so that nothing can be checked against it")
    return Example(
        id=identity,
        messages=({"role": "user", "content": entry["question"]},),
        response=None,
        answer=entry["answer"],
        domain=card.domain,
        # Plain, because it travels between processes and into files.
        metadata={"reasoning_gym": {"task": task, "entry": json.loads(json.dumps(entry, default=str))}},
    )
