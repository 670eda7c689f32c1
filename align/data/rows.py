"""Rows that somebody else wrote, of JSON lines, Parquet or the hub: any fault is an error that names file, row and column."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from align.data.types import Message, Role
from align.errors import UserError, nearest
from align.run.files import read_jsonl_lines, read_parquet

ROLES = get_args(Role)


class NothingToJudgeBy(Exception):  # noqa: N818
    """The row is as published, and no answer to it can be judged: it is left out and counted."""


@dataclass(frozen=True, slots=True)
class Row:
    """The values of a row by column, and `where` it is, such as "train.jsonl, line 3".

    What its methods return is checked: they raise UserError where the column is missing, empty, or holds something else.
    `role` says in the message what the column is for.
    """

    values: Mapping[str, Any]
    where: str

    def error(self, column: str, why: str) -> UserError:
        """The error that something is wrong with a column."""
        return UserError(f"{self.where}: column {column!r} {why}")

    def has(self, column: str) -> bool:
        """Whether there is anything in the column: no null, no empty text, no NaN as tables of numbers write a missing one."""
        value = self.values.get(column)
        return value not in (None, "") and not (isinstance(value, float) and not math.isfinite(value))

    def value(self, column: str, role: str = "") -> Any:
        """What the column holds."""
        if column not in self.values:
            purpose = f" for the {role}" if role else ""
            raise UserError(
                f"{self.where}: no column {column!r}{purpose}; there are {', '.join(self.values) or 'none'}"
            )
        if not self.has(column):
            raise self.error(column, f"is empty: the {role} is missing" if role else "is empty")
        return self.values[column]

    def text(self, column: str, role: str = "", *, numbers: bool = False, empty: bool = False) -> str:
        """A text. `numbers`: a number is taken as text. `empty`: null and empty text are taken as ""."""
        if empty and column in self.values and not self.has(column):
            return ""
        value = self.value(column, role)
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            purpose = f" for the {role}" if role else ""
            raise self.error(column, f"must hold text{purpose}, not {value!r:.40}")
        return check_unicode(value, f"{self.where}: column {column!r}")

    def filled(self, column: str) -> str:
        """A text of more than white space. Raises UserError, with the cure, for a number."""
        value = self.value(column)
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise self.error(column, f'must hold text, not {value}; write "{value}"')
        if not (text := self.text(column)).strip():
            raise self.error(column, "is empty")
        return text

    def lines(self, column: str, role: str = "") -> str:
        """A text that may be published as a list of its lines, and may be empty."""
        value = self.values.get(column)
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            return check_unicode("\n".join(value), f"{self.where}: column {column!r}")
        return self.text(column, role, empty=True)

    def number(self, column: str) -> float:
        """A number."""
        value = self.value(column)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(column, f"must hold a number, not {value!r:.40}")
        return float(value)

    def prompt(self, column: str) -> tuple[Message, ...]:
        """A prompt: text, or a conversation that ends with the user's message."""
        return asked(self.text(column)) if isinstance(self.value(column), str) else self.messages(column, "user")

    def completion(self, column: str) -> str:
        """A completion: text, or a conversation of which it is the last message, the assistant's."""
        if isinstance(self.value(column), str):
            return self.text(column)
        return self.messages(column, "assistant")[-1]["content"]

    def messages(self, column: str, last: Role, *, exact: bool = False) -> tuple[Message, ...]:
        """A conversation that ends with a message of `last`. `exact`: a message has a role and a content, and nothing else."""
        value = self.value(column)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise self.error(column, f"must hold {'' if exact else 'text or '}a list of messages, not {value!r:.40}")
        place = f"{self.where}: column {column!r}, message"
        messages = tuple(_message(item, f"{place} {number}", exact) for number, item in enumerate(value, start=1))
        if messages[-1]["role"] != last:
            raise self.error(column, f"must end with a message of the {last}, not of the {messages[-1]['role']}")
        return messages


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, of JSON lines or Parquet by its suffix. Raises UserError where it cannot be read."""
    if path.suffix == ".jsonl":
        for line, values in read_jsonl_lines(path):
            yield Row(values, f"{path}, line {line}")
    elif path.suffix == ".parquet":
        for index, values in enumerate(read_parquet(path).to_pylist(), start=1):
            yield Row(values, f"{path}, row {index}")
    else:
        raise UserError(f"{path}: give JSON lines (.jsonl) or Parquet (.parquet)")


def asked(prompt: str) -> tuple[Message, ...]:
    """The conversation of one message of the user."""
    return ({"role": "user", "content": prompt},)


def check_unicode(text: str, where: str) -> str:
    """`text`. Raises UserError where it has half a character, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start + 1} is half of a surrogate pair") from None
    return text


def _message(item: Any, where: str, exact: bool) -> Message:
    keys = {"role", "content"}
    if not isinstance(item, Mapping) or not keys <= item.keys() or (exact and keys != item.keys()):
        raise UserError(f"{where}: must be an object with role and content{', and nothing else' if exact else ''}")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}{nearest(str(role), ROLES)}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{where}: content must be text that is not empty, not {content!r:.40}")
    return {"role": role, "content": check_unicode(content, where)}
