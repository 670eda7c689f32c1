"""The forms in which tables hold two completions of a prompt, one of which was preferred."""

from typing import Annotated, Literal

from pydantic import Field

from align.data.strict import Strict


class ChosenRejected(Strict):
    """Two columns, the better completion in one of them: text, or a conversation whose last message it is."""

    format: Literal["chosen_rejected"]
    chosen: str
    rejected: str
    margin: str | None = None
    """By how much the one is better; a row may lack it."""
    domain: str | None = None
    """The domain of each row; that of the card where no column has it."""


class HhDialogues(Strict):
    """Two columns of dialogues of hh-rlhf (Bai et al. 2022, arXiv:2204.05862), in each the prompt and a completion."""

    format: Literal["hh"]
    chosen: str
    rejected: str


class NumberedResponses(Strict):
    """Two columns of completions, and one that says which is better: 0 for the first of them, 1 for the second."""

    format: Literal["numbered"]
    responses: tuple[str, str]
    better: str


class SignedResponses(Strict):
    """Two columns of completions, and one with a number: how much better the second is; rows where it is 0 are left out."""

    format: Literal["signed"]
    responses: tuple[str, str]
    strength: str


PreferenceFields = Annotated[
    ChosenRejected | HhDialogues | NumberedResponses | SignedResponses, Field(discriminator="format")
]
