"""What every part of a recipe is."""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values are not changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def refuse_without_effect(section: BaseModel, keys: Iterable[str], where: str, why: str) -> None:
    """Raise ValueError for the first of `keys` of `section`, which is `where` in the recipe, that is not at its default."""
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            raise ValueError(f"{where}.{key} has no effect here ({why}): leave it out")
