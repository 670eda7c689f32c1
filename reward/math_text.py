r"""Mathematical answers as text: where a completion states its answer, and what can be compared without algebra.

Nothing here evaluates or parses mathematics: regular expressions in linear time, strings, and rational numbers of
bounded length. `compare` answers only where it is sure, and leaves the rest to the killable workers of
`reward.math_answer`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from reward.final_answer import LONGEST_NUMBER, boxed_answers, normalise

LONGEST_ANSWER = 1000
"""Characters; more is no final answer."""
DEEPEST_ANSWER = 40
"""Open brackets of all kinds; more is no final answer."""
SHORTEST_ECHO = 40
"""Characters; a shorter line that the prompt has too can be an answer, such as "The answer is 5."."""

_UNICODE = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{NO-BREAK SPACE}": " ",
    "\N{THIN SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": " ",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "²": "^{2}",
    "³": "^{3}",
    "€": "",
    "£": "",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "ε": r"\epsilon ",
    "θ": r"\theta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "π": r"\pi ",
    "σ": r"\sigma ",
    "φ": r"\phi ",
    "ω": r"\omega ",
}
"""What an honest answer may hold beyond ASCII. No digit and no Latin letter: those have look-alikes."""
_FOREIGN = re.compile("|".join(map(re.escape, _UNICODE)))
_ROOT = re.compile(r"√(\d+|[a-z])(?!\w)", re.ASCII)

_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
_ANSWER_IS = re.compile(r"\banswer is\b[ \t]*:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|\**$)")
_MARKER = re.compile(r"\\boxed|####|answer is", re.IGNORECASE)

_BOXED = re.compile(r"\\boxed\s*\{(.*)\}", re.DOTALL)
_DELIMITERS = re.compile(r"\\[()\[\]]|\\?\$|\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,!]|\{,\})(?=[0-9]{3}(?![0-9]))")
_SPACES = re.compile(r"(?:(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|~|\s)+")
_TEXT_COMMANDS = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf|tt)|math(?:rm|bf|it|sf)|mbox|operatorname)(?=\s*\{)")
_FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")

_FRACTION = re.compile(r"([+-]?)([1-9][0-9]*)?\\frac(?:([0-9])([1-9])|\{([0-9]+)\}\{([0-9]+)\})")
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\(?:overline|bar)\{([0-9]+)\}")
_RATIONAL = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+|/0*[1-9][0-9]*)?")

_CHOICE = re.compile(r"\(?([A-J])[).]?")
_CHOICE_WITH_VALUE = re.compile(r"\(([A-J])\)\W?.+", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
_WORDY = re.compile(r"[A-Z][a-z]{2,}|yes|no|true|false|[a-z]{3,} [a-z ]*[a-z]{3,}", re.IGNORECASE)
_RETRACTED = re.compile(r"\b(?:not|wrong|incorrect|never|except|if|else|unless|maybe|either)\b|n't\b", re.IGNORECASE)


def stated_answers(completion: str, prompt: str) -> list[str]:
    r"""The answers that a completion states, in order, without blank ones.

    Those in `\boxed{}`; where there is no box, the last line `#### answer` and the earlier ones that are another
    number; where there is none, what follows "the answer is" up to the end of the sentence. What the completion
    repeats of its prompt does not count.
    """
    text = without_echo(completion, prompt)
    if r"\boxed" in text:
        found = boxed_answers(text)
    elif hashes := _HASHES.findall(text):
        # Headings of the fourth level look the same, so that of the earlier ones only numbers are answers.
        found = [line for line in hashes[:-1] if number(tidy(line)) is not None] + hashes[-1:]
    else:
        found = [_SENTENCE_END.split(rest.split("\n", 1)[0], maxsplit=1)[0] for rest in _ANSWER_IS.split(text)[1:]]
    return [answer for one in found if (answer := one.replace("**", "").strip()) and normalise(answer)]


def without_echo(completion: str, prompt: str) -> str:
    """The completion without the prompt, if it repeats that whole, and without the prompt's longer answer lines."""
    text = completion
    if len(prompt.strip()) >= SHORTEST_ECHO:
        text = text.replace(prompt.strip(), "\n")
    lines = {line.strip() for line in prompt.splitlines() if len(line.strip()) >= SHORTEST_ECHO}
    echoed = {line for line in lines if _MARKER.search(line)}
    if not echoed:
        return text
    return "\n".join(line for line in text.splitlines() if line.strip() not in echoed)


def unreadable(answer: str) -> str:
    """Why no comparison reads such a tidied answer, or "" if one might."""
    if len(answer) > LONGEST_ANSWER:
        return f"{len(answer)} characters, {LONGEST_ANSWER} are read"
    if not answer.isascii():
        strange = next(character for character in answer if not character.isascii())
        return f"the character U+{ord(strange):04X} is no mathematics that is read"
    if r"\boxed" in answer:
        return "a box in the answer"
    depth = deepest = 0
    braces = 0
    for character in answer.replace(r"\{", "(").replace(r"\}", ")"):
        depth += (character in "([{") - (character in ")]}")
        braces += (character == "{") - (character == "}")
        deepest = max(deepest, depth)
        if braces < 0:
            return "unbalanced braces"
    if braces:
        return "unbalanced braces"
    if deepest > DEEPEST_ANSWER:
        return f"brackets {deepest} deep, {DEEPEST_ANSWER} are read"
    return ""


