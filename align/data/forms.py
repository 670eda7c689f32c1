"""The forms in which people have data, told by a row's columns: conversations, problems with a ground truth, pairs of completions.

`FORMS` is the table; of several forms that a row's columns fit, it has the first. A form says what its rows give, and its `read` takes a row
apart; it raises UserError, with file, row and column, for one that cannot be used. Every column that a form does not read reaches rewards
as `reward.rows` says.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from align.data.pair_rows import hh_pair
from align.data.rows import ROLES, NothingToJudgeBy, Row, asked, level_of, message_of, refuse_lost_thoughts
from align.data.types import Example, Message, Preference
from align.errors import UserError
from reward.rows import DOMAIN, PROMPTS, TRUTHS, domain_of, ground_truth_of, metadata_of, prompt_column

Kind = Literal["conversations", "problems", "pairs"]
Turns = tuple[Message, ...]
STAGES: Mapping[Kind, tuple[Literal["sft", "reward_model", "grpo", "eval"], ...]] = {
    "conversations": ("sft", "grpo", "eval"),
    "problems": ("grpo", "eval"),
    "pairs": ("reward_model", "eval"),
}
"""The stages that rows of a kind are for; DPO is for what reward models are for. GRPO and evaluation ask the prompts of conversations, and evaluation
those of pairs: they take no notice of what was answered."""
COMPLETIONS = ("completion", "response")
SYSTEM = ("system", "system_prompt")
MAYBE_PROMPTS = ("instruction", "input", "conversations", "conversation", "query", "context")
"""Columns beside which texts are not looked through for a prompt that both begin with."""
HH_START = "\n\nHuman:"
LEAST_WORDS = 3
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']\s*:""")
"""How text begins that holds messages."""
ASKING_ROLES = {"system", "developer", "user", "human"}


class Conversation(NamedTuple):
    """What a row of conversations or problems says: its turns, and the columns that they are from."""

    turns: Turns
    columns: tuple[str, ...]


class Pair(NamedTuple):
    """Two completions of a prompt, the better one first, and the columns that the prompt is from besides theirs."""

    prompt: Turns
    chosen: str
    rejected: str
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Form:
    """A form of rows. `columns` and `source` say in words what its columns are and who publishes such rows."""

    name: str
    kind: Kind
    columns: str
    source: str
    fits: Callable[[Row], bool]
    read: Callable[[Row], Any]
    """Gives a Pair where the kind is pairs, and a Conversation otherwise."""


def form_of(row: Row) -> Form:
    """The form that a row's columns have. Raises UserError where they have none."""
    for form in FORMS:
        if form.fits(row):
            return form
    for column in (*PROMPTS, "conversations", "chosen", "rejected"):
        if column in row.values and not _filled(row, column):
            raise UserError(f"{row.where}: column {column!r} is empty")
    raise UserError(
        f"{row.where}: its columns ({', '.join(row.values) or 'none'}) have no form that is known. Known are "
        + "; ".join(f"{form.columns} ({form.name})" for form in FORMS)
    )


def example_of(form: Form, row: Row, identity: str, domain: str = DOMAIN) -> Example:
    """A row of conversations or problems as an example, of `domain` where it names none. Raises UserError where it cannot be used."""
    turns, columns = conversation_of(form, row)
    demonstrated, last = form.kind == "conversations", len(turns)
    if demonstrated:
        last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    # What nobody has answered is asked whole, and SFT learns from the answers before it.
    prompt = turns if turns[-1]["role"] in ("user", "tool") else turns[:last]
    if not any(turn["role"] == "user" for turn in prompt):
        raise UserError(f"{row.where}: no message of the user comes before the {'answer' if demonstrated else 'end'}")
    return Example(
        id=identity,
        messages=prompt,
        response=turns[last]["content"] if demonstrated else None,
        answer=ground_truth_of(row.values),
        domain=domain_of(row.values, domain),
        level=level_of(row.values.get("level")),
        metadata=metadata_of(row.values, columns),
        conversation=turns[: last + 1] if demonstrated else (),
        tools=_tools(row),
    )


def conversation_of(form: Form, row: Row) -> Conversation:
    """The turns of a row of conversations or problems, a system message of another column before them. Raises UserError where it cannot be used."""
    turns, columns = form.read(row)
    return Conversation(with_system(row, turns), columns)


def preference_of(form: Form, row: Row, identity: str, domain: str = DOMAIN) -> Preference:
    """A row of pairs as a preference, of `domain` where it names none. Raises UserError where it cannot be used."""
    pair: Pair = form.read(row)
    refuse_lost_thoughts(pair.prompt, f"{row.where}: the prompt")
    if _filled(row, "tools") and row.json("tools"):
        raise row.error("tools", "has no effect: completions are compared as texts, without tools")
    if pair.chosen == pair.rejected:
        raise UserError(f"{row.where}: the chosen completion is the rejected one too")
    margin = row.number("margin") if row.has("margin") else None
    return Preference(
        identity, with_system(row, pair.prompt), pair.chosen, pair.rejected, domain_of(row.values, domain), margin
    )


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(_filled(row, column) for column in columns)


