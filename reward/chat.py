"""Token ids of conversations: those of the chat template's own rendering, in which nobody forges a control token.

The template renders the real messages, and the rendering is tokenised as a whole with special tokens recognised and none
added, as inference servers do. Where a content spells out a control token ("<｜end▁of▁sentence｜>"), the rendering is cut
behind that token's first character, so that it stays letters and punctuation. A rendering whose control tokens are not
those that the template writes around placeholders is looked through in the same way. A template that asks for today's date is
told the same one every day.

Added tokens that are not special, such as `<tool_call>`, remain text in what users and systems say; in what an assistant
says they are vocabulary, and so are `<think>` and `</think>`, whatever they are called in the tokenizer's files. Added tokens
of one character or of white space only are vocabulary for everybody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

from reward.provenance import ASSISTANT, TEMPLATE, render_with_authors
from reward.types import RewardError
from reward.vocabulary import decode_completion, encode, name_of, vocabulary_of

# Private-use characters: a template that looks for something in a content does not find it in these.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000([0-9]+)\ue001")
_OPENED_THOUGHT = re.compile(r"<think>\s*\Z")
_TWO_THOUGHTS = re.compile(r"</think>\s*<think>")
TODAY = datetime(2026, 1, 1)
"""The date that templates are told, see `_date`."""

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
"""What a model may call, as JSON schemas."""


def encode_prompt(tokenizer: Any, messages: Messages, tools: Tools = ()) -> list[int]:
    """The ids of the conversation up to where the model answers.

    Raises RewardError where the tokenizer has no chat template, or its template has no place for these messages.
    """
    return _tokenised(tokenizer, messages, tools, answering=True).ids


def encode_conversation(
    tokenizer: Any, messages: Messages, trained: Collection[int], tools: Tools = ()
) -> list[tuple[list[int], list[bool]]]:
    """The sequences of ids that answers of a conversation are learned from, and for each id whether it belongs to one of these answers.

    `trained` are the places of the answers in `messages`. Prompt and answer are always those of `encode_example`. One sequence holds all answers
    where each continues in the prompt of the next; where a template writes earlier turns otherwise, such as without their thoughts, a new
    sequence begins. Raises RewardError as `encode_example` does.
    """
    sequences: list[tuple[list[int], list[bool]]] = []
    for place in sorted(trained):
        ids, length = encode_example(tokenizer, messages[:place], messages[place], tools)
        before, learned = sequences[-1] if sequences else ([], [])
        if sequences and ids[: min(len(before), length)] == before:
            sequences.pop()
        else:
            learned = []
        sequences.append((ids, [*learned, *[False] * (length - len(learned)), *[True] * (len(ids) - length)]))
    return sequences


def encode_example(
    tokenizer: Any, messages: Messages, response: str | Mapping[str, Any], tools: Tools = ()
) -> tuple[list[int], int]:
    """The ids of prompt, response (a text, or an assistant's message) and the token that ends it, and how many of them are the prompt's.

    The prompt's are those of `encode_prompt`; the others are what the template renders for a response, white space and
    thoughts included, up to the token of `end_of_answer`, which is appended where the template writes none. Raises RewardError as
    `encode_prompt` does, where nothing could end a response, and where the conversation with its response does not begin with
    the prompt.
    """
    answer = {"role": "assistant", "content": response} if isinstance(response, str) else response
    asked = _tokenised(tokenizer, messages, tools, answering=True)
    text, ids = _tokenised(tokenizer, [*messages, answer], tools, answering=False, prompt=asked)
    end_of_prompt = max(0, len(asked.text.rstrip()) - len("</think>"))
    if _TWO_THOUGHTS.search(text, end_of_prompt) and not _TWO_THOUGHTS.search(answer["content"]):
        raise _fault(
            tokenizer,
            "writes an empty thought before the thought of a response: take the thought out, or use a template that finds "
            "it in the response",
        )
    length = len(asked.ids)
    around = _surroundings(tokenizer, _template(tokenizer, tools), _shape(messages, tools))
    if around.end is None:
        raise RewardError(
            f"the tokenizer of {name_of(tokenizer)} has no eos_token: set it in tokenizer_config.json, or the model never "
            "learns to stop"
        )
    ends = [place for place in range(length, len(ids)) if ids[place] == around.end]
    return [*(ids[: ends[-around.ends]] if 0 < around.ends <= len(ends) else ids), around.end], length


def encode_finished(tokenizer: Any, messages: Messages) -> list[int]:
    """The ids of a whole conversation, with what the template writes behind its last turn. Raises RewardError as `encode_prompt` does."""
    return _tokenised(tokenizer, messages, (), answering=False).ids


def end_of_answer(tokenizer: Any) -> int | None:
    """The token that ends an answer in the chat template's rendering: the end of sequence, or the template's own end of turn.

    Where the template writes neither, or there is no template, it is the tokenizer's end of sequence. Raises RewardError where the
    template cannot be rendered.
    """
    if not tokenizer.chat_template:
        end: int | None = tokenizer.eos_token_id
        return end
    return _surroundings(tokenizer, _template(tokenizer), _shape([{"role": "user", "content": "?"}])).end


def answer_text(tokenizer: Any, messages: Messages, token_ids: Sequence[int], tools: Tools = ()) -> str:
    """What a completion says, as the content of the assistant's message: the inverse of `encode_example`, but for special tokens that mark a tool call,
    which no content can write.

    What the template itself writes around an answer, and which the model therefore writes (white space, an empty thought),
    is not part of it. A thought that the prompt opens is: "<think>" stands at the head of the text.
    """
    template = _template(tokenizer, tools)
    around = _surroundings(tokenizer, template, _shape(messages, tools))
    # What a message says may open or close the thought of the prompt ("/no_think").
    opened = _opened_thought(_render(tokenizer, template, messages, tools, True))
    # The token that ends an answer need not be a special one.
    ids = token_ids[:-1] if len(token_ids) and token_ids[-1] == around.end else token_ids
    said = opened + decode_completion(tokenizer, ids)
    if around.before is None or opened != around.opened:
        return said
    before = opened + around.before
    # Of an answer that has only begun nothing is said yet.
    return "" if before.startswith(said) else said.removeprefix(before).removesuffix(around.after)


class _Tokenised(NamedTuple):
    """A rendering, and its ids or some of them."""

    text: str
    ids: list[int]


class _Shape(NamedTuple):
    """A conversation without what is said in it: each message as JSON, true in the place of its content, and the tools."""

    turns: tuple[str, ...]
    tools: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages with a placeholder for each content; a message that only calls tools has none."""
        turns = [json.loads(turn) for turn in self.turns]
        return [turn | {"content": _PLACEHOLDER.format(i) if turn["content"] else ""} for i, turn in enumerate(turns)]

    def answered(self) -> _Shape:
        """The same with an assistant's answer behind it."""
        return _Shape((*self.turns, json.dumps({"role": "assistant", "content": True})), self.tools)


class _Surroundings(NamedTuple):
    """What a template writes around an answer."""

    opened: str
    """The opening of a thought at the end of the prompt; "" where there is none."""
    before: str | None
    """Its text between the prompt and an answer; None where it renders no answer that continues the prompt."""
    after: str
    end: int | None
    """The token that ends an answer; None where the template writes none and the tokenizer has none."""
    ends: int
    """How often the template writes that token after the answer."""


def _tokenised(
    tokenizer: Any, messages: Messages, tools: Tools, *, answering: bool, prompt: _Tokenised | None = None
) -> _Tokenised:
    """The rendering of the messages; where it continues a prompt, the prompt's ids are the first of its ids."""
    prompt = prompt or _Tokenised("", [])
    template, vocabulary, shape = _template(tokenizer, tools), vocabulary_of(tokenizer), _shape(messages, tools)
    if forged := vocabulary.found_special.search("".join((*shape.turns, shape.tools))):
        raise RewardError(f"tools or their calls spell out the control token {forged[0]}: take it out of them")
    outline = _outline(tokenizer, template, shape, answering)
    text = _render(tokenizer, template, messages, tools, answering)
    if not text.startswith(prompt.text):
        raise _not_continued(tokenizer, messages, tools, prompt.text)
    start = len(prompt.text)
    if prompt.ids and prompt.ids[-1] in vocabulary.swallowing:
        start += len(text) - start - len(text[start:].lstrip())
    if not any(
        (vocabulary.found_special if message["role"] == "assistant" else vocabulary.found).search(message["content"])
        for message in messages
    ):
        ids = prompt.ids + encode(tokenizer, text[start:], first=start == 0)
        if [id_ for id_ in ids if id_ in vocabulary.control] == outline.ids:
            return _Tokenised(text, ids)
    cuts = [cut for cut in _cuts(tokenizer, template, messages, tools, answering, text) if cut > start]
    new: list[int] = []
    written = []
    for begin, end in pairwise([start, *cuts, len(text)]):
        new += encode(tokenizer, text[begin:end], first=begin == 0)
        written += [match[0] for match in vocabulary.found.finditer(text[begin:end]) if match[0] in vocabulary.special]
    special = {id_: token for token, id_ in vocabulary.special.items()}
    read = [special[id_] for id_ in new if id_ in special]
    if read != written:
        raise _forged(next(token or "" for token, known in zip_longest(read, written) if token != known))
    return _Tokenised(text, prompt.ids + new)


def _cuts(tokenizer: Any, template: str, messages: Messages, tools: Tools, answering: bool, text: str) -> list[int]:
    """Where to cut the rendering, so that its control tokens are the template's."""
    vocabulary = vocabulary_of(tokenizer)
    variables = {**tokenizer.special_tokens_map, **_date(template)}
    same, author = render_with_authors(
        template, messages, tools=list(tools) or None, add_generation_prompt=answering, **variables
    )
    if same != text:
        raise _fault(
            tokenizer,
            "changes what a message says in a way that cannot be followed, and the message spells out control tokens: "
            "take them out of it",
        )
    cuts = set()
    for match in vocabulary.overlapping.finditer(text):
        places = range(match.start(1), match.end(1))
        authors = {author(place) for place in places if not text[place].isspace()}
        if authors == {TEMPLATE} or (authors == {ASSISTANT} and match[1] not in vocabulary.special):
            continue
        if len(places) == 1:
            raise _forged(match[1])
        cuts.add(max(places[1], next(place for place in places if author(place) != TEMPLATE)))
    return sorted(cuts)


@lru_cache(maxsize=256)
def _outline(tokenizer: Any, template: str, shape: _Shape, answering: bool) -> _Tokenised:
    """The rendering of placeholders, and the ids of the control tokens in it. Raises RewardError where something is left out."""
    messages = shape.messages
    tools = json.loads(shape.tools)
    text = _render(tokenizer, template, messages, tools, answering)
    found = {int(number) for number in _PLACEHOLDERS.findall(text)}
    lost = [turn["role"] for i, turn in enumerate(messages) if turn["content"] and i not in found]
    if lost:
        said = f"what the {' and the '.join(lost)} says"
        raise _fault(tokenizer, f"leaves out {said}, given messages of {_roles(messages)}")
    if tools and _renders_alike(tokenizer, template, messages, (), answering, text):
        raise _fault(tokenizer, "leaves out the tools; take one that has a place for them")
    for place, turn in enumerate(messages):
        calls = turn.get("tool_calls") or ()
        for number in range(len(calls)):
            fewer = {**turn, "tool_calls": [*calls[:number], *calls[number + 1 :]]}
            without = [*messages[:place], fewer, *messages[place + 1 :]]
            if _renders_alike(tokenizer, template, without, tools, answering, text):
                raise _fault(tokenizer, "leaves out what an assistant calls")
    control = vocabulary_of(tokenizer).control
    return _Tokenised(text, [id_ for id_ in encode(tokenizer, text) if id_ in control])


def _renders_alike(tokenizer: Any, template: str, messages: Messages, tools: Tools, answering: bool, text: str) -> bool:
    """Whether messages and tools are rendered as this text; a template that cannot do without what they lack renders them otherwise."""
    try:
        return _render(tokenizer, template, messages, tools, answering) == text
    except RewardError:
        return False


@lru_cache(maxsize=256)
def _surroundings(tokenizer: Any, template: str, shape: _Shape) -> _Surroundings:
    prompt = _outline(tokenizer, template, shape, True).text
    opened = _opened_thought(prompt)
    try:
        whole = _outline(tokenizer, template, shape.answered(), False).text
    except RewardError:
        return _Surroundings(opened, None, "", tokenizer.eos_token_id, 0)
    before, _, after = whole.rpartition(_PLACEHOLDER.format(len(shape.turns)))
    after_ids = encode(tokenizer, after, first=False)
    end, added = tokenizer.eos_token_id, tokenizer.added_tokens_decoder
    if end not in after_ids:
        end = next((id_ for id_ in reversed(after_ids) if id_ in added and not added[id_].content.isspace()), end)
    ends = after_ids.count(end)
    if ends:
        after_ids = after_ids[: after_ids.index(end)]
    between = None
    if before.startswith(prompt):
        between = decode_completion(tokenizer, encode(tokenizer, before[len(prompt) :], first=False))
    return _Surroundings(opened, between, decode_completion(tokenizer, after_ids), end, ends)


def _opened_thought(prompt: str) -> str:
    opened = _OPENED_THOUGHT.search(prompt)
    return opened[0] if opened else ""


def _fault(tokenizer: Any, what: str) -> RewardError:
    return RewardError(f"the chat template of {name_of(tokenizer)} {what}")


def _not_continued(tokenizer: Any, messages: Messages, tools: Tools, asked: str) -> RewardError:
    thoughtful = [*messages[:-1], {"role": "assistant", "content": "<think>\nx\n</think>\n\nx"}]
    if not _opened_thought(asked):
        why = (
            "demonstrations would train on another prompt than the model is asked with. Use a template whose conversations "
            "begin with their prompts"
        )
    elif _render(tokenizer, _template(tokenizer, tools), thoughtful, tools, False).startswith(asked):
        why = "the prompt opens a thought, so each response needs one, <think>...</think>, first"
    else:
        why = (
            "the prompt opens a thought, and the template leaves the thoughts of responses out. The model can be sampled "
            "from (GRPO, eval, chat), but demonstrations and preferences need a template that keeps them"
        )
    end = f"ends a prompt in {asked[-40:]!r}, but writes something else before an answer that is given"
    return _fault(tokenizer, f"{end}: {why}")


def _forged(token: str) -> RewardError:
    return RewardError(f"the tokenizer reads the control token {token} in a text, where it must stay text")


def _template(tokenizer: Any, tools: Tools = ()) -> str:
    try:
        # Of several templates, one is for conversations with tools.
        template: str = tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError:
        raise RewardError(
            f"the tokenizer of {name_of(tokenizer)} has no chat template (base models have none): put one into "
            "its directory as chat_template.jinja, for example that of the chat model of the same family"
        ) from None
    except NotImplementedError:
        raise RewardError(
            f"the tokenizer of {name_of(tokenizer)} is a {type(tokenizer).__name__}, which keeps its chat template to itself: "
            "load it with AutoTokenizer.from_pretrained(..., mistral_format=False)"
        ) from None
    return template


def _render(tokenizer: Any, template: str, messages: Messages, tools: Tools, answering: bool) -> str:
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=answering,
            **_date(template),
        )
    except Exception as error:  # the template's own errors are jinja's, and whatever its expressions raise
        raise _fault(tokenizer, f"refuses messages of {_roles(messages)}: {error}") from error
    return rendered


def _date(template: str) -> dict[str, Any]:
    """The date for a template that writes today's: always the same, so that a prompt has the same tokens when the run goes on tomorrow."""
    return {"strftime_now": TODAY.strftime} if "strftime_now" in template else {}


def _shape(messages: Messages, tools: Tools = ()) -> _Shape:
    turns = (
        message | {"content": bool(message["content"] or "tool_calls" not in message)}
        for message in map(dict, messages)
    )
    return _Shape(
        tuple(json.dumps(turn, ensure_ascii=False) for turn in turns), json.dumps([*tools], ensure_ascii=False)
    )


def _roles(messages: Messages) -> str:
    return ", ".join(message["role"] for message in messages)
