"""Rows that somebody else wrote, of files or the hub: any fault is an error that names file, row and column."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, get_args

from align.data.types import Message, Role
from align.errors import UserError, nearest
from reward.rows import text_of

ROLES = get_args(Role)
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
}
"""ShareGPT's names of roles, where they are others than OpenAI's."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys beside the content in which messages are published with thoughts."""
_PLAIN = {"role", "content"}
_NUMBER = re.compile(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*")


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
    line: tuple[int, int, int] | None = None
    """First byte, length and number of the line that it is, where its file can be read again from there."""

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
        """A number; as text too, for tables such as CSV hold nothing else."""
        value = self.value(column)
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            return float(value)
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
        answer = self.messages(column, "assistant")[-1]
        refuse_lost_thoughts([answer], f"{self.where}: column {column!r}")
        return answer["content"]

    def messages(self, column: str, last: Role) -> tuple[Message, ...]:
        """A conversation that ends with a message of `last`."""
        messages = self.conversation(column)
        if messages[-1]["role"] != last:
            raise self.error(column, f"must end with a message of the {last}, not of the {messages[-1]['role']}")
        return messages

    def conversation(self, column: str) -> tuple[Message, ...]:
        """A conversation: a list of messages in OpenAI's form or in ShareGPT's, or the JSON text of one."""
        value = self.value(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = self.json(column)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise self.error(column, f"must hold text or a list of messages, not {value!r:.40}")
        where = f"{self.where}: column {column!r}"
        messages = tuple(message_of(item, f"{where}, message {number}") for number, item in enumerate(value, start=1))
        check_tool_results(messages, where)
        return messages

    def json(self, column: str) -> Any:
        """What a column holds, read where it is JSON text."""
        value = self.value(column)
        try:
            return json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            raise self.error(column, f"is not JSON: {error}") from None


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


def message_of(item: Any, where: str) -> Message:
    """A message of a row, whose text may come in parts. Raises UserError, which begins with `where`, for anything else."""
    # Most messages are plain ones, and the time that a large file takes goes into them.
    if (
        type(item) is dict
        and item.keys() == _PLAIN
        and item["role"] in ROLES
        and isinstance(item["content"], str)
        and item["content"].strip()
    ):
        return {"role": item["role"], "content": check_unicode(item["content"], where)}
    if isinstance(item, Mapping) and {"from", "value"} <= item.keys():
        item = {**item, **_of_sharegpt(item["from"], item["value"], where)}
    if not isinstance(item, Mapping) or "role" not in item or not {"content", "tool_calls"} & item.keys():
        raise UserError(f"{where}: must be an object with role and content")
    role, calls = item["role"], item.get("tool_calls")
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}{nearest(str(role), ROLES)}; roles are {', '.join(ROLES)}")
    if calls and (role != "assistant" or not isinstance(calls, list) or not all(isinstance(c, Mapping) for c in calls)):
        raise UserError(f"{where}: tool_calls must be an assistant's list of objects")
    content = _text(item.get("content"), where)
    if not content.strip() and not calls and role in ("user", "assistant"):
        raise UserError(f"{where}: content must be text that is not empty, not {item.get('content')!r:.40}")
    message: Message = {"role": role, "content": check_unicode(content, where)}
    if calls:
        message["tool_calls"] = [_call(call, where) for call in calls]
    for key in ("name", "tool_call_id"):
        if item.get(key) is not None:
            message[key] = str(item[key])
    if (weight := _weight(item, where)) is not None:
        message["weight"] = weight
    if role == "assistant" and any(isinstance(item.get(key), str) and item[key].strip() for key in THOUGHTS):
        message["has_thoughts"] = True
    return message


def _of_sharegpt(speaker: Any, said: Any, where: str) -> dict[str, Any]:
    """A turn of ShareGPT's form in OpenAI's. LLaMA-Factory's `function_call` says the JSON of a call, or of a list of them."""
    if speaker != "function_call":
        return {"role": SHAREGPT_ROLES.get(str(speaker), speaker), "content": said}
    calls = None
    with suppress(ValueError, RecursionError):
        calls = json.loads(said) if isinstance(said, str) else said
    calls = [calls] if isinstance(calls, Mapping) else calls
    if (
        not isinstance(calls, list)
        or not calls
        or not all(isinstance(call, Mapping) and "name" in call for call in calls)
    ):
        raise UserError(
            f"{where}: a function_call must be the JSON of an object with name and arguments, or of a list of them, not {said!r:.40}"
        )
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": dict(call)} for call in calls],
    }


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A call of a tool, its arguments as an object: chat templates write it as JSON, and OpenAI's files hold the text of that."""
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    with suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(function, Mapping) or not isinstance(arguments, Mapping):
        raise UserError(f"{where}: a tool call must have a function with a name and arguments that are a JSON object")
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _text(content: Any, where: str) -> str:
    """The text of a content: a text, null, or a list of parts that are all text."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else None
                raise UserError(
                    f"{where}: content has a part that is no text ({kind or repr(part)[:40]}), and only texts are read"
                )
    elif content is not None and not isinstance(content, str):
        raise UserError(f"{where}: content must be text that is not empty, not {content!r:.40}")
    return text_of(content)


def _weight(item: Mapping[str, Any], where: str) -> float | None:
    """Whether a turn is trained on, by OpenAI's `weight` (0 or 1) or by `train` (true or false)."""
    given = [item[key] for key in ("weight", "train") if item.get(key) is not None]
    if not given:
        return None
    if given[0] not in (0, 1):
        raise UserError(f"{where}: weight must be 0 or 1, and train true or false, not {given[0]!r:.40}")
    return float(given[0])


def level_of(value: Any) -> int | None:
    """A whole number, as text or with a point too, or the one that a text such as "Level 3" ends in; None of anything else."""
    if isinstance(value, str):
        ending = re.search(r"[0-9]{1,9}\Z", value)
        value = float(value) if _NUMBER.fullmatch(value) else int(ending[0]) if ending else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


def refuse_lost_thoughts(messages: Sequence[Message], where: str) -> None:
    """Raise UserError where a turn of the assistant after the user's last has thoughts that are not read. Templates leave earlier ones out."""
    said = takewhile(lambda message: message["role"] != "user", reversed(messages))
    if any(message.get("has_thoughts") for message in said):
        raise UserError(
            f"{where} has thoughts beside the content, and every chat template writes them in its own way. Put them into the "
            "content as the model's template does, such as <think>...</think> before the answer"
        )


def check_tool_results(messages: Sequence[Message], where: str) -> None:
    """Raise UserError for a tool's result that nobody called for, and for a call without a result that is not the last message."""
    due, caller = 0, 0
    for number, message in enumerate(messages, start=1):
        if message["role"] == "tool":
            if not due:
                raise UserError(
                    f"{where}, message {number}: a tool's result, and no tool call before it is without one"
                )
            due -= 1
            continue
        if due:
            raise UserError(f"{where}, message {caller}: {due} of its tool calls have no result after it")
        due, caller = len(message.get("tool_calls", ())), number
