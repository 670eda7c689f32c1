"""A tokenizer as conversations need it: its control tokens, the ids of a text that stands behind another, and the text of ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from reward.types import RewardError

_THOUGHT = ("<think>", "</think>")
_CALL = re.compile(r"(tool|function).?(call|sep)|python_tag|_ACTION", re.IGNORECASE)
"""Finds a special token that marks a tool call, such as "[TOOL_CALLS]", "<|python_tag|>" or "<｜tool▁call▁begin｜>"."""


CUT_BY_RULES = " 1.  17\n\n2. It's 2024,\n\t  don't  BE2b…\r\nÄpfel नमस्ते e\u0301 漢字 🙂  "
"""What tokenizers of one vocabulary cut into different tokens where their rules differ. It begins with a space, so that `add_prefix_space` makes no
difference."""


class Vocabulary(NamedTuple):
    """The control tokens of a tokenizer; `special` ones have their texts as keys."""

    special: Mapping[str, int]
    control: frozenset[int]
    """The special tokens, and the added ones that are no text in a user's message."""
    part_of_answers: frozenset[int]
    """Special tokens that mark thoughts and tool calls."""
    swallowing: frozenset[int]
    """Tokens that take in the white space behind them."""
    found: re.Pattern[str]
    """Finds control tokens, the longest first."""
    found_special: re.Pattern[str]
    overlapping: re.Pattern[str]
    """Finds where a control token begins, in another one too; it is group 1."""


@lru_cache(maxsize=8)
def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The control tokens of a tokenizer."""
    added = tokenizer.added_tokens_decoder
    # Text that a vocabulary lacks is an unknown token, where there is one.
    ids = {id_ for id_, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    texts = {tokenizer.convert_ids_to_tokens(id_): id_ for id_ in ids - {tokenizer.unk_token_id}}
    special = {text: id_ for text, id_ in texts.items() if text not in _THOUGHT}
    guarded = {
        token.content: id_
        for id_, token in added.items()
        if len(token.content) > 1 and not token.content.isspace() and id_ != tokenizer.unk_token_id
    }
    every = _any_of(special | guarded)
    return Vocabulary(
        special,
        frozenset((special | guarded).values()),
        frozenset(id_ for text, id_ in texts.items() if text in _THOUGHT or _CALL.search(text)),
        frozenset(id_ for id_, token in added.items() if token.rstrip),
        re.compile(every),
        re.compile(_any_of(special)),
        re.compile(f"(?=({every}))"),
    )


def _any_of(tokens: Mapping[str, int]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"


def encode(tokenizer: Any, text: str, *, first: bool = True) -> list[int]:
    """The ids of a text that is the first part of a rendering or, without `first`, a later one.

    Raises RewardError for what no tokenizer reads, and where this one can read no part by itself.
    """
    if not text or first or not _begins_with_space(tokenizer):
        return _read(tokenizer, text)
    # SentencePiece puts a space before what it tokenises: let it do so before a line break, then drop both.
    head = _read(tokenizer, "\n")
    ids = _read(tokenizer, "\n" + text)
    if ids[: len(head)] != head:
        raise RewardError(
            f"the tokenizer of {name_of(tokenizer)} puts a space before each text and merges line breaks with "
            "what follows, so that a conversation cannot be tokenised in parts"
        )
    return ids[len(head) :]


def _read(tokenizer: Any, text: str) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"])
    except TypeError as error:  # all that tokenizers says of it
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RewardError("a text holds half of a surrogate pair, which no tokenizer reads") from error
        raise


@lru_cache(maxsize=8)
def _begins_with_space(tokenizer: Any) -> bool:
    return str(tokenizer.convert_ids_to_tokens(_read(tokenizer, "a"))[0]).startswith(("▁", "Ġ"))


def decode_completion(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of the ids without special tokens but those of thoughts and tool calls, and otherwise as it is: a leading space stays."""
    kept = vocabulary_of(tokenizer).part_of_answers
    parts = groupby(token_ids, kept.__contains__) if kept else [(False, token_ids)]
    return "".join(
        tokenizer.decode(list(ids), skip_special_tokens=not said, clean_up_tokenization_spaces=False)
        for said, ids in parts
    )


def name_of(tokenizer: Any) -> str:
    """What a message calls the tokenizer's model."""
    return getattr(tokenizer, "name_or_path", "") or "this model"


def as_its_file_says(tokenizer: Any, path: str | Path) -> Any:
    """A tokenizer that cuts text as its `tokenizer.json` says where that is a byte-level one.

    The class that `tokenizer_config.json` names may build another from the same vocabulary: "GPT2Tokenizer" in SmolLM2's drops the splitting of numbers,
    and "LlamaTokenizerFast" beside an adapter of DeepSeek-V2, without a `config.json`, all of it.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    if not builds_its_rules(type(tokenizer)):
        return tokenizer
    file = cached_file(str(path), "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    in_file = Tokenizer.from_file(file) if file else None
    if in_file is None or "ByteLevel" not in str(in_file.pre_tokenizer):
        return tokenizer
    in_file.no_padding()
    in_file.no_truncation()
    ids = tokenizer(CUT_BY_RULES, add_special_tokens=False)["input_ids"]
    if ids == in_file.encode(CUT_BY_RULES, add_special_tokens=False).ids:
        return tokenizer
    kept = {"model_input_names": tokenizer.model_input_names, **tokenizer.special_tokens_map}
    return PreTrainedTokenizerFast.from_pretrained(str(path), **kept)


def builds_its_rules(kind: type | None) -> bool:
    """Whether a class of transformers' tokenizers has rules of its own, by which it cuts text in the place of those in `tokenizer.json`: some of
    version 5 have."""
    from transformers import TokenizersBackend

    if kind in (None, TokenizersBackend):
        return False
    if kind.__module__.startswith("transformers_modules"):  # of code that a model brings
        return False
    return issubclass(kind, TokenizersBackend) and "__init__" in vars(kind)
