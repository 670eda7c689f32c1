"""What every part of a recipe is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values are not changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
