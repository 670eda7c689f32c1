"""Token ids of a prompt with its completion, as a reward model reads them: by its own tokenizer and chat template.

The template is rendered with placeholders for the contents and cut at them. Its own text may hold special tokens; each
content is tokenised apart from it as plain text, with the white space before it, so that a completion that spells out a
special token cannot forge a turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from reward.types import RewardError, Sample

# Private-use characters: a template that looks for something in a content does not find it in these.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000([0-9]+)\ue001")


class _Layout(NamedTuple):
    """What surrounds the contents: for each the ids before it and the white space that goes with it, and the ids at the end."""

    before: tuple[tuple[tuple[int, ...], str], ...]
    after: tuple[int, ...]


def messages_of(sample: Sample) -> Sequence[Mapping[str, str]]:
    """The sample's prompt as chat messages: those of its metadata, or else one message of the user."""
    messages: Sequence[Mapping[str, str]] = sample.metadata.get("messages") or ()
    return messages or ({"role": "user", "content": sample.prompt},)


def encode_conversation(tokenizer: Any, messages: Sequence[Mapping[str, str]], completion: str) -> list[int]:
    """The ids of prompt, completion and one end-of-sequence token.

    Raises RewardError where the tokenizer has no chat template or no end-of-sequence token, or where its template does not
    take these roles.
    """
    layout = _layout(tokenizer, tuple(message["role"] for message in messages))
    contents = [*(message["content"] for message in messages), completion]
    ids: list[int] = []
    for (before, space), content in zip(layout.before, contents, strict=True):
        ids += before
        ids += _encode(tokenizer, space + content, special=False)
    return ids + list(layout.after)


def shortened(ids: list[int], longest: int, bos: int | None) -> list[int]:
    """The ids, without the oldest of them where there are more than `longest`; the first stays if it is the BOS."""
    if len(ids) <= longest:
        return ids
    head = ids[:1] if ids[0] == bos else []
    return head + ids[len(ids) - longest + len(head) :]


@lru_cache(maxsize=64)
def _layout(tokenizer: Any, roles: tuple[str, ...]) -> _Layout:
    prompt = _rendered(tokenizer, roles, answering=True)
    whole = _rendered(tokenizer, (*roles, "assistant"), answering=False)
    *before, opening = _texts(prompt, len(roles))
    if not whole.startswith(prompt):
        raise RewardError(
            f"the chat template of {_name(tokenizer)} does not begin an answered conversation with its prompt"
        )
    space, after = _texts(whole[len(prompt) :], 1, first=len(roles))
    split = [_split_space(tokenizer, text, first=place == 0) for place, text in enumerate(before)]
    answer_ids, answer_space = _split_space(tokenizer, space)
    split.append((_ids(tokenizer, opening) + answer_ids, answer_space))
    end = tokenizer.eos_token_id
    if end is None:
        raise RewardError(
            f"the tokenizer of {_name(tokenizer)} has no end-of-sequence token, at which a reward is read"
        )
    closing = _ids(tokenizer, after)
    return _Layout(tuple(split), (*(closing[: closing.index(end)] if end in closing else closing), end))


def _rendered(tokenizer: Any, roles: tuple[str, ...], *, answering: bool) -> str:
    messages = [{"role": role, "content": _PLACEHOLDER.format(number)} for number, role in enumerate(roles)]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # the template's own errors are jinja's, and whatever its expressions raise
        raise RewardError(f"the chat template of {_name(tokenizer)} refuses {', '.join(roles)}: {error}") from error
    return text


def _texts(rendered: str, contents: int, first: int = 0) -> list[str]:
    """The template's own text before, between and after the contents."""
    parts = _PLACEHOLDERS.split(rendered)
    if [int(number) for number in parts[1::2]] != list(range(first, first + contents)):
        raise RewardError("the chat template leaves out, repeats or reorders what the messages say")
    return parts[::2]


def _split_space(tokenizer: Any, text: str, *, first: bool = False) -> tuple[tuple[int, ...], str]:
    ids, head = _ids(tokenizer, text, first=first), text.rstrip()
    head_ids = _ids(tokenizer, head, first=first)
    # A token may take in the white space that follows it: then there is none left to pass on.
    return (ids, "") if ids == head_ids else (head_ids, text[len(head) :])


def _ids(tokenizer: Any, text: str, *, first: bool = False) -> tuple[int, ...]:
    return tuple(_encode(tokenizer, text, special=True, first=first))


def _encode(tokenizer: Any, text: str, *, special: bool, first: bool = False) -> list[int]:
    if not text or first or not _begins_with_space(tokenizer):
        return _plain_ids(tokenizer, text, special)
    # SentencePiece puts a space before what it tokenises: let it do so before a line break, then drop both.
    head = len(_plain_ids(tokenizer, "\n", special))
    return _plain_ids(tokenizer, "\n" + text, special)[head:]


@lru_cache(maxsize=8)
def _begins_with_space(tokenizer: Any) -> bool:
    first = tokenizer.convert_ids_to_tokens(_plain_ids(tokenizer, "a", special=False))[0]
    return str(first).startswith(("▁", "Ġ"))


def _plain_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)[
        "input_ids"
    ]
    return ids


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "the reward model"