def _filled(row: Row, column: str) -> bool:
    return row.has(column) and row.values[column] != []


def _has_prompt_and(columns: Sequence[str]) -> Callable[[Row], bool]:
    return lambda row: prompt_column(row.values) is not None and any(_filled(row, column) for column in columns)


def _is_asked_only(row: Row) -> bool:
    """Whether a row's messages are a prompt: only the user's and what stands before them, or, beside a ground truth, some that end by asking."""
    messages = row.values.get("messages")
    with suppress(UserError):
        messages = row.json("messages") if isinstance(messages, str) and holds_messages(messages) else messages
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
        return False
    roles = [str(turn.get("role", turn.get("from"))) for turn in messages]
    has_truth = any(_filled(row, column) for column in TRUTHS)
    return ASKING_ROLES.issuperset(roles) or (has_truth and roles[-1] in ASKING_ROLES | {"tool", "observation"})


def _answered(row: Row, column: str) -> Turns:
    """The turns in a column, of which one is the assistant's."""
    turns = row.conversation(column)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise row.error(column, "has no turn of the assistant to learn from")
    return turns


def _messages_in(column: str, *others: str) -> Callable[[Row], Conversation]:
    return lambda row: Conversation(_answered(row, column), (column, *others))


def _alpaca(row: Row) -> Conversation:
    prompt, columns = _instruction(row)
    return Conversation((*prompt, {"role": "assistant", "content": row.filled("output")}), columns)


def _instruction(row: Row) -> Conversation:
    """What Alpaca's columns ask, after the turns before it."""
    instruction, more = row.filled("instruction"), row.text("input", empty=True) if "input" in row.values else ""
    prompt = f"{instruction}\n\n{more}" if more.strip() else instruction
    return Conversation((*_history(row), *asked(prompt)), ("instruction", "input", "system", "history"))


