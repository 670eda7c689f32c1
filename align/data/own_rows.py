"""What the columns of a row without a card say: a prompt, an answer, a conversation. All raise UserError with file, row and column."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from align.data.pair_rows import hh_prompt, is_hh_dialogue
from align.data.rows import ROLES, NothingToJudgeBy, Row, asked, message_of
from align.data.types import Message
from align.errors import UserError
from reward.rows import PROMPTS, prompt_column

Turns = tuple[Message, ...]
SYSTEM = ("system", "system_prompt")
PARTS_OF_QUESTIONS = ("choices", "options", "passage", "context")
"""Columns that questions are often published with."""
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']\s*:""")
"""How text begins that holds messages."""


class Conversation(NamedTuple):
    """What a row of conversations or problems says: its turns, and the columns that they are from."""

    turns: Turns
    columns: tuple[str, ...]


def filled(row: Row, column: str) -> bool:
    """Whether there is anything in a column: an empty list is nothing."""
    return row.has(column) and row.values[column] != []


def answered(row: Row, column: str) -> Turns:
    """The turns in a column, of which one is the assistant's."""
    turns = row.conversation(column)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise row.error(column, "has no turn of the assistant to learn from")
    return turns


def instruction(row: Row) -> Conversation:
    """What Alpaca's columns ask, after the turns before it."""
    prompt, more = row.filled("instruction"), row.text("input", empty=True) if "input" in row.values else ""
    prompt = f"{prompt}\n\n{more}" if more.strip() else prompt
    return Conversation((*_history(row), *asked(prompt)), ("instruction", "input", "system", "history"))


def _history(row: Row) -> Turns:
    """The turns before, in LLaMA-Factory's column `history`: pairs of what was asked and answered."""
    if not filled(row, "history"):
        return ()
    history = row.json("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise row.error("history", f"must be a list of pairs of texts, asked and answered, not {history!r:.40}")
    said = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return tuple(message_of({"role": role, "content": text}, f"{row.where}: column 'history'") for role, text in said)


def asking(row: Row) -> Conversation:
    """A prompt: a text, or messages of which the last is the user's or a tool's result."""
    column = prompt_column(row.values)
    if column is None:
        raise UserError(f"{row.where}: no column with a prompt ({', '.join(PROMPTS)})")
    if column == "messages" and isinstance(row.values.get("prompt"), str):
        raise UserError(f"{row.where}: both prompt and messages; give one of them")
    return asked_in(row, column)


def asked_in(row: Row, column: str) -> Conversation:
    """The prompt in a column, of text, of a dialogue of hh-rlhf, or of messages."""
    if isinstance(row.values[column], str) and not holds_messages(row.values[column]):
        text = row.filled(column)
        if is_hh_dialogue(text) and text.rstrip().endswith("Assistant:"):
            try:
                return Conversation(hh_prompt(text), (column,))
            except NothingToJudgeBy as reason:
                raise row.error(column, f"is a dialogue, and {reason}") from None
        _refuse_parts_apart(row, text)
        return Conversation(asked(text), (column,))
    turns = row.conversation(column)
    if turns[-1]["role"] not in ("user", "tool"):
        raise row.error(column, f"must end with a message of the user, not of the {turns[-1]['role']}")
    return Conversation(turns, (column,))


def _refuse_parts_apart(row: Row, text: str) -> None:
    """Raise UserError for texts in a column that may be a part of the question, where the `text` of the prompt lacks them."""
    for column in PARTS_OF_QUESTIONS:
        if not all(part in text for part in _texts_in(row.values.get(column))):
            raise row.error(
                column,
                "may be a part of what is asked, and the prompt lacks it: write it into the prompt, or call the column something else "
                "where rewards alone read it",
            )


def _texts_in(value: Any) -> Iterator[str]:
    """The texts in a value of JSON."""
    if isinstance(value, str):
        yield value.strip()
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts_in(part)


def is_answer_text(row: Row, column: str) -> bool:
    """Whether a column of answers holds a text, and not the JSON of messages, whole or broken off; an answer may be other JSON."""
    value = row.values[column]
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return isinstance(value, str)
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return _MESSAGES.match(value) is None
    return not turns or not all(isinstance(turn, dict) and _is_message(turn) for turn in turns)


def _is_message(turn: Mapping[str, Any]) -> bool:
    return (turn.get("role") in ROLES and "content" in turn) or {"from", "value"} <= turn.keys()


def holds_messages(text: str) -> bool:
    """Whether a text is the JSON of messages, whole or broken off; other text may begin with brackets too."""
    if not text.lstrip().startswith("["):
        return False
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _MESSAGES.match(text) is not None
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in found)
    )


def with_system(row: Row, turns: Turns) -> Turns:
    """The turns after the text of a column `system` or `system_prompt`, where the row has one and the turns do not begin with another."""
    column = system_column(row, turns)
    return turns if column is None else ({"role": "system", "content": row.text(column)}, *turns)


def system_column(row: Row, turns: Turns) -> str | None:
    """The column whose text stands before the turns as a system message; None where there is none, or the turns begin with another."""
    if turns[0]["role"] in ("system", "developer"):
        return None
    return next((name for name in SYSTEM if isinstance(row.values.get(name), str) and row.values[name].strip()), None)
