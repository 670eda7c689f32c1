"""What can be said of an answer with yes or no: a feature is such a statement, found in the texts by general rules.

No feature is listed by hand: the rules say where to look (the first words, the marks around a text, its lines, its letters), the texts say what is
there. A feature is a pair of a kind and what it is about, such as ("begins", "Sure!"); `phrase` puts it in words.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

Feature = tuple[str, str]

PHRASES: Mapping[str, str] = {
    "empty": "are empty",
    "script": "are mostly in {} letters",
    "language": "are in {}",
    "case": "are in {}",
    "wraps": "are wrapped in {}",
    "begins": "begin with {}",
    "ends": "end with {}",
    "line": "have a line that begins with {}",
    "lines": "have more than {} lines",
    "gap": "have an empty line",
    "short": "have at most {} words",
    "cut off": "are cut off at the length limit",
    "open end": "end without a mark",
    "small start": "begin with a small letter",
    "repeats": "say a sentence or line twice",
    "stutters": "say a word twice in a row",
    "echoes": "begin with the words of the prompt",
    "copies": "copy a passage of the prompt",
    "strays": "have no long word of the prompt",
    "letters": "have {} letters",
    "capitals": "have a word in capital letters",
    "symbol": "have a symbol or an emoji",
    "digit": "have a digit",
    "run": "have {}",
    "character": "have {}",
    "says": "say {}",
}
"""How a feature of each kind is put, said of several answers, the kinds that tell most of the form first."""
RANK = {kind: place for place, kind in enumerate(PHRASES)}
SLOTS: Mapping[str, frozenset[str]] = {
    "wraps": frozenset({"begin", "end"}),
    "begins": frozenset({"begin"}),
    "small start": frozenset({"begin"}),
    "echoes": frozenset({"begin"}),
    "ends": frozenset({"end"}),
    "open end": frozenset({"end"}),
    "short": frozenset({"length"}),
    "lines": frozenset({"lines"}),
    "gap": frozenset({"lines"}),
    "case": frozenset({"case"}),
}
"""Parts of an answer of which there is only one: features of the same part rule each other out."""

PLAIN = ("case", "script", "language", "lines", "short", "letters")
"""Kinds that are about a word of ours; the others are about a text of the answers."""
EDGE = 6
"""The longest beginnings and ends, in words and marks."""
LONGEST_WORD = 40
LINE_COUNTS = (1, 2, 4, 9)
SHORTEST_PART = 12
"""Characters of a sentence or line; shorter ones may well come twice."""
ECHOED, COPIED = 4, 8
"""Words in a row from the prompt that make an echo at the beginning of an answer, and a copy anywhere in it."""
LOOKED_AT = 2000
"""Characters of the beginning, and of the end, of a text that are looked at."""
LONG_WORD = 5
_SPACELESS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"
# Vowel signs and accents of their own, which Python's \w does not have, belong to the letter before them. Those of emoji do not.
_SIGNS = "".join(
    c for c in map(chr, range(0x300, 0xFE00)) if unicodedata.category(c)[0] == "M" and not "\u20d0" <= c <= "\u20ff"
)
_SIGNS_OF_WORDS = re.sub(f"[{_SPACELESS}]", "", _SIGNS)
_LETTERS_OF_WORD = rf"(?:[^\W{_SPACELESS}]++[{_SIGNS_OF_WORDS}]*+)++"
_TOKEN = re.compile(rf"[{_SPACELESS}]|{_LETTERS_OF_WORD}(?:['’]{_LETTERS_OF_WORD})*|[^\w\s]")
_LINE = re.compile(r"\d+[.):]|[^\w\s]+|\w+[:.)](?=\s|$)")
_RUN = re.compile(r"((?:([^\w\s])\2)|(?<=\S)  |\t)")
_LETTERS = re.compile(r"[^\W\d_]+")
_MARKS = re.compile(rf"[^\w\s{_SIGNS}]+")
_PART = re.compile(r"(?<![.!?。！？؟])[.!?。！？؟]++[\"'”’)*]*+\s+|\n+|(?<=[。！？])")
_STUTTER = re.compile(rf"(?<![\w{_SIGNS}])((?:[^\W\d_]++[{_SIGNS}]*+)++)[^\w{_SIGNS}]+\1(?![\w{_SIGNS}])")
_LANGUAGES: Mapping[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, words in {
        "English": "the of and to is in it you that was for with are this",
        "German": "der die und das ist nicht ein eine zu mit den sich auch auf",
        "French": "le la les et des est une dans pour que qui pas vous avec",
        "Spanish": "el la los y es una en por con para que del las se",
        "Italian": "il di che è una per non con sono della si anche gli nel",
        "Portuguese": "o os de que é uma para com não do da em dos mais",
        "Dutch": "het een van en niet dat voor zijn met op de aan ook je",
    }.items()
}
"""Frequent little words of languages that share a script; a language that is not here is told by its script and its words."""
_NO_NAMES = frozenset(
    [
        "answer",
        "begin",
        "begins",
        "capture",
        "four",
        "full",
        "greater",
        "have",
        "left",
        "less",
        "limit",
        "long",
        "mark",
        "marks",
        "more",
        "most",
        "mostly",
        "number",
        "passage",
        "prompt",
        "right",
        "same",
        "say",
        "sign",
        "small",
        "start",
        "stop",
        "than",
        "that",
        "their",
        "twice",
        "with",
        "without",
        "word",
        "words",
    ]
)
"""Words of phrases and of the names of marks that ask for nothing."""
_CONTROL = re.compile(r"[\x00-\x08\n-\x1f\x7f-\x9f]")
"""What would move a terminal's cursor, but for tabs, which are a feature."""
_CLOSE_UP = re.compile(r"(?<=[(\[]) | (?=[.,;:!?)\]])")
_SCRIPTS_OF = {"CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A text that answers a prompt. `asked` names what the data say that the prompt asks for, such as kinds of instructions."""

    text: str
    prompt: str = ""
    domain: str = ""
    asked: frozenset[str] = frozenset()
    truncated: bool = False


def answer_of_row(row: Mapping[str, Any]) -> Answer:
    """The answer in a row of a samples file, or of any table with a `completion`."""
    metadata = row.get("metadata")
    try:
        told = json.loads(metadata) if isinstance(metadata, str) else metadata
    except ValueError:
        told = None
    return Answer(
        str(row.get("completion") or ""),
        str(row.get("prompt") or row.get("id") or ""),
        str(row.get("domain") or ""),
        asked_kinds({**row, **(told if isinstance(told, dict) else {})}),
        row.get("finish_reason") == "length",
    )


def asked_kinds(row: Mapping[str, Any]) -> frozenset[str]:
    """The kinds of instructions of a row, as the reward `instructions` reads them; empty for other data."""
    named, listed = row.get("instruction_id_list"), row.get("instructions")
    kinds = named if isinstance(named, list) else listed if isinstance(listed, list) else []
    return frozenset(str(kind.get("kind")) if isinstance(kind, dict) else str(kind) for kind in kinds)


def features_of(answer: Answer) -> set[Feature]:
    """The features of an answer, but for its phrases and its length: which of these are worth a look, a set of answers says."""
    text = answer.text.strip()
    if not text:
        return {("empty", "")}
    characters, words = Counter(text), tokens_of(text)
    found = {*_edges(text), *_lines(text), *_letters(text, characters, Counter(words)), *_characters(text, characters)}
    found |= {*_repetitions(text), *_beside(words, answer.prompt)}
    return found | {("cut off", "")} if answer.truncated else found


def tokens_of(text: str) -> list[str]:
    """The words and marks of a text, in small letters; in scripts without spaces, its characters."""
    return _TOKEN.findall(text.casefold())


def phrase(feature: Feature) -> str:
    """What a feature says of several answers: "begin with “Sure!”", "have “,” (comma)"."""
    kind, about = feature
    if feature == ("lines", "1"):
        return "have several lines"
    if kind in PLAIN:
        shown = about
    elif kind == "wraps":
        shown = " and ".join(_named(mark) for mark in dict.fromkeys(about.split(" ")))
    else:
        shown = _named(_CLOSE_UP.sub("", about) if kind == "says" else about)
    return PHRASES[kind].format(shown)


def was(feature: Feature) -> str:
    """The verb that takes the place of the phrase after a number of other answers."""
    return "were" if PHRASES[feature[0]].startswith("are ") else "did"


def names_of(feature: Feature) -> frozenset[str]:
    """Words in small letters by which a prompt can ask for a feature: "quotation" for an answer in quotation marks."""
    kind, about = feature
    if kind in PLAIN or not about:
        told = PHRASES[kind].format(about)
    else:
        told = "" if any(map(str.isalpha, about)) else " ".join(_names(about))
    return frozenset(re.findall(r"[a-z]{4,}", told.lower())) - _NO_NAMES


def excerpt(answer: Answer, feature: Feature, width: int = 70) -> str:
    """The part of an answer that shows a feature, in one line of about `width` characters."""
    text, (kind, about) = _CONTROL.sub(" ", answer.text).strip(), feature
    if kind in ("ends", "open end", "cut off"):
        return text if len(text) <= width else f"… {text[-width:].lstrip()}"
    place = 0
    if kind in ("character", "run", "says", "line") and about:
        needle = r"\W{0,3}".join(map(re.escape, about.split())) if kind == "says" else re.escape(about)
        match = re.search(needle, text, re.IGNORECASE)
        place = max(0, match.start() - width // 3) if match else 0
    return f"{'… ' if place else ''}{text[place : place + width].strip()}{' …' if place + width < len(text) else ''}"


def _edges(text: str) -> Iterator[Feature]:
    # The first and last tokens are in a stretch of the text that is long enough for nearly all words.
    for match in islice(_TOKEN.finditer(text), EDGE):
        yield "begins", _one_line(text[: match.end()])
    tail = text[-EDGE * LONGEST_WORD :]
    for match in [*_TOKEN.finditer(tail)][-EDGE:]:
        yield "ends", _one_line(tail[match.start() :])
    if text.rstrip(_SIGNS)[-1:].isalnum():
        yield "open end", ""
    if text[0].islower():
        yield "small start", ""
    first, last = _MARKS.match(text), _MARKS.match(text[::-1])
    if first and last and len(text) > len(first[0]):
        yield "wraps", f"{text[0]} {text[-1]}"
        closing = last[0][::-1]
        if len(first[0]) > 1 and len(closing) >= len(first[0]):
            yield "wraps", f"{first[0]} {closing[-len(first[0]) :]}"


def _lines(text: str) -> Iterator[Feature]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for count in LINE_COUNTS:
        if len(lines) > count:
            yield "lines", str(count)
    if re.search(r"\n[ \t]*\n", text):
        yield "gap", ""
    for line in lines:
        if match := _LINE.match(line):
            yield "line", re.sub(r"\d+", "1", match[0])


def _letters(text: str, characters: Counter[str], words: Counter[str]) -> Iterator[Feature]:
    cased = sum(count for c, count in characters.items() if c.isupper() or c.islower())
    if cased > 2:
        written = _LETTERS.findall(text)
        if text.isupper():
            yield "case", "capital letters only"
        elif text.islower():
            yield "case", "lowercase letters only"
        elif len(written) > 2 and all(word[0].isupper() for word in written):
            yield "case", "words that all begin with a capital letter"
        if any(len(word) > 3 and word.isupper() for word in written):
            yield "capitals", ""
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            scripts[_script(character)] += count
    if scripts:
        yield "script", scripts.most_common(1)[0][0]
    for script, count in scripts.items():
        if count > 1:
            yield "letters", script
    hits = {name: sum(words[word] for word in frequent) for name, frequent in _LANGUAGES.items()}
    best = max(hits, key=lambda name: hits[name])
    if hits[best] >= 3:
        yield "language", best


def _characters(text: str, characters: Counter[str]) -> Iterator[Feature]:
    for character in characters:
        if character.isdigit():
            yield "digit", ""
        elif (
            not character.isalnum()
            and not character.isspace()
            and (category := unicodedata.category(character))[0] != "M"
        ):
            yield "character", character
            if category == "So":
                yield "symbol", ""
    for run in _RUN.findall(text):
        yield "run", run[0][:2]


def _repetitions(text: str) -> Iterator[Feature]:
    parts = [part for part in map(str.strip, _PART.split(text.casefold())) if len(part) > SHORTEST_PART]
    if len(set(parts)) < len(parts):
        yield "repeats", ""
    if _STUTTER.search(text.casefold()):
        yield "stutters", ""


def _beside(tokens: Sequence[str], prompt: str) -> Iterator[Feature]:
    """What there is of the prompt in the answer; of a long prompt, its beginning and its end count."""
    words = _words(tokens)
    begins, passages, long = _parts_of_prompt(ends_of(prompt))
    if _runs(words[:ECHOED], ECHOED) & begins:
        yield "echoes", ""
    if not passages.isdisjoint(_runs(words, COPIED)):
        yield "copies", ""
    if long and long.isdisjoint(words):
        yield "strays", ""


@lru_cache(maxsize=64)
def _parts_of_prompt(prompt: str) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]], set[str]]:
    """What makes an echo, what makes a copy, and the long words."""
    asked = _words(tokens_of(prompt))
    return _runs(asked, ECHOED), _runs(asked, COPIED), {word for word in asked if len(word) >= LONG_WORD}


