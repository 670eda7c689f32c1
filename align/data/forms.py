"""The forms in which people have data, told by a row's columns: conversations, problems with a ground truth, pairs of completions.

`FORMS` is the table; of several forms that a row's columns fit, it has the first. A form says what its rows give, and its `read` takes a row
apart; it raises UserError, with file, row and column, for one that cannot be used. Every column that a form does not read reaches rewards
as `reward.rows` says.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from align.data.own_pairs import Pair, pair_of
from align.data.own_rows import (
    Conversation,
    Turns,
    answered,
    asking,
    filled,
    holds_messages,
    instruction,
    is_answer_text,
    with_system,
)
from align.data.rows import Row, level_of, refuse_lost_thoughts
from align.data.types import Example, Preference
from align.errors import UserError
from reward.rows import DOMAIN, PROMPTS, TRUTHS, domain_of, ground_truth_of, metadata_of, prompt_column

Kind = Literal["conversations", "problems", "pairs"]
STAGES: Mapping[Kind, tuple[Literal["sft", "reward_model", "grpo", "eval"], ...]] = {
    "conversations": ("sft", "grpo", "eval"),
    "problems": ("grpo", "eval"),
    "pairs": ("reward_model", "eval"),
}
"""The stages that rows of a kind are for; DPO is for what reward models are for. GRPO and evaluation ask the prompts of conversations, and evaluation
those of pairs: they take no notice of what was answered."""
COMPLETIONS = ("completion", "response")
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
PLACE = re.compile(r"<(?:image|video|audio)>")
ASKING_ROLES = {"system", "developer", "user", "human"}


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
    both = ("chosen", "rejected") if row.values.keys() >= {"chosen", "rejected"} else ()
    empty = [column for column in both if not filled(row, column)]
    for form in FORMS if len(empty) != 1 else ():
        if form.fits(row):
            return form
    for column in (*empty, *PROMPTS, "conversations", "chosen", "rejected"):
        if column in row.values and not filled(row, column):
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
    _refuse_pictures(row, turns)
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
    _refuse_pictures(row, pair.prompt)
    refuse_lost_thoughts(pair.prompt, f"{row.where}: the prompt")
    if filled(row, "tools") and row.json("tools"):
        raise row.error("tools", "has no effect: completions are compared as texts, without tools")
    if pair.chosen == pair.rejected:
        raise UserError(f"{row.where}: the chosen completion is the rejected one too")
    margin = row.number("margin") if row.has("margin") else None
    return Preference(
        id=identity,
        messages=with_system(row, pair.prompt),
        chosen=pair.chosen,
        rejected=pair.rejected,
        domain=domain_of(row.values, domain),
        margin=margin,
        answer=ground_truth_of(row.values),
        metadata=metadata_of(row.values, ("chosen", "rejected", *pair.columns)),
    )


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(filled(row, column) for column in columns)


def _has_prompt_and(columns: Sequence[str]) -> Callable[[Row], bool]:
    return lambda row: prompt_column(row.values) is not None and any(filled(row, column) for column in columns)


def _is_asked_only(row: Row) -> bool:
    """Whether a row's messages are a prompt: only the user's and what stands before them, or, beside a ground truth, some that end by asking."""
    messages = row.values.get("messages")
    with suppress(UserError):
        messages = row.json("messages") if isinstance(messages, str) and holds_messages(messages) else messages
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
        return False
    roles = [str(turn.get("role", turn.get("from"))) for turn in messages]
    has_truth = any(filled(row, column) for column in TRUTHS)
    return ASKING_ROLES.issuperset(roles) or (has_truth and roles[-1] in ASKING_ROLES | {"tool", "observation"})


def _messages_in(column: str, *others: str) -> Callable[[Row], Conversation]:
    return lambda row: Conversation(answered(row, column), (column, *others))


def _alpaca(row: Row) -> Conversation:
    prompt, columns = instruction(row)
    return Conversation((*prompt, {"role": "assistant", "content": row.filled("output")}), columns)


def _completion(row: Row) -> Conversation:
    """TRL's prompt and completion, of texts or of messages."""
    prompt = asking(row)
    column = next(name for name in COMPLETIONS if filled(row, name))
    label = row.values.get("label")
    if label is False or label in ("False", "false"):
        raise row.error("label", f"is false: the {column} is one that is not to be learned from. Take such rows out")
    if is_answer_text(row, column):
        return Conversation((*prompt.turns, {"role": "assistant", "content": row.filled(column)}), prompt.columns)
    turns = answered(row, column)
    if turns[: len(prompt.turns)] == prompt.turns:
        return Conversation(turns, prompt.columns)
    if turns[0]["role"] != "assistant":
        raise row.error(
            column,
            f"must begin with what the assistant says to the prompt in {prompt.columns[0]!r}, or with all of that prompt",
        )
    return Conversation((*prompt.turns, *turns), prompt.columns)


def _refuse_pictures(row: Row, turns: Turns) -> None:
    """Raise UserError for columns of what is no text, and for those of file names that a text has a place for."""
    for column in PICTURES:
        has_place = any(PLACE.search(turn["content"]) for turn in turns)
        if filled(row, column) and (has_place or not isinstance(row.values[column], str)):
            raise row.error(
                column,
                "is for models that see or hear, and models are asked in text here: take such rows out, or the column where the texts do without it",
            )


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    if not filled(row, "tools"):
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
        pair_of,
    ),
    Form(
        "ifeval",
        "problems",
        "prompt, instruction_id_list, kwargs",
        "IFEval",
        _has("prompt", "instruction_id_list"),
        asking,
    ),
    Form("verl", "problems", "prompt, reward_model", "verl", _has("prompt", "reward_model"), asking),
    Form(
        "rlvr",
        "problems",
        "messages that ask only, maybe ground_truth and dataset",
        "open-instruct",
        lambda row: _has("messages")(row) and _is_asked_only(row),
        asking,
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
        asking,
    ),
    Form("prompt", "problems", "prompt, and any others", "TRL", _has("prompt"), asking),
)
