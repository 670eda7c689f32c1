"""A user's own problems: JSON lines like {"id": "1", "prompt": "What is 1 + 1?", "answer": "2"}."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from align.data.cards import nearest
from align.data.tables import check_unicode
from align.data.types import Example, Message, Role
from align.errors import UserError
from align.run.files import read_jsonl_lines

KEYS = ("id", "prompt", "messages", "answer", "domain", "level", "metadata")
ROLES = get_args(Role)


def read_user_file(path: str | Path) -> list[Example]:
    """The problems of the file, in its order.

    Each line has `id`, `answer`, and `prompt` or `messages` (of which the last is the user's); it may have
    `domain`, `level` and `metadata`, which rewards can look into. Raises UserError with file and line.
    """
    path = Path(path)
    first_seen: dict[str, int] = {}
    examples = []
    for line, row in read_jsonl_lines(path):
        where = f"{path}, line {line}"
        example = _example(row, where)
        if example.id in first_seen:
            raise UserError(f"{where}: the id {example.id!r} is already that of line {first_seen[example.id]}")
        first_seen[example.id] = line
        examples.append(example)
    if not examples:
        raise UserError(f"{path} is empty: each line must be a problem with id, prompt and answer")
    return examples


def _example(row: Mapping[str, Any], where: str) -> Example:
    for key in row:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, KEYS)}; extra data goes into metadata")
    return Example(
        id=_text(row, "id", where),
        messages=_messages(row, where),
        response=None,
        answer=_text(row, "answer", where),
        domain=_text(row, "domain", where) if "domain" in row else "user",
        level=_typed(row, "level", int, where) if "level" in row else None,
        metadata=_typed(row, "metadata", dict, where) if "metadata" in row else {},
    )


def _messages(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    if "prompt" in row and "messages" in row:
        raise UserError(f"{where}: both prompt and messages; give one of them")
    if "messages" not in row:
        return ({"role": "user", "content": _text(row, "prompt", where)},)
    given = _typed(row, "messages", list, where)
    messages = tuple(_message(item, f"{where}, message {number}") for number, item in enumerate(given, start=1))
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: the last of the messages must be from the user, since the model answers it")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict) or set(item) != {"role", "content"}:
        raise UserError(f"{where}: must be an object with role and content, and nothing else")
    role = item["role"]
    if role not in ROLES:
        hint = nearest(str(role), ROLES)
        raise UserError(f"{where}: unknown role {role!r}{hint}; roles are {', '.join(ROLES)}")
    return {"role": role, "content": _text(item, "content", where)}


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = _typed(row, key, str, where)
    if not value.strip():
        raise UserError(f"{where}: {key} is empty")
    return check_unicode(value, f"{where}: {key}")


def _typed(row: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in row:
        raise UserError(f"{where}: {key} is missing")
    value = row[key]
    # Of Python's numbers, bool is an int; JSON's true is none.
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
        cure = f'; write "{value}"' if kind is str and isinstance(value, int | float) else ""
        raise UserError(f"{where}: {key} must be {names[kind]}, not {type(value).__name__}{cure}")
    return value
