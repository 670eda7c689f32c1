"""What every group of options in a recipe is."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pydantic import BaseModel, ConfigDict

_kept: ContextVar[bool] = ContextVar("kept", default=False)


class Options(BaseModel):
    """A group of options: unknown keys are refused, values do not change once they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@contextmanager
def kept_options() -> Iterator[None]:
    """Accept, within the block, options without effect: those of a run that an earlier version began with them."""
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def is_kept() -> bool:
    """Whether options are read in the block of `kept_options`."""
    return _kept.get()


def refuse_without_effect(options: BaseModel, key: str, why: str, *, at: str = "") -> None:
    """Raise ValueError where an option that does nothing here is not at its default.

    `key` is a dotted path below `options`, through every entry of a list; `at` is where `options` are in the recipe, such as
    "learner.optimizer.".
    """
    name, _, rest = key.partition(".")
    value = getattr(options, name)
    if rest:
        for part in value if isinstance(value, list) else [value]:
            refuse_without_effect(part, rest, why, at=f"{at}{name}.")
    elif value != type(options).model_fields[name].default and not is_kept():
        default = type(options).model_fields[name].default
        cure = f", or set it to its default, {default}" if isinstance(default, int | float | str) else ""
        raise ValueError(f"{at}{name} has no effect here ({why}): leave it out{cure}")
