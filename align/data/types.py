"""What the stages train and evaluate on: one example, one split."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

from pydantic import Field

SplitName = Literal["train", "validation", "test"]
Role = Literal["system", "user", "assistant"]
Share = Annotated[float, Field(ge=0, le=1)]


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt, with what is known about a good answer to it."""

    id: str
    """The same in each run, like "nano_math/test/17+25"."""
    messages: tuple[Message, ...]
    """The prompt; the last message is the user's."""
    response: str | None
    """A demonstration, for SFT."""
    answer: str | None
    """The ground truth, for rewards and evaluation."""
    domain: str
    level: int | None = None
    """Difficulty, 1 for the easiest; None where the source has no levels."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_text(self) -> str:
        """What the user asked last."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, the first of which was found to be the better one."""

    id: str
    messages: tuple[Message, ...]
    """The prompt; the last message is the user's."""
    chosen: str
    rejected: str
    domain: str
    margin: float | None = None
    """By how much the first is better, in the units of its source; None where that was not measured."""

    @property
    def prompt_text(self) -> str:
        """What the user asked last."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class LoadedSplit:
    """The examples of a split, and how they were held apart from what is held out."""

    examples: list[Example]
    dropped_contaminated: int = 0
    """Examples left out since their prompt occurs in something that is held out from this split."""
    unchecked: tuple[SplitName, ...] = ()
    """Held-out splits that could not be compared, because `path` gave one file only."""
    compared: Mapping[str, int] = field(default_factory=dict)
    """What was compared, such as "math/test", with how many of the dropped examples occur in it."""
    prompts: frozenset[str] = frozenset()
    """Every prompt of the split, those that were dropped too, as prompts are compared: see `align.data.tables.normalised`."""
