"""Pairs of completions in rows without a card: TRL's texts and messages, hh-rlhf's dialogues, Alpaca's columns."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from align.data.own_rows import Conversation, Turns, asked_in, filled, instruction, is_answer_text
from align.data.pair_rows import hh_pair, is_hh_dialogue
from align.data.rows import NothingToJudgeBy, Row, asked, refuse_lost_thoughts
from align.errors import UserError
from reward.rows import prompt_column

MAYBE_PROMPTS = ("instruction", "input", "conversations", "conversation", "query", "context")
"""Columns beside which texts are not looked through for a prompt that both begin with."""
LEAST_WORDS = 3
"""Of a prompt that completions are looked through for: an answer may begin with fewer by chance."""


class Pair(NamedTuple):
    """Two completions of a prompt, the better one first, and the columns that the prompt is from besides theirs."""

    prompt: Turns
    chosen: str
    rejected: str
    columns: tuple[str, ...] = ()


def pair_of(row: Row) -> Pair:
    """TRL's forms of preferences: texts or messages, with a prompt of their own or with one that both begin with."""
    texts = [is_answer_text(row, column) for column in ("chosen", "rejected")]
    if texts[0] != texts[1]:
        raise UserError(f"{row.where}: one of chosen and rejected is a text, and the other is not")
    column = "prompt" if filled(row, "prompt") else prompt_column(row.values)
    prompt, columns = asked_in(row, column) if column else Conversation((), ())
    if not texts[0]:
        chosen, rejected = row.conversation("chosen"), row.conversation("rejected")
        if not prompt and not _shared(chosen, rejected):
            prompt, columns = _instructed(row)
        return _pair_of_messages(row, columns, prompt, chosen, rejected)._replace(columns=columns)
    chosen_text, rejected_text = row.filled("chosen"), row.filled("rejected")
    if is_hh_dialogue(chosen_text) and is_hh_dialogue(rejected_text):
        pair = _pair_of_dialogues(row, chosen_text, rejected_text)
        return pair._replace(prompt=_longer_prompt(row, columns, prompt, pair.prompt), columns=columns)
    if not prompt:
        prompt, columns = _instructed(row)
    if not prompt:
        return _pair_of_texts(row, chosen_text, rejected_text)
    return _without_prompt(Pair(prompt, chosen_text, rejected_text, columns))


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
    columns = [column for column in MAYBE_PROMPTS if filled(row, column)]
    read = [column for column in ("instruction", "input") if isinstance(row.values.get(column), str)]
    if other := next((column for column in columns if column not in read), None):
        raise row.error(other, "may be the prompt, and is not read as one: call it prompt, or take it out")
    if not columns:
        return Conversation((), ())
    return instruction(row) if "instruction" in columns else asked_in(row, "input")


def _shared(chosen: Turns, rejected: Turns) -> bool:
    """Whether two conversations differ in their last turn alone."""
    return len(chosen) > 1 and chosen[:-1] == rejected[:-1]


def _longer_prompt(row: Row, columns: Sequence[str], prompt: Turns, shared: Turns) -> Turns:
    """The longer one of the prompt in `columns`, maybe empty, and the turns that both completions begin with. Raises UserError where neither is a part
    of the other."""
    (fewer, more) = sorted(
        ([(turn["role"], turn["content"].split()) for turn in turns] for turns in (prompt, shared)), key=len
    )
    if fewer and fewer not in (more[: len(fewer)], more[-len(fewer) :]):
        raise row.error(
            columns[0], "is another prompt than the one that chosen and rejected begin with: take one of them out"
        )
    return prompt if len(prompt) > len(shared) else shared


def _pair_of_messages(row: Row, columns: Sequence[str], prompt: Turns, chosen: Turns, rejected: Turns) -> Pair:
    if prompt and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if _shared(chosen, rejected):  # the column has the beginning of the conversation alone
            prompt, chosen, rejected = (*prompt, *chosen[:-1]), chosen[-1:], rejected[-1:]
    elif _shared(chosen, rejected):
        prompt, chosen, rejected = _longer_prompt(row, columns, prompt, chosen[:-1]), chosen[-1:], rejected[-1:]
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


def _pair_of_dialogues(row: Row, chosen: str, rejected: str) -> Pair:
    """A pair of hh-rlhf, whose prompt is the dialogue before the last turn."""
    try:
        return Pair(*hh_pair(chosen, rejected))
    except NothingToJudgeBy as reason:
        raise UserError(f"{row.where}: {reason}") from None


def _pair_of_texts(row: Row, chosen: str, rejected: str) -> Pair:
    """A pair whose prompt is what both texts begin with, up to a white space."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = re.sub(r"\S*\Z", "", "".join(character for character, _ in alike))
    if not common.strip() or not chosen[len(common) :] or not rejected[len(common) :]:
        raise UserError(
            f"{row.where}: no column prompt, and chosen and rejected do not begin with one that both complete"
        )
    return Pair(asked(common.strip()), chosen[len(common) :].strip(), rejected[len(common) :].strip())
