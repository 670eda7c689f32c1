"""Instructions that a program can check: what a request asks of the form of an answer, judged as IFEval judges it.

The checkers are those of IFEval (Zhou et al. 2023, arXiv:2311.07911) as lm_eval keeps them; they come with the extra
`evaluation`. A checker sees the form alone, so an optimiser finds answers that have it and nothing else. Therefore an answer is
first looked at for being one at all (`reward.prose.degenerate`), and gets nothing if it is not.

A sample's metadata has `instruction_id_list` and `kwargs`, as IFEval publishes its rows; or the two in `ground_truth`, as
open-instruct publishes its rows for RLVR; or `instructions`, a list of
`{"kind": "punctuation:no_comma", "args": {}, "text": "Use no commas."}` with IFEval's names and arguments. It may have `topic`,
words of which an answer uses one.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import fmean
from typing import Any
from unittest.mock import patch

from reward import older_names
from reward.prose import capital_words, degenerate, punkt_sentences, seeded_langdetect, whole_sentences
from reward.registry import register
from reward.rows import after_thought, text_of
from reward.types import RewardError, Sample, Score, UnusableAnswer, Verdict
from reward.unasked import unasked

SENTENCES = "length_constraints:exact_sentences"
"""Our one kind that IFEval does not have: exactly `num_sentences` sentences."""
JSON = "detectable_format:json_format"
OPTIONS = "detectable_format:constrained_response"
PARAGRAPH = "length_constraints:nth_paragraph_first_word"
REPEATED = "combination:repeat_prompt"
FOR_A_MARK = 0.25
"""What an answer that has a mark of form which nobody asked for keeps of its share, for each such mark."""
_NEEDED = '"instruction_id_list" and as many "kwargs", or "instructions" with kind and args'
_JSON_DOCUMENT = re.compile(r"\s*(?:```\w*)?\s*[\[{]")

_RELATIONS = {"less than": operator.lt, "at least": operator.ge}
_COUNTS: Mapping[str, tuple[Sequence[str], Callable[[str, Mapping[str, Any]], int]]] = {
    SENTENCES: (["num_sentences"], lambda text, args: len(whole_sentences(text))),
    "length_constraints:number_sentences": (
        ["num_sentences", "relation"],
        lambda text, args: len(punkt_sentences(text)),
    ),
    "change_case:capital_word_frequency": (
        ["capital_frequency", "capital_relation"],
        lambda text, args: capital_words(text),
    ),
    "keywords:letter_frequency": (
        ["let_frequency", "let_relation", "letter"],
        lambda text, args: text.lower().count(str(args["letter"]).lower()),
    ),
}
"""Kinds that are counted here, with the names of number, relation and letter: IFEval's checkers of the second and the third
need nltk's data, that of the last draws another letter in place of "#" or "!"."""

_BULLET = re.compile(r"^[^\S\n]*+[*-](?!\*)", re.MULTILINE)
_LONG_GAP = re.compile(r"(?<!\s)\s{50,}+")
"""White space that IFEval's own expressions would read in a time that grows with the square of its length."""
_TERMS = re.compile(r"\w+(?:['’]\w+)*")
_NEARNESS: Mapping[str, Callable[[str, Mapping[str, Any]], float]] = {
    "change_case:english_capital": lambda text, args: _share(map(str.isupper, _TERMS.findall(text))),
    "change_case:english_lowercase": lambda text, args: _share(map(str.islower, _TERMS.findall(text))),
    "punctuation:no_comma": lambda text, args: 1 / (1 + text.count(",")),
    "startend:quotation": lambda text, args: _share([text[:1] == '"', text[-1:] == '"']),
    "startend:end_checker": lambda text, args: float(args["end_phrase"].lower() in text.lower()),
    "detectable_format:title": lambda text, args: _share(["<<" in text, ">>" in text]),
    "detectable_format:number_bullet_lists": lambda text, args: _ratio(len(_BULLET.findall(text)), args["num_bullets"]),
    "length_constraints:number_words": lambda text, args: _ratio(len(_TERMS.findall(text)), args["num_words"]),
    "keywords:existence": lambda text, args: _share(word.lower() in text.lower() for word in args["keywords"]),
    "keywords:forbidden_words": lambda text, args: _share(
        not re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in args["forbidden_words"]
    ),
}
"""How near a text comes to an instruction that it does not meet, in [0, 1]. Kinds in `_COUNTS` are graded by their count; any other kind is 0."""

Asked = tuple[str, Mapping[str, Any]]
"""A kind of instruction and its arguments."""
Check = Callable[[str], bool]


@dataclass(frozen=True)
class Checked:
    """What was found in an answer: for each instruction, in order, whether it is met; why it is degenerate, or ""; and what was not asked for.

    `near` says how near each instruction is to being met: 1 where it is, at most a half where it is not.
    """

    kinds: tuple[str, ...]
    met: tuple[bool, ...]
    degenerate: str
    unasked: tuple[str, ...]
    near: tuple[float, ...]

    @property
    def passes(self) -> bool:
        """Every instruction is met by an answer that is one, and has no mark of form that was not asked for."""
        return all(self.met) and not self.degenerate and not self.unasked


