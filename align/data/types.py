"""What the stages train and evaluate on: examples, preferences, splits of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, NotRequired, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.errors import nearest
from reward.rows import request_of

SplitName = Literal["train", "validation", "test"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Share = Annotated[float, Field(ge=0, le=1)]


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it (the form of OpenAI's API)."""

    role: Role
    content: str
    """Empty where an assistant calls tools and says nothing."""
    name: NotRequired[str]
    """Of who speaks, or of the tool whose result this is."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """What an assistant calls: `{"type": "function", "function": {"name": ..., "arguments": ...}}` each."""
    tool_call_id: NotRequired[str]
    """Which call a tool's result answers."""
    has_thoughts: NotRequired[bool]
    """Whether a row has an assistant's thoughts in a key of their own, which is not read."""
    weight: NotRequired[float]
    """0 where a row says that an assistant's turn is not to be trained on, 1 where it is."""


@dataclass(frozen=True)
class Example:
    """A prompt, with what is known about a good answer to it."""

    id: str
    """The same in each run, like "nano_math/test/17+25"."""
    messages: tuple[Message, ...]
    """The prompt; the last message is the user's, or a tool's result."""
    response: str | None
    """A demonstration, for SFT."""
    answer: str | None
    """The ground truth, for rewards and evaluation."""
    domain: str
    level: int | None = None
    """Difficulty, 1 for the easiest; None where the source has no levels."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What rewards may look at besides: the row's other columns, tests of a program, facts of a generated problem."""
    conversation: tuple[Message, ...] = field(default=(), repr=False)
    """All turns of a demonstration up to the assistant's last, which `messages` and `response` are too, unless the row ends by asking: `messages`
    are then all of it. Empty where the data have no more than these. A row may say with `weight` which turns are trained on."""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """What the model may call in the conversation, as JSON schemas."""

    @property
    def prompt_text(self) -> str:
        """What the user asked last."""
        return request_of(self.messages)

    @property
    def prompt_key(self) -> str:
        """What prompts are compared by, to hold splits apart, but for case and white space: what the user asked last, and where turns of the
        assistant come before it, all that was said."""
        if any(message["role"] == "assistant" for message in self.messages):
            return joined(self.messages)
        return normalised(self.prompt_text)

    @property
    def earlier_keys(self) -> list[str]:
        """The `prompt_key` of the prompts of several turns that the conversation goes on from: it is trained on their answers too."""
        answers = [place for place, turn in enumerate(self.conversation) if turn["role"] == "assistant"]
        return [joined(self.conversation[:place]) for place in answers[1:] if place < len(self.messages)]


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
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The ground truth and the other columns, for rewards of what a policy answers to the prompt."""

    @property
    def prompt_text(self) -> str:
        """What the user asked last."""
        return request_of(self.messages)

    @property
    def prompt_key(self) -> str:
        """What prompts are compared by, to hold splits apart: the whole conversation, but for case and white space."""
        return joined(self.messages)


Item = TypeVar("Item", Example, Preference)


@dataclass(frozen=True)
class LoadedSplit(Generic[Item]):
    """The examples or preferences of a split, and how they were held apart from what is held out."""

    examples: Sequence[Item]
    dropped_contaminated: int = 0
    """How many were left out since their prompt occurs in something that is held out from this split."""
    unchecked: tuple[SplitName, ...] = ()
    """Held-out splits that could not be compared, because `path` gave one file only."""
    compared: Mapping[str, int] = field(default_factory=dict)
    """What was compared, such as "math/test", with how many of those left out occur in it."""
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64), repr=False)
    """The hash of the `prompt_key` of every prompt of the split, of those that were left out too [N]."""

    @property
    def prompts(self) -> frozenset[int]:
        """`keys` as a set."""
        return frozenset(self.keys.tolist())


class Strict(BaseModel):
    """A part of a data card: refuses keys it does not have, and names the nearest one it has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in data if isinstance(data, Mapping) else ():
            if key not in known:
                raise ValueError(f"unknown key {key!r}{nearest(str(key), known)}")
        return data


def normalised(prompt: str) -> str:
    """The prompt but for case and white space."""
    return " ".join(prompt.casefold().split())


def joined(turns: Sequence[Message]) -> str:
    """All that was said, but for case and white space."""
    return normalised("\n".join(turn["content"] for turn in turns))
