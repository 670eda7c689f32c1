"""Whether a response follows an instruction that a program can check, in the manner of IFEval (arXiv:2311.07911).

Each check is a pure function of the response and of what the instruction asks for. Words are compared without regard to
case. A response without any visible character follows nothing.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Relation = Literal["at least", "at most"]

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|P\.S)\.", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+")
_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n\s*```\Z", re.DOTALL)
SEPARATOR = "******"


def words(text: str) -> list[str]:
    """The words of a text; "don't" and "well-known" are one each."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """The sentences of a text: what ends in a full stop, a question mark or an exclamation mark, and what is left over.

    The stops of common abbreviations and of decimals end none, and pieces without a word are none.
    """
    protected = _ABBREVIATION.sub(lambda match: match[0].replace(".", "․"), text)
    return [piece.strip() for piece in _SENTENCE_END.split(protected) if words(piece)]


def occurrences(word: str, text: str) -> int:
    """How often the word stands in a text by itself, also in "word's" and "half-word"."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def compare(count: int, relation: Relation, wanted: int) -> bool:
    """Whether `count` is at least, or at most, the number that is wanted."""
    return count >= wanted if relation == "at least" else count <= wanted


def all_capitals(response: str) -> bool:
    """It has letters, and all of them are capitals."""
    return any(map(str.isalpha, response)) and response == response.upper()


def all_small(response: str) -> bool:
    """It has letters, and none of them is a capital."""
    return any(map(str.isalpha, response)) and response == response.lower()


def word_count(response: str, *, relation: Relation, count: int) -> bool:
    """It has so many words."""
    return compare(len(words(response)), relation, count)


def sentence_count(response: str, *, relation: Relation, count: int) -> bool:
    """It has so many sentences."""
    return compare(len(sentences(response)), relation, count)


def bullet_count(response: str, *, count: int) -> bool:
    """It has exactly so many lines that begin with -, * or •."""
    return len(_BULLET.findall(response)) == count


def paragraph_count(response: str, *, count: int) -> bool:
    """It has exactly so many paragraphs, with blank lines between them."""
    return len([part for part in re.split(r"\n\s*\n", response) if part.strip()]) == count


def has_words(response: str, *, wanted: Sequence[str]) -> bool:
    """Each of the words occurs."""
    return all(occurrences(word, response) for word in wanted)


def lacks_words(response: str, *, unwanted: Sequence[str]) -> bool:
    """None of the words occurs."""
    return not any(occurrences(word, response) for word in unwanted)


def repeats_word(response: str, *, word: str, count: int) -> bool:
    """The word occurs at least so many times."""
    return occurrences(word, response) >= count


def repeats_letter(response: str, *, letter: str, count: int) -> bool:
    """The letter, small or capital, occurs at least so many times."""
    return response.casefold().count(letter.casefold()) >= count


def no_commas(response: str) -> bool:
    """It has no comma, of any script."""
    return not set(response) & set(",，、،")


def begins_with(response: str, *, phrase: str) -> bool:
    """It begins with the phrase, whatever the case."""
    return response.strip().casefold().startswith(phrase.casefold())


def ends_with(response: str, *, phrase: str) -> bool:
    """It ends with the phrase and nothing after it, whatever the case."""
    return response.strip().casefold().endswith(phrase.casefold())


def quoted(response: str) -> bool:
    """The whole of it stands in double quotation marks."""
    text = response.strip()
    return len(text) > 2 and text[0] in '"“' and text[-1] in '"”'


def titled(response: str) -> bool:
    """It has a title in double angular brackets, such as <<The sea>>."""
    return re.search(r"<<[^<>\n]*\w[^<>\n]*>>", response) is not None


def placeholder_count(response: str, *, count: int) -> bool:
    """It has at least so many placeholders in square brackets, such as [name]."""
    return len(re.findall(r"\[[^\[\]\n]*\w[^\[\]\n]*\]", response)) >= count


def postscript(response: str) -> bool:
    """One of its lines begins with P.S., and says something."""
    return re.search(r"^\s*P\.\s?S\.?:?\s*\w", response, re.MULTILINE | re.IGNORECASE) is not None


def repeats_request(response: str, *, request: str) -> bool:
    """It begins with the request, word for word, and goes on."""
    text = response.strip()
    return text.casefold().startswith(request.strip().casefold()) and len(text) > len(request.strip())


def two_answers(response: str) -> bool:
    """It is two different answers with six asterisks between them."""
    parts = [part.strip() for part in response.split(SEPARATOR)]
    return len(parts) == 2 and all(map(words, parts)) and parts[0] != parts[1]


def is_json(response: str, *, keys: Sequence[str]) -> bool:
    """It is a JSON object with these keys and no others, in a code block or without one."""
    text = response.strip()
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == set(keys)


CHECKS: Mapping[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        *(all_capitals, all_small, word_count, sentence_count, bullet_count, paragraph_count, has_words, lacks_words),
        *(repeats_word, repeats_letter, no_commas, begins_with, ends_with, quoted, titled, placeholder_count),
        *(postscript, repeats_request, two_answers, is_json),
    )
}


def follows(kind: str, params: Mapping[str, Any], response: str) -> bool:
    """Whether the response, as it is, follows the instruction: the strict criterion."""
    return bool(response.strip()) and CHECKS[kind](response, **params)


def follows_loosely(kind: str, params: Mapping[str, Any], response: str) -> bool:
    """Whether the response follows the instruction as it is or in one of its variants: the loose criterion.

    The variants leave out the first line, the last one or both, and each of them also all asterisks: a phrase that
    introduces the answer, one that closes it, and emphasis (arXiv:2311.07911, section 2.2).
    """
    lines = response.split("\n")
    variants = ["\n".join(part) for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return any(follows(kind, params, text) for v in variants for text in (v, v.replace("*", "")))
