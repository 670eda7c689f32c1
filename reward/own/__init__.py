"""Rewards of one's own: a function in a file, named in a recipe as `my_rewards.py:says_unit`.

    def says_unit(sample: Sample) -> float:
        return float(sample.metadata["unit"] in sample.completion)

The function takes a `Sample`, or, where it is marked `@batched`, a list of them; or it has TRL's signature, recognised by
a parameter `completions`: `(prompts, completions, **columns) -> list`. It may be `async`. For each sample it returns a number,
a `Score`, or None where it does not score the sample. A number above 0 passes. `file` has the trainer's side, and `child` what runs in
the function's process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
BATCHED, COLUMNS = "_reward_batched", "_reward_columns"


def batched(function: Function) -> Function:
    """Mark a reward in a file as one that takes a list of samples and returns a list of as many scores."""
    setattr(function, BATCHED, True)
    return function


def columns(*names: str) -> Callable[[Function], Function]:
    """A decorator that names the columns of the data that a reward in a file reads from `sample.metadata`.

    Data without them are then refused before the run starts.
    """

    def mark(function: Function) -> Function:
        setattr(function, COLUMNS, names)
        return function

    return mark


def columns_of(metadata: Mapping[str, Any], ground_truth: str | None) -> dict[str, Any]:
    """What a reward may read of a sample by the name of a column: its metadata, and the ground truth under two names."""
    truth = {} if ground_truth is None else {"answer": ground_truth, "ground_truth": ground_truth}
    return {**truth, **metadata}