@register("instructions")
def instructions(sample: Sample, *, partial: bool = False) -> Score:
    """Whether an answer follows all checkable instructions of its request: 1 or 0; with `partial`, how near it is to that.

    With `partial` an instruction that is followed counts 1, and another up to a half: the share of words in capitals, the share of the keywords that
    are there, 2 of 4 sentences. The value is the mean.

    It passes if it follows all. A degenerate answer (see `reward.prose.degenerate`) gets 0 and the verdict NO_ANSWER; one
    that was cut off at its length limit gets 0 and is WRONG, whatever it had said by then. Marks of form that the request did not ask
    for (see `reward.unasked`) are WRONG too: such an answer gets 0, or with `partial` a quarter of that for each mark. The detail has a word
    on each instruction. An answer to a request with an empty list of `instructions` passes if it is neither degenerate, cut off nor marked.

    UnusableAnswer where the metadata has no list of instructions, or an instruction with an argument that is missing, superfluous or odd. Raises
    RewardError where lm_eval is not installed.
    """
    checked = check(sample)
    if checked.degenerate:
        return Score(0.0, Verdict.NO_ANSWER, f"degenerate: {checked.degenerate}; {_told(checked)}")
    if sample.truncated:
        return Score(0.0, Verdict.WRONG, f"cut off; {_told(checked)}")
    if checked.passes:
        return Score(1.0, Verdict.PASS, _told(checked))
    share = (fmean(checked.near) if checked.near else 1.0) * FOR_A_MARK ** len(checked.unasked)
    told = f"nobody asked for {', '.join(checked.unasked)}; " if checked.unasked else ""
    return Score(share if partial else 0.0, Verdict.WRONG, told + _told(checked))


def check(sample: Sample, *, loose: bool = False) -> Checked:
    """What the checkers find in a sample's completion, after the thought that it may begin with. Raises as `instructions` does.

    With `loose`, an instruction is met where IFEval's loose criterion finds it met (arXiv:2311.07911, section 2.2): by the
    completion or by a variant of it without its first line, its last line or both, with or without asterisks.
    """
    text = after_thought(sample.completion)
    variants = _loose_variants(text) if loose else [text]
    try:
        topic, asked = _topic(sample), _asked(sample)
        checks = [_check(kind, args) for kind, args in asked]
        met = tuple(any(bool(one.strip()) and check(one) for one in variants) for check in checks)
    except ValueError as error:
        raise UnusableAnswer(sample.id, str(error)) from error
    near = tuple(1.0 if is_met else _nearness(text.strip(), *one) / 2 for one, is_met in zip(asked, met, strict=True))
    kinds = tuple(kind for kind, _ in asked)
    arguments = [args for _, args in asked]
    why = degenerate(text, sample.prompt, topic, arguments, can_be_short=OPTIONS in kinds)
    return Checked(kinds, met, why, tuple(unasked(text, sample.prompt, kinds, _before(sample))), near)


def _before(sample: Sample) -> str:
    """What the system and the user said, the request among it; what they ask for there is asked for."""
    turns = sample.metadata.get("messages") or ()
    return "\n".join(text_of(turn.get("content")) for turn in turns if turn["role"] != "assistant")


def _loose_variants(text: str) -> list[str]:
    lines = text.split("\n")
    parts = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [variant for part in (text, *parts) for variant in (part, part.replace("*", ""))]


def _topic(sample: Sample) -> Sequence[str]:
    topic = sample.metadata.get("topic")
    if topic is not None and not (isinstance(topic, list) and all(isinstance(word, str) and word for word in topic)):
        raise ValueError(f'the "topic" in its metadata must be a list of words, not {topic!r}')
    return topic or ()


def _asked(sample: Sample) -> list[Asked]:
    """The instructions without the arguments that are null: a table has a column for each argument of any kind."""
    try:
        pairs = _pairs(sample)
    except (LookupError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"its metadata needs {_NEEDED}: {error!r}") from error
    if not pairs and sample.metadata.get("instructions") is None:
        raise ValueError(f"its metadata needs {_NEEDED}; it has no instruction")
    return [(kind, {name: _whole(value) for name, value in args.items() if not _null(value)}) for kind, args in pairs]


def _pairs(sample: Sample) -> list[Asked]:
    row = sample.metadata
    if not row.get("instruction_id_list") and (listed := row.get("instructions")) is not None:
        if isinstance(listed, str | Mapping):
            raise TypeError(f'"instructions" must be a list, not {listed!r:.60}')
        return [(str(one["kind"]), dict(one["args"] or {})) for one in listed]
    if row.get("instruction_id_list") is None:
        truth = row.get("ground_truth") or sample.ground_truth
        row = _literal(truth)[0] if truth else {}
    kinds = row.get("instruction_id_list", row.get("instruction_id", ()))
    return [(str(kind), dict(args or {})) for kind, args in zip(kinds, row.get("kwargs", ()), strict=True)]


