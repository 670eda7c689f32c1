"""Token ids of conversations, in which only the chat template can write a control token.

A template is rendered with placeholders for the contents and cut at them. The template's own text is
tokenised with special tokens recognised and none added, so that the only BOS is its own. Each content is
tokenised apart from it, together with the white space before it, as plain text in which
"<｜end▁of▁sentence｜>" is just letters and punctuation. Texts without such look-alikes get the ids that the
rendered conversation has as a whole, wherever the tokenizer merges nothing over the end of a content.

Added tokens that are not special, such as `<think>`, remain text in what users and systems say; in what an
assistant says they are vocabulary that the model is to write. Added tokens of one character or of white space
only are vocabulary for everybody.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from align.data.types import Message
from align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: a template that looks for something in a content does not find it in these.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000([0-9]+)\ue001")

Ids = tuple[int, ...]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """The ids of the conversation up to where the model answers.

    Raises UserError where the tokenizer has no chat template, or its template has no place for these roles.
    """
    layout = _prompt_layout(tokenizer, _template(tokenizer), tuple(message["role"] for message in messages))
    ids: list[int] = []
    for (before, space), message in zip(layout.before, messages, strict=True):
        ids += before
        ids += encode_text(tokenizer, space + message["content"], assistant=message["role"] == "assistant")
    return ids + list(layout.after)


def encode_example(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], response: str
) -> tuple[list[int], int]:
    """The ids of prompt, response and one end-of-sequence token, and how many of them are the prompt's.

    The prompt's are those of `encode_prompt`. Of what the template writes after a response, nothing is kept
    behind the end-of-sequence token; where there is none, it is appended. Raises UserError as `encode_prompt`
    does, and where the conversation with its response does not begin with the prompt.
    """
    prompt = encode_prompt(tokenizer, messages)
    roles = tuple(message["role"] for message in messages)
    layout = _response_layout(tokenizer, _template(tokenizer), roles)
    ((before, space),) = layout.before
    target = [*before, *encode_text(tokenizer, space + response, assistant=True), *layout.after]
    return prompt + target, len(prompt)


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, assistant: bool = False) -> list[int]:
    """The ids of a content, none of them special; `assistant`: a model wrote it, or is to write it."""
    vocabulary = _vocabulary(tokenizer)
    look_alikes = None if assistant else vocabulary.look_alikes
    ids: list[int] = []
    for piece in _pieces(text, look_alikes):
        ids += _ids(tokenizer, piece, template=False)
    if not vocabulary.special.isdisjoint(ids):
        token = tokenizer.convert_ids_to_tokens(next(id_ for id_ in ids if id_ in vocabulary.special))
        raise UserError(f"the tokenizer reads the control token {token} in a text, where it must stay text")
    return ids


def decode_completion(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int]) -> str:
    """The text of the ids without special tokens, and otherwise as it is: a leading space stays."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def answer_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], token_ids: Sequence[int]) -> str:
    """What a completion says, as the content of the assistant's message: the inverse of `encode_example`.

    The white space that the template puts before an answer, and which the model therefore writes, is not part of it.
    """
    layout = _response_layout(tokenizer, _template(tokenizer), tuple(message["role"] for message in messages))
    ((_, space),) = layout.before
    return decode_completion(tokenizer, token_ids).removeprefix(space)


class _Layout(NamedTuple):
    """What surrounds the contents of a conversation."""

    before: tuple[tuple[Ids, str], ...]
    """For each content: the ids before it, and the white space that is tokenised with it."""
    after: Ids


class _Vocabulary(NamedTuple):
    special: frozenset[int]
    look_alikes: re.Pattern[str] | None
    """Finds where a token begins that is added, not special, and no text in a user's message."""


@lru_cache(maxsize=256)
def _prompt_layout(tokenizer: "PreTrainedTokenizerBase", template: str, roles: tuple[str, ...]) -> _Layout:
    *before, after = _texts(_render(tokenizer, template, roles, answering=True), roles)
    return _Layout(
        before=tuple(_split_space(tokenizer, text, first=i == 0) for i, text in enumerate(before)),
        after=tuple(_ids(tokenizer, after, template=True)),
    )