def _runs(words: Sequence[str], count: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + count]) for i in range(len(words) - count + 1)}


def ends_of(text: str) -> str:
    """The text; of a long one its beginning and its end."""
    return f"{text[:LOOKED_AT]} {text[-LOOKED_AT:]}" if len(text) > 2 * LOOKED_AT else text


def _words(tokens: Iterable[str]) -> list[str]:
    return [token for token in tokens if token[0].isalnum()]


@lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    name = unicodedata.name(character, "unnamed").split(" ")[0].split("-")[0]
    return _SCRIPTS_OF.get(name, name.capitalize())


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _named(text: str) -> str:
    """A text in quotation marks; of a mark alone also what it is called."""
    if text == "  ":
        return "two spaces in a row"
    if text == "\t":
        return "a tab"
    if re.fullmatch(r"1[.):]", text):
        return f"a number and “{text[1]}”"
    names = dict.fromkeys(_names(text))
    text = _CONTROL.sub(lambda match: f"U+{ord(match[0]):04X}", text)
    return f"“{text}”" + (f" ({', '.join(names)})" if names and not any(map(str.isalnum, text)) else "")


def _names(text: str) -> list[str]:
    """What the marks of a text are called in Unicode, in small letters; no more than three."""
    marks = [c for c in dict.fromkeys(text) if not c.isalnum() and not c.isspace()]
    return [unicodedata.name(c, "").lower() for c in marks if unicodedata.name(c, "")] if len(marks) <= 3 else []