def takes_back(answer: str) -> bool:
    """Whether a tidied answer takes back or conditions what it says: "5 is wrong", "3 if x > 0"."""
    return _RETRACTED.search(answer) is not None


def tidy(answer: str) -> str:
    r"""The answer in one spelling of spaces, fractions, delimiters and upright text; `tidy(tidy(a)) == tidy(a)`."""
    if len(answer) > 2 * LONGEST_ANSWER:
        return answer  # too long to be read, and cut short it might be another answer
    text = _FOREIGN.sub(lambda match: _UNICODE[match.group()], _ROOT.sub(r"\\sqrt{\1}", answer))
    previous = None
    while text != previous:
        previous = text
        if (inner := _BOXED.fullmatch(text)) and r"\boxed" not in inner[1]:
            text = inner[1]
        text = _DELIMITERS.sub("", _THOUSANDS.sub("", text))
        text = _SPACES.sub(" ", text).replace("{,}", ",")
        text = _TEXT_COMMANDS.sub(r"\\text", _FRAC.sub(r"\\frac", text))
        text = _LOOSE_SPACE.sub("", text.strip().rstrip(".,;: "))
    return text


def number(tidied: str) -> Fraction | None:
    r"""The rational number that a tidied answer plainly is: 1,234.5, -7/3, \frac{1}{2}, 2\frac12, 0.\overline{3}."""
    if len(tidied) > LONGEST_NUMBER:
        return None
    text = normalise(tidied)
    if _RATIONAL.fullmatch(text):
        return Fraction(text)
    if match := _FRACTION.fullmatch(text):
        sign, whole, top, bottom, long_top, long_bottom = match.groups()
        part = Fraction(int(top or long_top), int(bottom or long_bottom) or 1)
        if int(bottom or long_bottom) == 0 or (whole and part >= 1):
            return None
        return (-1 if sign == "-" else 1) * (int(whole or 0) + part)
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, cycle = match.groups()
        value = Fraction(int(f"{whole or 0}{fixed}"), 10 ** len(fixed))
        value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
        return -value if sign == "-" else value
    return None


def words(tidied: str) -> str | None:
    r"""The words that an answer plainly is, in small letters: \text{Evelyn}, no, even function."""
    text = _TEXT.sub(r" \1 ", tidied)
    text = " ".join(text.split()).strip(". ")
    if not _WORDS.fullmatch(text):
        return None
    return text.casefold() if _TEXT.fullmatch(tidied.strip()) or _WORDY.fullmatch(text) else None


def choice(tidied: str) -> str | None:
    r"""The letter of a multiple choice that an answer plainly is: A, (A), \text{(A)}, \text{(A)} 5."""
    text = _TEXT.sub(r" \1 ", tidied).strip()
    match = _CHOICE.fullmatch(text) or _CHOICE_WITH_VALUE.fullmatch(text)
    return match[1] if match else None


def is_evident(gold: str) -> bool:
    """Whether a tidied ground truth is a number, words or a choice: usable, and no work for a parser."""
    return number(gold) is not None or words(gold) is not None or _CHOICE.fullmatch(gold) is not None


def compare(gold: str, answer: str) -> bool | None:
    """Whether two tidied answers are equal, or None where that takes algebra."""
    if gold == answer:
        return True
    one, other = number(gold), number(answer)
    if one is not None and other is not None:
        return _compare_numbers(one, other, rounded="." in gold + answer)
    if (one_row := _row(gold)) and (other_row := _row(answer)) and one_row[0] == other_row[0]:
        pairs = zip(one_row[1], other_row[1], strict=True)
        verdicts = [_compare_numbers(a, b, rounded="." in gold + answer) for a, b in pairs]
        return False if False in verdicts else None if None in verdicts else True
    said, saying = words(gold), words(answer)
    if said is not None:
        return said == (saying or " ".join(_TEXT.sub(r" \1 ", answer).split()).strip(". ").casefold())
    if _CHOICE.fullmatch(_TEXT.sub(r"\1", gold)) and (picked := choice(answer)):
        return picked == choice(gold)
    return None


def _compare_numbers(one: Fraction, other: Fraction, *, rounded: bool) -> bool | None:
    """None where one might be the other rounded, as math-verify allows."""
    if one == other:
        return True
    far = abs(one - other) > Fraction(1, 10_000) * max(abs(one), abs(other))
    return False if far or not rounded else None


def _row(tidied: str) -> tuple[tuple[str, str, int], list[Fraction]] | None:
    """The brackets and the length of a point or an interval, and its numbers if all are plain; else None."""
    if not tidied.startswith(("(", "[")) or not tidied.endswith((")", "]")) or len(tidied) > LONGEST_ANSWER:
        return None
    numbers = [value for part in tidied[1:-1].split(",") if (value := number(part.strip())) is not None]
    count = tidied.count(",") + 1
    return ((tidied[0], tidied[-1], count), numbers) if count > 1 and len(numbers) == count else None
