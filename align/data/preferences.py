"""The preferences of a split of a data card, held apart from what reward models will be evaluated on."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from align.data.cards import DataCard, FileSource, GeneratorSource, HubSource
from align.data.code_rows import NothingToJudgeBy, Row
from align.data.generators import generator
from align.data.loader import first, generated, held_together, nothing_left, own_held_out, without
from align.data.preference_fields import (
    ChosenRejected,
    HhDialogues,
    NumberedResponses,
    PreferenceFields,
    SignedResponses,
)
from align.data.tables import check_unicode, normalised, percentile, table_rows
from align.data.types import Message, Preference, Role, SplitName
from align.errors import UserError

_log = logging.getLogger(__name__)

ROLES = get_args(Role)
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES: Mapping[str, Role] = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class LoadedPreferences:
    """The preferences of a split, and how they were held apart from the other splits."""

    preferences: list[Preference]
    dropped_contaminated: int = 0
    """Preferences left out since their prompt occurs in something that is held out from this split."""
    unchecked: tuple[SplitName, ...] = ()
    """Held-out splits that could not be compared, because `path` gave one file only."""
    compared: Mapping[str, int] = field(default_factory=dict)
    """What was compared, such as "pku_saferlhf/test", with how many of the dropped preferences occur in it."""
    prompts: frozenset[str] = frozenset()
    """Every prompt of the split, those that were dropped too, as prompts are compared."""


def load_preferences(
    card: DataCard,
    split: SplitName,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
    held_out: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> LoadedPreferences:
    """The preferences of `split`, in the order of the source, or `limit` of them after a shuffle by `seed`.

    Those whose prompt, the whole conversation, occurs in what is held out from this split are dropped and counted first.
    The arguments are those of `align.data.loader.load_split`. Raises UserError, with file and row, for a row that cannot
    be used, and when nothing is left.
    """
    local = Path(path) if path is not None else None
    overrides = dict(params or {})
    others, unchecked = own_held_out(
        card, split, local, lambda name: [_conversation(p.messages) for p in _read(card, name, local, seed, overrides)]
    )
    found = _read(card, split, local, seed, overrides)
    prompts = [normalised(_conversation(preference.messages)) for preference in found]
    clean, compared = without(found, prompts, held_together(others, held_out))
    dropped = len(found) - len(clean)
    if not clean:
        raise UserError(nothing_left(f"data card {card.name}, split {split}", "preferences", dropped, compared))
    return LoadedPreferences(first(clean, limit, seed), dropped, unchecked, compared, frozenset(prompts))


def _read(card: DataCard, split: SplitName, path: Path | None, seed: int, params: dict[str, Any]) -> list[Preference]:
    source = card.source
    if isinstance(source, GeneratorSource) and (preferences := generator(source.name).preferences):
        return generated(card, source, preferences, split, path, seed, params)
    if not isinstance(source, HubSource | FileSource) or source.fields.preference is None:
        raise UserError(f"data card {card.name} has no preferences to train a reward model on")
    if params:
        raise UserError(f"data card {card.name} is not generated: it takes no params ({', '.join(params)})")
    return _read_table(card, source, source.fields.preference, split, path)


def _read_table(
    card: DataCard, source: HubSource | FileSource, fields: PreferenceFields, split: SplitName, path: Path | None
) -> list[Preference]:
    """The rows of a split, numbered as in the table. Published ones that prefer nothing are left out and counted."""
    part = source.splits[split]
    preferences, left_out = [], []
    for index, (where, row) in enumerate(table_rows(source, part.table, path)):
        try:
            pair = _pair(fields, source.fields.prompt, row, where)
            if pair.chosen == pair.rejected:
                raise NothingToJudgeBy("the chosen completion is the rejected one too")
        except NothingToJudgeBy as reason:
            if isinstance(source, FileSource):
                raise UserError(f"{where}: {reason}") from None
            left_out.append(f"{where}: {reason}")
            continue
        if part.percent[0] <= percentile(_opening(pair.messages)) < part.percent[1]:
            identity = f"{card.name}/{Path(part.table).stem}/{index}"
            domain = pair.domain or card.domain
            preferences.append(Preference(identity, pair.messages, pair.chosen, pair.rejected, domain, pair.margin))
    if left_out:
        _log.warning(
            "data card %s, split %s: %d rows left out. The first: %s", card.name, split, len(left_out), left_out[0]
        )
    return preferences


class _Pair(NamedTuple):
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    domain: str | None = None


def _pair(fields: PreferenceFields, prompt: str, row: Row, where: str) -> _Pair:
    """What a row prefers. Raises NothingToJudgeBy where it prefers nothing, UserError where a column is not as it should be."""
    if isinstance(fields, HhDialogues):
        return _hh_pair(_text(row, fields.chosen, where), _text(row, fields.rejected, where))
    messages = _prompt(_value(row, prompt, where), f"{where}: column {prompt!r}")
    if isinstance(fields, ChosenRejected):
        chosen, rejected = (_completion(row, column, where) for column in (fields.chosen, fields.rejected))
        margin = None if fields.margin is None or row.get(fields.margin) is None else _number(row, fields.margin, where)
        domain = None if fields.domain is None else _text(row, fields.domain, where)
        return _Pair(messages, chosen, rejected, margin, domain)
    first, second = (_completion(row, column, where) for column in fields.responses)
    if isinstance(fields, NumberedResponses):
        better = _number(row, fields.better, where)
        if better not in (0, 1):
            raise UserError(f"{where}: column {fields.better!r} must be 0 or 1, the better response, not {better:g}")
        return _Pair(messages, *((second, first) if better else (first, second)))
    assert isinstance(fields, SignedResponses)
    strength = _number(row, fields.strength, where)
    if strength == 0:
        raise NothingToJudgeBy("neither response is preferred")
    return _Pair(messages, *((second, first) if strength > 0 else (first, second)), margin=abs(strength))


def _hh_pair(chosen: str, rejected: str) -> _Pair:
    (*prompt, better), (*other_prompt, worse) = _hh_turns(chosen), _hh_turns(rejected)
    if prompt != other_prompt:
        raise NothingToJudgeBy("the dialogues differ before their last turn")
    return _Pair(tuple(prompt), better["content"], worse["content"])


def _hh_turns(dialogue: str) -> list[Message]:
    """The turns of "\n\nHuman: ...\n\nAssistant: ...". Raises NothingToJudgeBy unless they alternate and have a text each."""
    before, *parts = HH_TURN.split(dialogue)
    turns: list[Message] = [
        {"role": HH_ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    expected = ["user", "assistant"] * (len(turns) // 2)
    if before.strip() or not turns or [turn["role"] for turn in turns] != expected:
        raise NothingToJudgeBy("its turns do not alternate between a human and an assistant who ends the dialogue")
    if not all(turn["content"] for turn in turns):
        raise NothingToJudgeBy("one of its turns is empty")
    return turns


def _prompt(value: Any, where: str) -> tuple[Message, ...]:
    messages: tuple[Message, ...]
    messages = ({"role": "user", "content": value},) if isinstance(value, str) else tuple(_messages(value, where))
    if messages[-1]["role"] != "user":
        raise UserError(f"{where}: the last message of a prompt must be the user's, not the {messages[-1]['role']}'s")
    return messages


def _completion(row: Row, column: str, where: str) -> str:
    """A text, or the last message of a conversation."""
    value = _value(row, column, where)
    if isinstance(value, str):
        return check_unicode(value, f"{where}: column {column!r}")
    *_, last = _messages(value, f"{where}: column {column!r}")
    if last["role"] != "assistant":
        raise UserError(
            f"{where}: column {column!r} must end with a message of the assistant, not of the {last['role']}"
        )
    return last["content"]


def _messages(value: Any, where: str) -> Iterator[Message]:
    if not isinstance(value, Sequence) or not value:
        raise UserError(f"{where} must hold text or a list of messages, not {type(value).__name__}")
    for number, item in enumerate(value, start=1):
        known = isinstance(item, Mapping) and item.get("role") in ROLES and isinstance(item.get("content"), str)
        if not known or not item["content"].strip():
            raise UserError(
                f"{where}, message {number}: must have a role ({', '.join(ROLES)}) and a content that is text"
            )
        yield {"role": item["role"], "content": check_unicode(item["content"], f"{where}, message {number}")}


def _value(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; there are {', '.join(row) or 'none'}")
    if row[column] is None or row[column] == "":
        raise UserError(f"{where}: column {column!r} is empty")
    return row[column]


def _text(row: Row, column: str, where: str) -> str:
    value = _value(row, column, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} must hold text, not {type(value).__name__}")
    return check_unicode(value, f"{where}: column {column!r}")


def _number(row: Row, column: str, where: str) -> float:
    value = _value(row, column, where)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{where}: column {column!r} must hold a number, not {value!r}")
    return float(value)


def _opening(messages: Sequence[Message]) -> str:
    # Not of the whole prompt, so that the turns of one conversation stay in one split.
    return next(message["content"] for message in messages if message["role"] == "user")


def _conversation(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)
