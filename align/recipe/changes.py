"""What differs between the recipe of an interrupted run and the one that is to go on with it."""

from collections.abc import Iterator
from typing import Any

from align.recipe.options import Recipe

# What changes nothing of what is trained: where it runs, how often it saves, how long it waits.
FREE = (
    "run",
    "machine",
    "save_every",
    "keep_checkpoints",
    "weights",
    "learner.port",
    "learner.gpus",
    "learner.resources",
    "learner.start_timeout_s",
    "learner.step_timeout_s",
    "rollout.workers",
    "rollout.gpus",
    "rollout.resources",
    "rollout.start_timeout_s",
    "rollout.batch_timeout_s",
    "rollout.stall_timeout_s",
    "rollout.probe_interval_s",
    "rollout.probe_timeout_s",
    "rollout.max_restarts",
    "scoring.workers",
    "scoring.timeout_s",
)


def differences(before: Recipe, now: Recipe) -> list[str]:
    """The keys whose values matter and differ, such as "sft.steps (800 before, 900 now)"."""
    return list(_differences(before.model_dump(mode="json"), now.model_dump(mode="json"), ""))


def _differences(before: Any, now: Any, key: str) -> Iterator[str]:
    if before == now or key in FREE:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    else:
        yield f"{key} ({before!r} before, {now!r} now)"
