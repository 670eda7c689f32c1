"""Problems that the library reasoning_gym generates."""

import json
import warnings
from typing import Any

from align.data.cards import DataCard, ReasoningGymSource
from align.data.types import Example, SplitName
from align.errors import UserError, nearest
from reward.reasoning_gym.answer import REFUSED_TASKS


def generate_task(
    card: DataCard, source: ReasoningGymSource, split: SplitName, params: dict[str, Any]
) -> list[Example]:
    """The problems of a split, with the task's own entry in the metadata, where its verifier looks for it.

    The answer is None where a task has many solutions and gives none: its scorer judges by the entry. A problem
    whose answer is empty text is left out, since no completion can state it. `params` go before those of the card.
    Raises UserError where the task does not take them, or where the reward refuses the task.
    """
    with warnings.catch_warnings():
        # A dependency of the library compares with `is`, of which Python warns when it compiles it.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        hint = nearest(source.task, DATASETS)
        raise UserError(f"data card {card.name}: reasoning_gym has no task {source.task!r}{hint}")
    if why := REFUSED_TASKS.get(source.task):
        raise UserError(
            f"data card {card.name}: the reward refuses the task {source.task!r} of reasoning_gym: {why}. "
            "Choose another task for the source of the card"
        )
    if clash := {"seed", "size"} & set(params | source.params):
        raise UserError(f"data card {card.name}: {', '.join(sorted(clash))} belongs to splits, not to params")
    seeds = source.splits[split]
    try:
        entries = reasoning_gym.create_dataset(source.task, size=seeds.size, seed=seeds.seed, **source.params | params)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"data card {card.name}: task {source.task} refuses {source.params | params}: {error}"
        ) from error
    return [
        _example(card, source, f"{card.name}/{split}/{i}", entry)
        for i, entry in enumerate(entries)
        if entry["answer"] != ""
    ]


def _example(card: DataCard, source: ReasoningGymSource, identity: str, entry: dict[str, Any]) -> Example:
    return Example(
        id=identity,
        messages=({"role": "user", "content": entry["question"]},),
        response=None if source.solution is None else worked_solution(entry, source.solution),
        answer=entry["answer"],
        domain=card.domain,
        # Plain, because it travels between processes and into files.
        metadata={"reasoning_gym": {"task": source.task, "entry": json.loads(json.dumps(entry, default=str))}},
    )


def worked_solution(entry: dict[str, Any], key: str) -> str:
    """The entry's own steps, and its answer where rewards look for it."""
    steps = str(entry["metadata"][key]).partition("####")[0].strip()
    return f"{steps}\n\\boxed{{{entry['answer']}}}"