def _history(row: Row) -> Turns:
    """The turns before, in LLaMA-Factory's column `history`: pairs of what was asked and answered."""
    if not _filled(row, "history"):
        return ()
    history = row.json("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise row.error("history", f"must be a list of pairs of texts, asked and answered, not {history!r:.40}")
    said = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return tuple(message_of({"role": role, "content": text}, f"{row.where}: column 'history'") for role, text in said)


def _completion(row: Row) -> Conversation:
    """TRL's prompt and completion, of texts or of messages."""
    prompt = _asking(row)
    column = next(name for name in COMPLETIONS if _filled(row, name))
    if _is_answer_text(row, column):
        return Conversation((*prompt.turns, {"role": "assistant", "content": row.filled(column)}), prompt.columns)
    return Conversation((*prompt.turns, *_answered(row, column)), prompt.columns)


def _asking(row: Row) -> Conversation:
    """A prompt: a text, or messages of which the last is the user's or a tool's result."""
    column = prompt_column(row.values)
    if column is None:
        raise UserError(f"{row.where}: no column with a prompt ({', '.join(PROMPTS)})")
    if column == "messages" and isinstance(row.values.get("prompt"), str):
        raise UserError(f"{row.where}: both prompt and messages; give one of them")
    return _asked_in(row, column)


def _asked_in(row: Row, column: str) -> Conversation:
    if isinstance(row.values[column], str) and not holds_messages(row.values[column]):
        return Conversation(asked(row.filled(column)), (column,))
    turns = row.conversation(column)
    if turns[-1]["role"] not in ("user", "tool"):
        raise row.error(column, f"must end with a message of the user, not of the {turns[-1]['role']}")
    return Conversation(turns, (column,))


def _is_answer_text(row: Row, column: str) -> bool:
    """Whether a column of answers holds a text, and not the JSON text of whole messages; an answer may be other JSON."""
    value = row.values[column]
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return isinstance(value, str)
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return True
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


def _pair(row: Row) -> Pair:
    """TRL's forms of preferences: texts or messages, with a prompt of their own or with one that both begin with."""
    texts = [_is_answer_text(row, column) for column in ("chosen", "rejected")]
    if texts[0] != texts[1]:
        raise UserError(f"{row.where}: one of chosen and rejected is a text, and the other is not")
    column = "prompt" if _filled(row, "prompt") else prompt_column(row.values)
    prompt, columns = _asked_in(row, column) if column else Conversation((), ())
    if not texts[0]:
        chosen, rejected = row.conversation("chosen"), row.conversation("rejected")
        if not prompt and not _shared(chosen, rejected):
            prompt, columns = _instructed(row)
        return _pair_of_messages(row, prompt, chosen, rejected)._replace(columns=columns)
    chosen_text, rejected_text = row.filled("chosen"), row.filled("rejected")
    if prompt:
        return Pair(prompt, chosen_text, rejected_text, columns)
    if not all(text.startswith(HH_START) for text in (chosen_text, rejected_text)):
        prompt, columns = _instructed(row)
    return _without_prompt(Pair(prompt, chosen_text, rejected_text, columns)) if prompt else _pair_of_texts(row)


def _without_prompt(pair: Pair) -> Pair:
    """The pair with completions that do not repeat its prompt, where both do: one of several words, so that no answer begins with it by chance."""
    asked_text = pair.prompt[-1]["content"]
    said = [text.removeprefix(asked_text) for text in (pair.chosen, pair.rejected)]
    if len(asked_text.split()) < LEAST_WORDS or not all(text[:1].isspace() and text.strip() for text in said):
        return pair
    return pair._replace(chosen=said[0].strip(), rejected=said[1].strip())


def _instructed(row: Row) -> Conversation:
    """The prompt of a pair in Alpaca's columns, or in distilabel's `input`; without turns where there is none. Raises UserError beside other columns that
    may be a part of it."""
    columns = [column for column in MAYBE_PROMPTS if _filled(row, column)]
    read = [column for column in ("instruction", "input") if isinstance(row.values.get(column), str)]
    if other := next((column for column in columns if column not in read), None):
        raise row.error(other, "may be the prompt, and is not read as one: call it prompt, or take it out")
    if not columns:
        return Conversation((), ())
    return _instruction(row) if "instruction" in columns else _asked_in(row, "input")


def _shared(chosen: Turns, rejected: Turns) -> bool:
    """Whether two conversations differ in their last turn alone."""
    return len(chosen) > 1 and chosen[:-1] == rejected[:-1]


def _pair_of_messages(row: Row, prompt: Turns, chosen: Turns, rejected: Turns) -> Pair:
    if prompt and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif _shared(chosen, rejected):
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    for column, turns in (("chosen", chosen), ("rejected", rejected)):
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise row.error(column, "must be one message of the assistant after the prompt that both completions share")
        if turns[0].get("tool_calls"):
            raise row.error(column, "calls a tool, and completions are compared as texts")
        refuse_lost_thoughts(turns, f"{row.where}: column {column!r}")
    if not any(turn["role"] == "user" for turn in prompt):
        raise UserError(
            f"{row.where}: chosen and rejected have no prompt of the user in common, and there is no column prompt"
        )
    return Pair(prompt, chosen[0]["content"], rejected[0]["content"])


def _pair_of_texts(row: Row) -> Pair:
    """A pair whose prompt is what both texts begin with, up to a white space; of hh-rlhf, the dialogue before the last turn."""
    chosen, rejected = row.filled("chosen"), row.filled("rejected")
    if chosen.startswith(HH_START) and rejected.startswith(HH_START):
        try:
            return Pair(*hh_pair(chosen, rejected))
        except NothingToJudgeBy as reason:
            raise UserError(f"{row.where}: {reason}") from None
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = re.sub(r"\S*\Z", "", "".join(character for character, _ in alike))
    if not common.strip() or not chosen[len(common) :] or not rejected[len(common) :]:
        raise UserError(
            f"{row.where}: no column prompt, and chosen and rejected do not begin with one that both complete"
        )
    return Pair(asked(common.strip()), chosen[len(common) :].strip(), rejected[len(common) :].strip())


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    if not _filled(row, "tools"):
        return ()
    tools = row.json("tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise row.error("tools", f"must be a list of objects, or the JSON text of one, not {tools!r:.40}")
    # LLaMA-Factory's rows have the functions alone.
    return tuple(
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    )


FORMS: Sequence[Form] = (
    Form(
        "preferences",
        "pairs",
        "chosen, rejected, maybe prompt or instruction",
        "TRL, UltraFeedback, hh-rlhf, LLaMA-Factory",
        _has("chosen", "rejected"),
        _pair,
    ),
    Form(
        "ifeval",
        "problems",
        "prompt, instruction_id_list, kwargs",
        "IFEval",
        _has("prompt", "instruction_id_list"),
        _asking,
    ),
    Form("verl", "problems", "prompt, reward_model", "verl", _has("prompt", "reward_model"), _asking),
    Form(
        "rlvr",
        "problems",
        "messages that ask only, maybe ground_truth and dataset",
        "open-instruct",
        lambda row: _has("messages")(row) and _is_asked_only(row),
        _asking,
    ),
    Form("messages", "conversations", "messages", "OpenAI, TRL", _has("messages"), _messages_in("messages")),
    Form(
        "sharegpt",
        "conversations",
        "conversations, maybe system",
        "ShareGPT",
        _has("conversations"),
        _messages_in("conversations", "system"),
    ),
    Form(
        "alpaca",
        "conversations",
        "instruction, output, maybe input and system",
        "Alpaca",
        _has("instruction", "output"),
        _alpaca,
    ),
    Form(
        "completion",
        "conversations",
        "prompt, completion or response",
        "TRL",
        _has_prompt_and(COMPLETIONS),
        _completion,
    ),
    Form(
        "problem",
        "problems",
        "problem, question or prompt with answer, ground_truth or solution",
        "MATH, GSM8K",
        _has_prompt_and(TRUTHS),
        _asking,
    ),
    Form("prompt", "problems", "prompt, and any others", "TRL", _has("prompt"), _asking),
)
