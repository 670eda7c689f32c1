"""The forms in which tables hold two completions of a prompt, one of which was preferred.

A form is a part of a data card that says which columns it reads. Its `prompt` is the conversation to be answered, and its `pair`
what the row prefers; both raise NothingToJudgeBy for a row that prefers nothing, and UserError for one of another form.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from align.data.rows import NothingToJudgeBy, Row
from align.data.types import Message, Role, Strict

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES: Mapping[str, Role] = {"Human": "user", "Assistant": "assistant"}


class Pair(NamedTuple):
    """What a row prefers; `domain` is None where it is the card's."""

    chosen: str
    rejected: str
    margin: float | None = None
    domain: str | None = None


class PairForm(Strict):
    """What the forms have in common: the prompt is in a column of its own."""

    def prompt(self, row: Row, column: str) -> tuple[Message, ...]:
        return row.prompt(column)


class ChosenRejected(PairForm):
    """Two columns, the better completion in one of them: text, or a conversation whose last message it is."""

    format: Literal["chosen_rejected"]
    chosen: str
    rejected: str
    margin: str | None = None
    """By how much the one is better; a row may lack it."""
    domain: str | None = None
    """The domain of each row; that of the card where no column has it."""

    def pair(self, row: Row) -> Pair:
        return Pair(
            row.completion(self.chosen),
            row.completion(self.rejected),
            margin=row.number(self.margin) if self.margin and row.has(self.margin) else None,
            domain=row.text(self.domain) if self.domain else None,
        )


class HhDialogues(PairForm):
    """Two columns of dialogues of hh-rlhf (Bai et al. 2022, arXiv:2204.05862), in each the prompt and a completion."""

    format: Literal["hh"]
    chosen: str
    rejected: str

    def prompt(self, row: Row, column: str) -> tuple[Message, ...]:
        return tuple(hh_turns(row.text(self.chosen))[:-1])

    def pair(self, row: Row) -> Pair:
        _, better, worse = hh_pair(row.text(self.chosen), row.text(self.rejected))
        return Pair(better, worse)


class NumberedResponses(PairForm):
    """Two columns of completions, and one that says which is better: 0 for the first of them, 1 for the second."""

    format: Literal["numbered"]
    responses: tuple[str, str]
    better: str

    def pair(self, row: Row) -> Pair:
        first, second = map(row.completion, self.responses)
        better = row.number(self.better)
        if better not in (0, 1):
            raise row.error(self.better, f"must be 0 or 1, the better response, not {better:g}")
        return Pair(second, first) if better else Pair(first, second)


class SignedResponses(PairForm):
    """Two columns of completions, and one with a number: how much better the second is; rows where it is 0 are left out."""

    format: Literal["signed"]
    responses: tuple[str, str]
    strength: str

    def pair(self, row: Row) -> Pair:
        first, second = map(row.completion, self.responses)
        strength = row.number(self.strength)
        if strength == 0:
            raise NothingToJudgeBy("neither response is preferred")
        return Pair(*((second, first) if strength > 0 else (first, second)), margin=abs(strength))


PairRows = Annotated[ChosenRejected | HhDialogues | NumberedResponses | SignedResponses, Field(discriminator="format")]


def hh_pair(chosen: str, rejected: str) -> tuple[tuple[Message, ...], str, str]:
    """The prompt and the completions of two dialogues. Raises NothingToJudgeBy where they differ before their last turn, and as `hh_turns` does."""
    (*prompt, better), (*other_prompt, worse) = hh_turns(chosen), hh_turns(rejected)
    if prompt != other_prompt:
        raise NothingToJudgeBy("the dialogues differ before their last turn")
    return tuple(prompt), better["content"], worse["content"]


def is_hh_dialogue(text: str) -> bool:
    """Whether a text is "Human: ...\\n\\nAssistant: ...", with or without the line breaks that hh-rlhf has before it."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def hh_prompt(dialogue: str) -> tuple[Message, ...]:
    """The turns of a dialogue that ends in "Assistant:", where the assistant is to answer. Raises NothingToJudgeBy as `hh_turns` does."""
    return tuple(hh_turns(f"{dialogue.rstrip()} ...")[:-1])


def hh_turns(dialogue: str) -> list[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...". Raises NothingToJudgeBy unless they alternate and have a text each."""
    before, *parts = HH_TURN.split(f"\n\n{dialogue.lstrip()}")
    turns: list[Message] = [
        {"role": HH_ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    expected = ["user", "assistant"] * (len(turns) // 2)
    if before.strip() or not turns or [turn["role"] for turn in turns] != expected:
        raise NothingToJudgeBy("its turns do not alternate between a human and an assistant who ends the dialogue")
    if not all(turn["content"] for turn in turns):
        raise NothingToJudgeBy("one of its turns is empty")
    return turns
