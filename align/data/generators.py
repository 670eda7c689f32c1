"""The tasks of `align.tasks` by the names that data cards give them; each is imported when a card first names it.

A task is a module with `generate(split, *, seed, domain, ...)`, which returns the examples of a split, and, where it has
preferences, `preferences(split, *, seed, domain, ...)`. Their other keywords are what a card's `params` may set; pydantic
checks these against the annotations of `generate`. A task that counts something about greedy answers besides right and wrong
has `rates(rows, examples)`, which returns shares by name; the rows are those of `align.experience.row_of`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, get_type_hints

from pydantic import create_model

from align.data.types import Example, Preference, Strict
from align.errors import nearest

GENERATORS = {
    "instructions": "align.tasks.instructions",
    "nano_chat": "align.tasks.conversation",
    "nano_code": "align.tasks.functions",
    "nano_math": "align.tasks.arithmetic",
}
GIVEN = ("split", "seed", "domain")
"""What the loader passes to every generator."""


@dataclass(frozen=True)
class Generator:
    """The functions of a task, and what its params may be."""

    generate: Callable[..., list[Example]]
    preferences: Callable[..., list[Preference]] | None
    params: type[Strict]
    rates: Callable[..., dict[str, float]] | None


@lru_cache
def generator(name: str) -> Generator:
    """The generator of that name. Raises ValueError, naming the nearest, where there is none."""
    if name not in GENERATORS:
        raise ValueError(f"unknown generator {name!r}{nearest(name, GENERATORS)}; there are {', '.join(GENERATORS)}")
    module = import_module(GENERATORS[name])
    hints = get_type_hints(module.generate, include_extras=True)
    fields: dict[str, Any] = {
        keyword: (hints[keyword], parameter.default)
        for keyword, parameter in inspect.signature(module.generate).parameters.items()
        if keyword not in GIVEN
    }
    params = create_model(f"{name} params", __base__=Strict, **fields)
    preferences, rates = (getattr(module, name, None) for name in ("preferences", "rates"))
    return Generator(module.generate, preferences, params, rates)


def reasoning_gym_task() -> ModuleType:
    """The task whose cards have a kind of source of their own."""
    return import_module("align.tasks.reasoning_gym")
