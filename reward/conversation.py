"""Token ids of a prompt with its completion, as a reward model reads them: by its own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reward.chat import encode_example
from reward.types import Sample


def messages_of(sample: Sample) -> Sequence[Mapping[str, str]]:
    """The sample's prompt as chat messages: those of its metadata, or else one message of the user."""
    messages: Sequence[Mapping[str, str]] = sample.metadata.get("messages") or ()
    return messages or ({"role": "user", "content": sample.prompt},)


def encode_conversation(tokenizer: Any, messages: Sequence[Mapping[str, str]], completion: str) -> list[int]:
    """The ids of prompt, completion and one end-of-sequence token: those that a reward model is trained on.

    Raises RewardError as `reward.chat.encode_example` does.
    """
    return encode_example(tokenizer, messages, completion)[0]


def shortened(ids: list[int], longest: int, bos: int | None) -> list[int]:
    """The ids, without the oldest of them where there are more than `longest`; the first stays if it is the BOS."""
    if len(ids) <= longest:
        return ids
    head = ids[:1] if ids[0] == bos else []
    return head + ids[len(ids) - longest + len(head) :]
