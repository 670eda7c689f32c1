"""What every group of options in a recipe is."""

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """A group of options: unknown keys are refused, values do not change once they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    elif value != type(options).model_fields[name].default:
        raise ValueError(f"{at}{name} has no effect here ({why}): leave it out")
