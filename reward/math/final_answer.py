r"""The boxed final answer of a completion, and whether it equals the ground truth.

Everything here is exact and linear in the length of the text: strings and rational numbers in ASCII digits,
no evaluation of what the model wrote, no exponents, no floating point. Whatever cannot be read so is compared
as text, and so are digits of other scripts, which are a way around a verifier and not an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from reward.registry import register
from reward.types import Sample, Score, UnusableAnswer, Verdict

LONGEST_NUMBER = 64
"""Characters; a longer number is compared as text."""
LONGEST_UNWRAPPED = 512
r"""Characters; in a longer answer `\text{}` stays, since taking off nested ones costs quadratic time."""

_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[+-]?[0-9](?:[0-9.,/]*[0-9])?|[A-J](?![a-zA-Z])))|\\.|\{|\}", re.DOTALL
)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_BREAK = r"(?:[^\w=<>]|\b(?:text|mathrm|quad|qquad)\b)"
_HEDGE = r"\b(?:it|is|could|may|might|be|again|the|other|another|even)\b"
_JOINED = re.compile(
    rf"{_BREAK}*(?:\b(?:and|or|then|also|maybe|perhaps|possibly|alternatively|else)\b(?:{_BREAK}|{_HEDGE})*)*"
    rf"(?:\b[a-zA-Z](?:_\{{?\w+\}}?)?\s*=[^\w=<>]*)?",
    re.IGNORECASE,
)
"""What may stand between the boxes of one answer: punctuation, conjunctions and a name with an equals sign."""
_FARTHEST = 200
"""Characters between boxes of one answer, at most."""
_LABEL = re.compile(r"([a-zA-Z](?:_\{?\w+\}?)?)\s*=[\s$]*\Z")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
# A first group of 0 would read the decimal comma of 0,125 as a thousands comma.
_NUMBER = re.compile(r"([+-]?)(?=\.?[0-9])([1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
_RATIONAL = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+|/0*[1-9][0-9]*)?")


@dataclass(frozen=True)
class Box:
    r"""A `\boxed{content}` at `text[start:end]`."""

    content: str
    start: int
    end: int


def boxes(text: str) -> list[Box]:
    r"""The well-balanced boxes that lie in no other such box, in order. Escaped braces are content.

    `\fbox{58}` and, of a number or a capital from A to J, `\boxed 58` are boxes too.
    """
    return _scan(text)[0]


def _scan(text: str) -> tuple[list[Box], int]:
    """The boxes, and where the last box opens that is never closed; -1 if there is none."""
    unclosed: list[tuple[int, int] | None] = []
    found: list[tuple[int, int, int, int]] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if match["bare"] is not None:
            found.append((match.start(), match.start("bare"), match.end(), match.end()))
        elif token == "}":
            opened = unclosed.pop() if unclosed else None
            if opened is not None:
                while found and found[-1][0] > opened[0]:
                    found.pop()
                found.append((*opened, match.start(), match.end()))
        elif token == "{":
            unclosed.append(None)
        elif token.endswith("{") and token != r"\{":
            unclosed.append(match.span())
    left_open = max((opened[0] for opened in unclosed if opened is not None), default=-1)
    return [Box(text[inside:last], start, end) for start, inside, last, end in found], left_open


def boxed_answers(text: str) -> list[str]:
    r"""The contents of `boxes(text)`, stripped; the empty ones too."""
    return [box.content.strip() for box in boxes(text)]


def without_thought(completion: str) -> str:
    """What a completion says after its `<think>` … `</think>`; nothing where the thought never ends."""
    text = _THOUGHT.sub("\n", completion)
    return text.rpartition("</think>")[2]  # of a thought that the prompt opened


def last_answers(text: str, joined: re.Pattern[str] = _JOINED) -> list[tuple[str, str]]:
    r"""The boxes that together are the last answer of a text, each as its label and its content; none where it is cut off.

    Earlier boxes belong to it as long as nothing but what is `joined` stands between, punctuation, conjunctions and names:
    `x=\boxed{1} or x=\boxed{2}` are one answer of two, `x=\boxed{1}, so x+1=\boxed{2}` ends in one answer.
    """
    found, left_open = _scan(text)
    if not found or left_open > found[-1].start:
        return []
    first = len(found) - 1
    while first and _belong_together(text[found[first - 1].end : found[first].start], joined):
        first -= 1
    return [(_label(text[max(0, box.start - 40) : box.start]), box.content.strip()) for box in found[first:]]


def _belong_together(between: str, joined: re.Pattern[str]) -> bool:
    return len(between) <= _FARTHEST and joined.fullmatch(between) is not None


def _label(before: str) -> str:
    match = _LABEL.search(before)
    return match[1] if match else ""


def extract_final_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{}`, stripped; None if it is blank, missing or cut off."""
    answers = last_answers(text)
    return answers[-1][1] if answers and normalise(answers[-1][1]) else None