@lru_cache(maxsize=256)
def _response_layout(tokenizer: "PreTrainedTokenizerBase", template: str, roles: tuple[str, ...]) -> _Layout:
    prompt = _render(tokenizer, template, roles, answering=True)
    answered = (*roles, "assistant")
    whole = _render(tokenizer, template, answered, answering=False)
    _texts(whole, answered)
    if not whole.startswith(prompt):
        raise UserError(
            f"the chat template of {_name(tokenizer)} ends a prompt in {prompt[-40:]!r}, but writes "
            "something else before an answer that is given: demonstrations would train on another prompt "
            "than the model is asked with. Use a template whose conversations begin with their prompts"
        )
    before, _, after = _PLACEHOLDERS.split(whole[len(prompt) :])
    return _Layout(
        before=(_split_space(tokenizer, before),),
        after=_until_end(tokenizer, _ids(tokenizer, after, template=True)),
    )


def _until_end(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> Ids:
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            f"the tokenizer of {_name(tokenizer)} has no eos_token: set it in tokenizer_config.json, or the "
            "model never learns to stop"
        )
    return (*(ids[: ids.index(end)] if end in ids else ids), end)


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"the tokenizer of {_name(tokenizer)} has no chat template (base models have none): put one into "
            "its directory as chat_template.jinja, for example that of the chat model of the same family"
        ) from None
    assert isinstance(template, str)
    return template


def _render(tokenizer: "PreTrainedTokenizerBase", template: str, roles: tuple[str, ...], *, answering: bool) -> str:
    import jinja2

    messages = [{"role": role, "content": _PLACEHOLDER.format(i)} for i, role in enumerate(roles)]
    try:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=answering
        )
    except (jinja2.TemplateError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"the chat template of {_name(tokenizer)} refuses messages of {', '.join(roles)}: {error}"
        ) from error
    assert isinstance(rendered, str)
    return rendered


def _texts(rendered: str, roles: tuple[str, ...]) -> list[str]:
    """The template's own text before, between and after the contents."""
    parts = _PLACEHOLDERS.split(rendered)
    found = [int(number) for number in parts[1::2]]
    if found != list(range(len(roles))):
        lost = [role for i, role in enumerate(roles) if i not in found]
        fault = f"leaves out what the {' and the '.join(lost)} says" if lost else "repeats or reorders messages"
        raise UserError(f"the chat template {fault}, given messages of {', '.join(roles)}")
    return parts[::2]


def _split_space(tokenizer: "PreTrainedTokenizerBase", text: str, *, first: bool = False) -> tuple[Ids, str]:
    ids = tuple(_ids(tokenizer, text, template=True, first=first))
    head = text.rstrip()
    head_ids = tuple(_ids(tokenizer, head, template=True, first=first))
    # A token like Phi's <|user|> takes in the white space that follows: then there is none left to pass on.
    return (ids, "") if ids == head_ids else (head_ids, text[len(head) :])


def _pieces(text: str, look_alikes: re.Pattern[str] | None) -> list[str]:
    """The text cut behind the first character of each look-alike, so that no piece contains one."""
    cuts = [match.start() + 1 for match in look_alikes.finditer(text)] if look_alikes else []
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, template: bool, first: bool = False) -> list[int]:
    if not text:
        return []
    if first or not _begins_with_space(tokenizer):
        return _encode(tokenizer, text, template=template)
    # SentencePiece puts a space before what it tokenises: let it do so before a line break, then drop both.
    break_ids = _encode(tokenizer, "\n", template=template)
    ids = _encode(tokenizer, "\n" + text, template=template)
    if ids[: len(break_ids)] != break_ids:
        raise UserError(
            f"the tokenizer of {_name(tokenizer)} puts a space before each text and merges line breaks with "
            "what follows, so that a conversation cannot be tokenised in parts"
        )
    return ids[len(break_ids) :]


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, *, template: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=not template, verbose=False)["input_ids"]


@lru_cache(maxsize=8)
def _begins_with_space(tokenizer: "PreTrainedTokenizerBase") -> bool:
    first = tokenizer.convert_ids_to_tokens(_encode(tokenizer, "a", template=False))[0]
    return first.startswith(("▁", "Ġ"))


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: "PreTrainedTokenizerBase") -> _Vocabulary:
    added = tokenizer.added_tokens_decoder
    special = {id_ for id_, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    # Text that a vocabulary lacks is an unknown token, where there is one.
    special.discard(tokenizer.unk_token_id)
    guarded = [
        token.content
        for token in added.values()
        if not token.special and len(token.content) > 1 and not token.content.isspace()
    ]
    # Looking ahead finds tokens that overlap, too.
    look_alikes = re.compile(f"(?={'|'.join(map(re.escape, guarded))})") if guarded else None
    return _Vocabulary(frozenset(special), look_alikes)


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return tokenizer.name_or_path or "this model"
