"""What a row of a data set is to a reward: the same in training, in evaluation, for `align score` and behind TRL's adapter.

The prompt is in the first of PROMPTS that the row has, the ground truth in the first of TRUTHS. Every other column reaches the
reward in `Sample.metadata` under its own name, and the keys of a column `metadata` that holds an object as if they were columns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from math import isfinite
from typing import Any

from reward.math.final_answer import normalise
from reward.math.text import gold_answer
from reward.types import Sample

PROMPTS = ("messages", "prompt", "problem", "question")
"""Columns that hold a prompt: a text, or a list of messages."""
TRUTHS = ("answer", "ground_truth", "reward_model", "solution")
"""Columns that hold a ground truth; of `reward_model`, which is verl's, it is the key `ground_truth`."""
DOMAINS = ("domain", "data_source", "dataset")
"""Columns that say what kind of task a row is; the last two are those of verl and open-instruct."""
DOMAIN = "user"
"""The domain of a row that names none."""

Messages = Sequence[Mapping[str, Any]]

_FIRST_THOUGHT = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_LAST_LINE = re.compile(r"(?:\A|\n)####[ \t]*(\S[^\n]*?)\s*\Z")


def sample_of_row(
    row: Mapping[str, Any],
    completion: str,
    *,
    id: str,
    prompt: str | Messages | None = None,
    completion_tokens: int | None = None,
    taken: Collection[str] = (),
) -> Sample:
    """A completion and the row of its prompt, as rewards see them.

    `prompt` is what was asked, where it is not in the row itself. `taken` are columns from which the completion was read.
    """
    column = prompt_column(row) if prompt is None else None
    messages = as_messages(prompt if column is None else row[column])
    return Sample(
        id=id,
        prompt=request_of(messages),
        completion=completion,
        ground_truth=ground_truth_of(row),
        domain=domain_of(row),
        metadata=metadata_of(row, {*taken, column or ""}) | added_metadata(messages, completion_tokens),
    )


def prompt_column(row: Mapping[str, Any]) -> str | None:
    """The column with the row's prompt; None where it has none."""
    return next((name for name in PROMPTS if row.get(name)), None)


def ground_truth_of(row: Mapping[str, Any]) -> str | None:
    r"""The ground truth of a row as text; None where it has none, or one of parts that only a reward of its own can read.

    Of a whole solution it is the final answer: what follows `####` on the last line, or else the last `\boxed{}`, with those that
    are listed with it, if there is something in it.
    """
    for name in TRUTHS:
        value = row.get(name)
        if name == "reward_model":
            value = value.get("ground_truth") if isinstance(value, Mapping) else None
        if isinstance(value, list) and value and all(isinstance(part, str | int | float) for part in value):
            value = ", ".join(map(_written, value))  # the parts of one answer
        is_plain = isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)
        if is_plain and value == value and value != "":
            return final_answer(_written(value))
    return None


def _written(value: Any) -> str:
    """A value as people write it: numbers with all their digits, and no exponent."""
    if isinstance(value, float) and isfinite(value):
        value = Decimal(repr(value))
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def final_answer(text: str) -> str:
    r"""What a gold solution ends in: after `####`, in the last `\boxed{}` and those listed with it; the text itself where it marks no answer."""
    if marked := _LAST_LINE.search(text):
        return marked[1]
    boxed = gold_answer(text) if r"\boxed" in text else None
    return boxed if boxed and normalise(boxed) else text


def domain_of(row: Mapping[str, Any], default: str = DOMAIN) -> str:
    """What kind of task a row says it is, by which a recipe's rewards are chosen; `default` where it says none."""
    for name in DOMAINS:
        value = row.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str) and value:
            return value
    return default


def metadata_of(row: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """The columns of a row but those from which a sample's texts were `taken`; never `prompt` and `messages`."""
    inner = row.get("metadata")
    own = {name: value for name, value in row.items() if name not in {*taken, "prompt", "messages"}}
    if not isinstance(inner, Mapping):
        return own
    return {**inner, **{name: value for name, value in own.items() if name != "metadata"}}


def added_metadata(messages: Messages, completion_tokens: int | None) -> dict[str, Any]:
    """What a sample's metadata have besides columns: the conversation that is answered, and the answer's number of tokens."""
    counted = {} if completion_tokens is None else {"completion_tokens": completion_tokens}
    return ({"messages": [dict(message) for message in messages]} if messages else {}) | counted


def as_messages(prompt: Any) -> list[dict[str, Any]]:
    """A prompt as messages whose contents are texts; a text is what the user says."""
    if not prompt:
        return []
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{**message, "content": text_of(message.get("content"))} for message in prompt]


def messages_of(sample: Sample) -> Messages:
    """The sample's prompt as chat messages: those of its metadata, or else one message of the user."""
    messages: Messages = sample.metadata.get("messages") or ()
    return messages or ({"role": "user", "content": sample.prompt},)


def request_of(messages: Messages) -> str:
    """What the user asked last; the last message where none is the user's."""
    asked = [message["content"] for message in messages if message.get("role") == "user"]
    return str(asked[-1] if asked else messages[-1]["content"] if messages else "")


def after_thought(completion: str) -> str:
    """What a completion says after the `<think>` ... `</think>` that it begins with; nothing where that thought never ends.

    Where it only has the `</think>`, as files keep answers whose `<think>` was in the prompt, all before it is the thought.
    """
    if "<think>" not in completion and "</think>" in completion:
        completion = "<think>" + completion
    return _FIRST_THOUGHT.sub("", completion).strip() if completion.lstrip().startswith("<think>") else completion


def text_of(content: Any) -> str:
    """The text of a message's content: a text, None beside tool calls, or a list of parts of which those with text count."""
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part.get("text") or "" for part in content)
