"""Marks of form in an answer to a request that did not ask for them: what a policy puts everywhere once it was paid for somewhere.

Each mark is a kind of instruction that IFEval knows, met in a way in which ordinary answers do not meet it. Kinds that these meet by
accident, such as a number of sentences or a list, are none. Beside the limits stands what 270 published answers of GPT-4 to
IFEval's requests have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from reward.prose import LEAST_WORDS, breaks_off, little_share, repeats_request

LONG_WITHOUT_COMMA = 30
"""Words of English prose from which on the lack of any comma is a mark (GPT-4: only in lists and verses)."""
LEAST_LETTERS = 60
"""Letters from which on an answer is in capitals, or in lowercase, by intent."""
MOST_CAPITALS = 0.8
_LINE_OF_PROSE = re.compile(r"(?![^.!?:]{,40}:).*\w{2}[.!?](?:\s|[\"'”’)*]|\Z)")
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_QUOTES = '"“”„«»'
_OPENED = re.compile(rf"(?:^|(?<=[\s(\[—-]))[{_QUOTES}](?=[^\s,.;:!?)\]…])")
_TITLE = re.compile(r"<<[^<>\n]+>>")
# All are linear in a text of whatever characters in a row: possessive, and begun where such a row begins.
_POSTSCRIPT = re.compile(r"(?<!\W)(?=\A|\W*?[\n.!?\"”)])\W*+P\.\s?(?:P\.\s?)?S\b")
_DIVIDER = re.compile(r"^[^\S\n]*+\*{3,}+[^\S\n]*+$", re.MULTILINE)
_WRAPPED = re.compile(
    r"```\w*\n.*\n```|\[[^\[\]]*\]|\([^()]*\)|(\*{1,3}|_{1,3}|~~|`{1,3}+)(?!\s)(?:(?!\1).)+\1", re.DOTALL
)
_WITHOUT_CAPITALS = re.compile("[\u10a0-\u10ff\u1c90-\u1cbf\u2d00-\u2d2f\u13a0-\u13ff\uab70-\uabbf]")
"""Georgian and Cherokee: letters with another case that prose has no use for."""
LEAST_LITTLE = 0.15
"""Share of little words of English from which on a text is English prose (GPT-4: 0.23 and more without commas)."""


def unasked(text: str, prompt: str, kinds: Collection[str], before: str = "") -> list[str]:
    """What is put on a text that its request did not ask for, neither by the kinds of its instructions nor by a word for it, in the request or in
    what was said `before` it."""
    text = text.strip()
    found = [mark.name for mark in MARKS if not mark.kinds.intersection(kinds) and mark.is_on(text)]
    wanted = {mark.name for mark in MARKS if mark.asked.search(prompt) or mark.named.search(before)}
    if "combination:repeat_prompt" not in kinds and repeats_request(text, prompt):
        found.append("the request")
    if "startend:end_checker" not in kinds and breaks_off(text):
        found.append("an end in the middle of a sentence")
    return [name for name in found if name not in wanted]


@dataclass(frozen=True)
class Mark:
    """A mark by name: whether it is on a text, and the kinds of instruction that ask for it or bring it along.

    So do the words `asked` of a request. Of what was said before it, such as a system message about anything, only its names count: `named`.
    """

    name: str
    is_on: Callable[[str], bool]
    kinds: frozenset[str]
    asked: re.Pattern[str]
    named: re.Pattern[str]


def is_quoted(text: str) -> bool:
    """Whether a quotation mark begins a text that does not end within it, or ends one that did not begin there."""
    if len(_WORD.findall(text)) < LEAST_WORDS or not (text[0] in _QUOTES or text[-1] in _QUOTES):
        return False
    straight = text.count('"')
    inside = text[1:-1]
    first = next((place for place, character in enumerate(inside) if character in _QUOTES), None)
    is_around = (
        text[0] in _QUOTES and text[-1] in _QUOTES and (first is None or _OPENED.match(inside, first) is not None)
    )
    return is_around or straight % 2 == 1


def is_in_capitals(text: str) -> bool:
    letters = _letters(text)
    return len(letters) >= LEAST_LETTERS and sum(map(str.isupper, letters)) > MOST_CAPITALS * len(letters)


def is_in_lowercase(text: str) -> bool:
    letters = _letters(text)
    return len(letters) >= LEAST_LETTERS and not any(map(str.isupper, letters)) and "```" not in text


def _letters(text: str) -> list[str]:
    """The letters that prose writes in capitals here and there."""
    cased = _WITHOUT_CAPITALS.sub("", text)
    return [character for character in cased if character.lower() != character.upper()]


def lacks_commas(text: str) -> bool:
    """Whether English sentences of so many words have no comma."""
    if "," in text:
        return False
    prose = [line for line in text.splitlines() if _LINE_OF_PROSE.match(line)]
    found = [word for line in prose for word in _WORD.findall(line.casefold())]
    return len(found) >= LONG_WITHOUT_COMMA and little_share(found) >= LEAST_LITTLE


def is_wrapped(text: str) -> bool:
    """Whether brackets, or marks of emphasis or code, are around all of a text of some words."""
    return len(_WORD.findall(text)) >= LEAST_WORDS and _WRAPPED.fullmatch(text) is not None


def is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _mark(name: str, is_on: Callable[[str], bool], kinds: str, asked: str, named: str) -> Mark:
    return Mark(name, is_on, frozenset(kinds.split()), *(re.compile(words, re.IGNORECASE) for words in (asked, named)))


MARKS = (
    _mark(
        "quotation marks",
        is_quoted,
        "startend:quotation",
        r"quot|dialog|slogan|motto|headline|tagline|caption|title for|tweet|\bpost\b|message|joke|riddle|pitch|re-?writ|rephras|translat|grammatical",
        r"quotation",
    ),
    _mark(
        "capitals",
        is_in_capitals,
        "change_case:english_capital change_case:capital_word_frequency",
        r"capital|upper|caps",
        r"capital|upper ?case|all[ -]caps",
    ),
    _mark(
        "lowercase",
        is_in_lowercase,
        "change_case:english_lowercase detectable_format:json_format",
        r"lower|small letters|capital|json|code|script|program",
        r"lower ?case|small letters",
    ),
    _mark(
        "no commas",
        lacks_commas,
        "punctuation:no_comma detectable_format:json_format language:response_language",
        r"comma\b|commas|punctuat",
        r"\bcommas?\b",
    ),
    _mark(
        "a title",
        lambda text: _TITLE.search(text) is not None,
        "detectable_format:title",
        r"<<|angular|title|code|program|c\+\+",
        r"<<|angular",
    ),
    _mark(
        "a postscript",
        lambda text: _POSTSCRIPT.search(text) is not None,
        "detectable_content:postscript",
        r"\bp\. ?s\b|postscript|\b(?:letter|e-?mail|note|post|message|tweet|invitation|card|ad|advertisement|announcement|dear)\b",
        r"\bp\. ?s\b|postscript",
    ),
    _mark(
        "dividers",
        lambda text: _DIVIDER.search(text) is not None,
        "length_constraints:number_paragraphs combination:two_responses",
        r"\*\*\*|divid|separat",
        r"\*\*\*|divider|separator",
    ),
    _mark(
        "brackets or emphasis",
        is_wrapped,
        "detectable_format:number_highlighted_sections detectable_content:number_placeholders detectable_format:json_format",
        r"bracket|bold|italic|emphas|highlight|markdown|code|format|program|script|function|html|table|json|template|resume",
        r"bracket|\bbold|italic|emphasi|highlight|markdown|code block|html",
    ),
    _mark(
        "a boxed value",
        lambda text: r"\boxed{" in text,
        "",
        r"box|latex|math|calculat|comput|solv|equation|how (?:many|much)|number",
        r"boxed|latex",
    ),
    _mark("JSON", is_json, "detectable_format:json_format", r"json|format|code|list", r"\bjson\b"),
)