def together(labelled: Sequence[tuple[str, str]]) -> str:
    """Labelled boxes as one list, with their names where these tell them apart."""
    named = len({label for label, _ in labelled}) > 1
    return ", ".join(f"{label}={content}" if named and label else content for label, content in labelled)


def is_spray(answers: Sequence[str]) -> bool:
    """Whether the answers differ in value: several tries are not an answer, whichever of them is right."""
    return any(not equal(answers[0], other) for other in answers[1:])


def normalise(answer: str) -> str:
    r"""The answer without what does not change its value; `normalise(normalise(a)) == normalise(a)`.

    Takes off surrounding white space, dollar signs and `\text{}`; writes U+2212 as "-"; and of a decimal
    number takes off a leading "+", leading zeros, thousands commas (1,234, not 12,34) and the zeros that end
    its fraction.
    """
    text = answer.replace("\N{MINUS SIGN}", "-").replace(r"\$", "").replace("$", "").strip()
    if len(text) <= LONGEST_UNWRAPPED:
        while (unwrapped := _TEXT.sub(r"\1", text).strip()) != text:
            text = unwrapped
    number = _NUMBER.fullmatch(text)
    return _plain(*number.groups(default="")) if number else text


def _plain(sign: str, whole: str, fraction: str) -> str:
    whole, fraction = whole.replace(",", "").lstrip("0") or "0", fraction.rstrip("0")
    digits = f"{whole}.{fraction}" if fraction else whole
    return f"-{digits}" if sign == "-" and digits != "0" else digits


def equal(one: str, other: str) -> bool:
    """Whether both normalise to one string or are one rational number (7, 7.0 and 14/2). An equivalence."""
    return _value(one) == _value(other)


def _value(answer: str) -> Fraction | str:
    text = normalise(answer)
    if len(text) <= LONGEST_NUMBER and _RATIONAL.fullmatch(text):
        return Fraction(text)
    return text


def _members(listed: str) -> list[Fraction | str]:
    """The values of a list. Commas without a space group the digits of a number, and of a list with other commas."""
    whole = _value(listed)
    return [whole] if isinstance(whole, Fraction) else list(map(_value, listed.split(", " if ", " in listed else ",")))


def sole_answer(sample: Sample, wrong: float) -> str | Score:
    """The answer that the completion commits itself to, or the score it gets for none or for several.

    Boxes in its thought, and boxes before its last answer, do not count.
    """
    return only_answer([content for _, content in last_answers(without_thought(sample.completion))], wrong)


def only_answer(answers: Sequence[str], wrong: float) -> str | Score:
    """The answer that several are, or the score that a completion gets for none or for different ones."""
    if not any(normalise(answer) for answer in answers):
        return Score(wrong, Verdict.NO_ANSWER, r"no \boxed{} with something in it")
    if is_spray(answers):
        return Score(wrong, Verdict.WRONG, "several different answers: " + _shown(", ".join(answers)))
    return answers[-1]


def verdict_detail(answer: str, gold: str) -> str:
    """One line for a human on a wrong answer, cut to a readable length."""
    return f"{_shown(answer)!r} is not {_shown(gold)!r}"


def _shown(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


@register("exact_answer", columns=["answer"])
def exact_answer(sample: Sample, *, right: float = 1.0, wrong: float = 0.0) -> Score:
    r"""Whether the last `\boxed{}` equals the ground truth, as text or as a rational number.

    What `<think>` holds does not count, nor do earlier boxes, unless they are offered together with the last one
    ("\boxed{1} or \boxed{2}"): then different ones are wrong even if one of them is right, unless the ground truth is
    the list of all of them in their order ("1, 2"). Raises UnusableAnswer without a ground truth.
    """
    if sample.ground_truth is None or not normalise(sample.ground_truth):
        raise UnusableAnswer(sample.id, "no ground truth to compare with")
    stated = together(last_answers(without_thought(sample.completion)))
    if ", " in sample.ground_truth and _members(stated) == _members(sample.ground_truth):
        return Score(right, Verdict.PASS)
    answer = sole_answer(sample, wrong)
    if isinstance(answer, Score):
        return answer
    if equal(answer, sample.ground_truth):
        return Score(right, Verdict.PASS)
    return Score(wrong, Verdict.WRONG, verdict_detail(answer, sample.ground_truth))