def _literal(text: str) -> Any:
    """What JSON or Python writes so: open-instruct's rows are Python's, and others' are JSON with its null."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ast.literal_eval(text)


def _null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> Any:
    """A column of whole numbers with a null among them is read as floats by pandas."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check(kind: str, args: Mapping[str, Any]) -> Check:
    """The check of one instruction. Raises ValueError where its arguments do not say what is asked.

    IFEval's checkers draw an argument at random where it is missing, and where it is odd: what they use is compared with what
    was given.
    """
    if odd := {name: value for name, value in args.items() if not _plain(value)}:
        raise ValueError(f"instruction {kind}: {odd} is neither text nor a whole number from 0 on")
    if kind in _COUNTS:
        return _count_check(kind, args)
    if kind not in checkers():
        raise ValueError(f"no checker for instructions of kind {kind!r}")
    checker = checkers()[kind](kind)
    _require(kind, args, checker.get_instruction_args_keys())
    try:
        checker.build_description(**args)
        used = checker.get_instruction_args() or {}
    except Exception as error:  # of whatever type the checker stumbles over
        raise ValueError(f"instruction {kind}: its checker does not take {dict(args)}: {error!r}") from error
    if odd := {name: args[name] for name in used if _folded(used[name]) != _folded(args[name])}:
        raise ValueError(f"instruction {kind}: its checker has no use for {odd}")
    return partial(_follows, kind, checker)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(one, str) and one.strip() for one in value)
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _folded(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip().lower()
    return sorted({_folded(one) for one in value}) if isinstance(value, list | tuple) else value


def _require(kind: str, args: Mapping[str, Any], names: Collection[str]) -> None:
    if set(args) != set(names):
        raise ValueError(f"instruction {kind} needs the arguments {sorted(names)}, not {sorted(args)}")


def _follows(kind: str, checker: Any, text: str) -> bool:
    if kind == JSON and not _JSON_DOCUMENT.match(text):
        # IFEval's checker takes any value of JSON: a policy that puts its answers in quotation marks would have learned it.
        return False
    if kind == PARAGRAPH:
        # IFEval's checker takes the empty line in a wider gap for a paragraph when it looks for the n-th one.
        text = re.sub(r"\n{3,}", "\n\n", text.strip())
    if kind != REPEATED:
        text = _LONG_GAP.sub(lambda gap: "\n\n" if "\n" in gap[0] else " ", text)
    try:
        return bool(checker.check_following(text))
    except RecursionError:  # JSON that is nested a thousandfold
        return False
    except Exception as error:  # a keyword that is no regular expression, for one
        raise ValueError(f"instruction {kind}: its checker failed: {error!r}") from error


def _count_check(kind: str, args: Mapping[str, Any]) -> Check:
    names, count = _COUNTS[kind]
    _require(kind, args, names)
    number, compare = args[names[0]], _RELATIONS.get(str(args[names[1]])) if len(names) > 1 else operator.eq
    if not isinstance(number, int) or compare is None or len(str(args.get("letter", "a"))) != 1:
        raise ValueError(
            f"instruction {kind} needs a number, one of {list(_RELATIONS)} and one character, not {dict(args)}"
        )
    return lambda text: compare(count(text, args), number)


def _nearness(text: str, kind: str, args: Mapping[str, Any]) -> float:
    if kind in _COUNTS:
        names, count = _COUNTS[kind]
        return _ratio(count(text, args), args[names[0]])
    return _NEARNESS[kind](text, args) if kind in _NEARNESS else 0.0


def _share(true: Iterable[bool]) -> float:
    found = list(true)
    return sum(found) / max(1, len(found))


def _ratio(one: int, other: int) -> float:
    return min(one, other) / max(one, other, 1)


def _told(checked: Checked) -> str:
    return "; ".join(
        f"{kind.partition(':')[2]}: {'yes' if met else 'NO'}"
        for kind, met in zip(checked.kinds, checked.met, strict=True)
    )


@lru_cache(maxsize=1)
def checkers() -> Mapping[str, Any]:
    """IFEval's checkers by kind of instruction. Raises RewardError where lm_eval is not installed."""
    # lm_eval fetches nltk's data from the network when it is imported, on the first rank only. What needs them is counted here.
    try:
        with patch.dict(os.environ, {"LOCAL_RANK": "1"}):
            seeded_langdetect()
            from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise RewardError(
            f"the reward `instructions` needs lm_eval with its IFEval checkers ({error}): pip install 'moe-align[evaluation]'"
        ) from error
    checkers: Mapping[str, Any] = INSTRUCTION_DICT
    return checkers


__getattr__ = older_names.of("instructions")
