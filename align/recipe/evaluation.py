"""What a recipe asks of the policy before and after a stage."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from align.recipe.section import Section

STAGES_OWN = ("before ", "after ", "grpo step ")
"""How the names of the evaluations begin that a stage makes by itself."""


class HookOptions(Section):
    """A registered evaluation of the checkpoint that a stage wrote; `align evaluations list` shows them."""

    name: str
    params: dict[str, Any] = Field({})
    label: str | None = Field(
        None, pattern=r"^[^/.][^/]*$", description="what its results are called; its name when not given"
    )

    @property
    def title(self) -> str:
        """What its results are called."""
        return self.label or self.name


class AgainstOptions(Section):
    """An earlier run whose answers to the same problems are compared with: how often the new ones are better."""

    run: Path = Field(description="run directory, or the checkpoint in it")
    judge: str = Field(description="component of the reward by which answers are compared")


class EvaluationOptions(Section):
    """Held-out problems answered by the policy, before and after the stage, and whatever else is asked of it then."""

    cards: list[str] | None = Field(None, description="data cards; those of the training data when not given")
    split: Literal["validation", "test"] = Field("test", description="of the evaluations before and after the stage")
    path: Path | None = Field(
        None, description="local file, or directory with a file for each split, in place of the source of the only card"
    )
    levels: list[int] | None = Field(None, description="difficulty levels to keep of the only card")
    limit: int = Field(256, ge=1, description="problems of a card, after a seeded shuffle")
    samples: int = Field(4, ge=0, description="samples a problem for pass@k; 0 leaves it out")
    before: bool = Field(True, description="also before the first step; not where the stage before has just done it")
    every: int | None = Field(
        None,
        ge=1,
        description="GRPO: also every so many steps, on the validation split, by which the most accurate checkpoint is chosen",
    )
    max_new_tokens: int = Field(64, ge=1)
    against: AgainstOptions | None = None
    hooks: list[HookOptions] = Field([])

    @model_validator(mode="after")
    def _results_do_not_overwrite_each_other(self) -> Self:
        titles = [hook.title for hook in self.hooks]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two hooks are called {title!r}, where each needs a label of its own")
            if title.lower().startswith(STAGES_OWN):
                raise ValueError(
                    f"a hook is called {title!r}, as the stage's own evaluations are: give it another label"
                )
        return self
