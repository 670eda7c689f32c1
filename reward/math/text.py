r"""Mathematical answers as text: where a completion states its answer, and what can be compared without algebra.

Nothing here evaluates or parses mathematics: regular expressions in linear time, strings, and rational numbers of
bounded length. `compare` answers only where it is sure, and leaves the rest to the workers of
`reward.math.answer`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import combinations

from reward.math.final_answer import boxed_answers, last_answers, normalise, together, without_thought
from reward.math.value import (
    RETRACTED,
    TEXT,
    Quantity,
    choice,
    clock,
    in_base,
    is_choice,
    is_in_base,
    is_nothing,
    is_reals,
    named,
    number,
    quantity,
    same_quantity,
    words,
)

LONGEST_ANSWER = 1000
"""Characters; more is no final answer."""
DEEPEST_ANSWER = 40
"""Open brackets of all kinds; more is no final answer."""
LONGEST_CLAUSE = 200
"""Characters before "the answer is" in which it may be supposed only."""
MOST_LISTED = 20
"""Boxes of a gold solution that are read as one list."""
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
    "≈": r"\approx ",
    "ℝ": r"\mathbb{R}",
    "…": r"\ldots ",
    "“": '"',
    "”": '"',
    "’": "'",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "²": "^{2}",
    "³": "^{3}",
    "₂": "_{2}",
    "₁₀": "_{10}",
    "€": "",
    "£": "",
    "¥": "",
    "₹": "",
    "¢": r"\text{ cents}",
} | {
    letter: rf"\{name} "
    for letter, name in zip(
        "αβγδεθλμπσφω",
        ("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "pi", "sigma", "phi", "omega"),
        strict=True,
    )
}
"""What an honest answer may hold beyond ASCII. No digit and no Latin letter: those have look-alikes."""
_FOREIGN = re.compile("|".join(map(re.escape, _UNICODE)))
_ROOT = re.compile(r"√(\d+|[a-z])(?!\w)", re.ASCII)

_GAP = r"(?:[\s$~{}]|\\(?:[,;: ()\[\]]|(?:q?quad|text|mathrm)(?![a-zA-Z])))*+"
_LISTED = re.compile(
    rf"{_GAP}(?:,{_GAP}(?:(?:and|or)\b)?|(?:and|or)\b){_GAP}(?:[a-zA-Z](?:_\{{?\w+\}}?)?\s*={_GAP})?", re.IGNORECASE
)
"""What stands between boxes that a gold solution lists, within a sentence: a comma, "and" or "or", and a name."""

_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
_ANSWER_IS = re.compile(
    r"\b(?:the[ \t]+)?(?:(?:final|correct)[ \t]+)?(?:answer|final result)(?:\*\*)?[ \t]+is\b[ \t]*:?"
    r"(?:[ \t]*\b(?:therefore|thus|then|hence|simply|just|exactly|approximately|about|equal to|indeed|clearly|obviously)\b)*"
    r"|^[ \t#>*]*(?:the )?(?:final |correct )?answer(?:\*\*)?[ \t]*:(?!\w)",
    re.IGNORECASE | re.MULTILINE,
)
_LINES_BELOW = re.compile(
    r"(?:(?:(?<=:)|[ \t*]*:)[ \t*]*\n\s*|[ \t*]*\n\s*(?=\$\$|\\\[))(?:(?:\$\$|\\\[)\s*)?", re.MULTILINE
)
"""What stands between "the answer is" and the answer where that has lines of its own."""
_HEADING = re.compile(
    r"^[ \t]*(?:[#*][ \t#*]*(?:the )?(?:final )?|(?:the )?final )answer[ \t:*]*\n\s*(?:(?:\$\$|\\\[)\s*)?(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_NO_ANSWER_YET = re.compile(r"(?:the )?(?:final )?answer[ \t:*]*", re.IGNORECASE)
"""A heading, with the answer in the lines below it."""
_SUPPOSED = re.compile(r"\b(?:if|suppose|assume|assuming|whether|unless|guess)\b[^.!?\n]*\Z", re.IGNORECASE)
_DENIED = re.compile(r"[ \t]*(?:not|wrong|incorrect)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"[.!](?:\s|\**$)|(?<=\*\*)!|,? (?:because|since|as|which|where|so|when)\b|, (?=(?!and\b|or\b)[a-z]{2})",
    re.IGNORECASE,
)
_MARKER = re.compile(r"\\boxed|####|answer is", re.IGNORECASE)

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)
_DELIMITERS = re.compile(
    r"\\[()\[\]]|\\?\$|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|[lL]arge|LARGE|[hH]uge|bf|rm|it)(?![a-zA-Z])|\\!"
)
_INVISIBLE = re.compile(
    r"\\[hv]?phantom\{[^{}]*\}|\\[hv]space\*?\{[^{}]*\}|\\color\{[a-z]+\}|\\(?:label|tag)\{[^{}]*\}"
)
_COLOURED = re.compile(r"\\(?:textcolor\{[a-z]+\}|underline)(?=\{)")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\\!\s*|\\[,!]|\{,\})(?=[0-9]{3}(?![0-9]))")
_DECIMAL_COMMA = re.compile(r"(?<![0-9.}])(0|[0-9]+(?=\{,\}(?![0-9]{3}(?![0-9]))))\{,\}(?=[0-9]+(?!\{,\}|[0-9]))")
"""Not that of 1{,}000 and of 1{,}2{,}3."""
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.,] )(?<![0-9.,])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9]| [0-9])")
_COMMA_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])")
_LIST_OF_THREES = re.compile(r"(?<=[0-9]),(?:\s|~|\\[ ;:]|\\q?quad(?![a-zA-Z]))+(?=[0-9]{3}(?![0-9]))")
_ESCAPED_TWICE = re.compile(r"\\(?=\\[a-zA-Z])")
_EULER_MINUS = re.compile(r"(?<=[0-9])e(?= [-+] ?[0-9])")
_DIFFERENCE = r"(?:[2-9]|[1-9][0-9]+)e[-+][1-9][0-9]{0,2}"
"""Such as 2e-1, which may be 0.2 and may be one less than 2e: as a whole answer it stays as it is, and is equal to both."""
_SCIENTIFIC = re.compile(
    rf"(?<![A-Za-z0-9.\\_^{{])(?!\A{_DIFFERENCE}\Z)([0-9]+\.?[0-9]*|\.[0-9]+)[eE]\+?(-?[0-9]{{1,3}})(?![0-9A-Za-z.])"
)
_SPACES = re.compile(r"(?:(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z])|$)|~|\s)+")
_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_BLANK_BOX = re.compile(
    r"\\(?:boxed|fbox)\s*\{(?:\\(?:[ ,;:!]|q?quad(?![a-zA-Z])|square|[hv]?phantom\{[^{}]*\})|[\s$~?_.])*\}"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TEXT_COMMANDS = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)|math(?:rm|bf|it|sf)|boldsymbol|bm|mbox|operatorname)(?=\s*\{)"
)
_UNWORDED_TEXT = re.compile(r"\\text\{\s*([+-]?[0-9][^{}]*|(?![^{}]*[A-Za-z]{2})[^{}]*)\}")
_CONSTANT = re.compile(r"\\text\{\s*([ei])\s*\}")
_FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SYNONYMS = {
    "varnothing": r"\emptyset ",
    "leq": r"\le ",
    "leqslant": r"\le ",
    "geq": r"\ge ",
    "geqslant": r"\ge ",
    "neq": r"\ne ",
    "lt": "<",
    "gt": ">",
    "colon": ":",
    "dots": r"\ldots ",
    "cdots": r"\ldots ",
    "degree": r"^\circ ",
    "lbrace": r"\{",
    "rbrace": r"\}",
    "vert": "|",
}
_SYNONYM = re.compile(rf"\\({'|'.join(_SYNONYMS)})(?![a-zA-Z])")
_DOTS = re.compile(r"\.\.\.+")
_REALS = re.compile(r"\\(?:mathbb|Bbb|mathbf)(?: ?([RZQNC])(?![a-zA-Z])|\{([RZQNC])\})")
_LEADING = re.compile(r"^(?:=|\\(?:approx|sim|simeq)(?![a-zA-Z])|:)\s*")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")


def stated_answers(completion: str, prompt: str) -> list[str]:
    r"""The answers that a completion states, in order, without blank ones.

    The last `\boxed{}`, with those before it that are offered together with it; where there is no box, the last line
    `#### answer` and the earlier ones that are another number; where there is none, what follows "the answer is" or
    "Answer:" up to the end of the clause, or the line below the last of them or below such a heading. Where there is `<answer>…</answer>`, only what it holds. What the completion
    thinks in `<think>…</think>`, supposes ("if the answer is 12"), or repeats of its prompt does not count.
    """
    text = without_thought(without_echo(completion, prompt))
    before, closed, _ = text.rpartition("</answer>")
    _, tagged, inside = before.rpartition("<answer>")
    if closed and tagged:
        text = inside
    text = _BLANK_BOX.sub("", text)
    if _BOX_COMMAND.search(text):
        found = [f"{label}={content}" if label else content for label, content in last_answers(text)]
    elif closed and tagged:
        found = _clauses(text) or [text]
    elif (hashes := _HASHES.findall(text)) and not _NO_ANSWER_YET.fullmatch(hashes[-1]):
        # Headings of the fourth level look the same, so that of the earlier ones only numbers are answers.
        hashes = [_ANSWER_IS.sub("", line, count=1) if _ANSWER_IS.match(line) else line for line in hashes]
        found = [line for line in hashes[:-1] if number(tidy(line)) is not None] + hashes[-1:]
        *earlier, last = _HASHES.finditer(text)
        if earlier and not any(number(tidy(line)) is not None for line in hashes):
            found = _clauses(text[last.end() :]) or found  # all of them are headings
    else:
        found = _HEADING.findall(text) or _clauses(text)
    return [answer for one in found if (answer := one.replace("**", "").strip()) and normalise(answer)]


def gold_answer(solution: str) -> str | None:
    r"""What a gold solution ends in, as one answer; blank where its last box is, None where it has none.

    Boxes that it lists are one answer of several where they are plain numbers, or points of them, that surely differ; else
    they may be one answer written twice, as `\boxed{\frac12} or \boxed{0.5}` and `\boxed{5}, \boxed{5\text{ cm}}` are.
    """
    found = last_answers(solution, _LISTED) or [("", content) for content in boxed_answers(solution)[-1:]]
    if 1 < len(found) <= MOST_LISTED:
        rows = [_numbers(tidy(content)) for _, content in found]
        if all(_surely_differ(one, other) for one, other in combinations(rows, 2)):
            return together(found)
    return found[-1][1] if found else None


def _clauses(text: str) -> list[str]:
    """What a text says that the answer is, unless it supposes or denies it."""
    found, matches = [], list(_ANSWER_IS.finditer(text))
    for before, match, after in zip([None, *matches], matches, [*matches[1:], None], strict=False):
        lead = text[max(before.end() if before else 0, match.start() - LONGEST_CLAUSE) : match.start()]
        below = None if after else _LINES_BELOW.match(text, match.end())
        start = below.end() if below else match.end()
        rest = text[start : min(after.start() if after else len(text), start + LONGEST_ANSWER + 1)]
        if not _SUPPOSED.search(lead) and not _DENIED.match(rest):
            found.append(_SENTENCE_END.split(rest.split("\n", 1)[0], maxsplit=1)[0])
    return found


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
    if _BOX_COMMAND.search(answer):
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
    return RETRACTED.search(answer) is not None


def tidy(answer: str) -> str:
    r"""The answer in one spelling of spaces, fractions, delimiters and upright text; `tidy(tidy(a)) == tidy(a)`."""
    if len(answer) > 2 * LONGEST_ANSWER:
        return answer  # too long to be read, and cut short it might be another answer
    text = _FOREIGN.sub(lambda match: _UNICODE[match.group()], _ROOT.sub(r"\\sqrt{\1}", answer))
    previous = None
    while text != previous:
        previous = text
        text = _tidied_once(text)
    return text


def _tidied_once(text: str) -> str:
    if (inner := _BOXED.fullmatch(text)) and not _BOX_COMMAND.search(inner[1]):
        text = inner[1]
    if r"\begin" not in text:
        text = _ESCAPED_TWICE.sub("", text)
    text = _DECIMAL_COMMA.sub(r"\1.", _EULER_MINUS.sub(r"\\cdot e", text))
    text = _INVISIBLE.sub("", _COLOURED.sub("", _LIST_OF_THREES.sub(";", _THOUSANDS.sub("", text))))
    if ", " in text:  # what separates, so that the other commas group digits
        text = _COMMA_THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    text = _DELIMITERS.sub("", text.replace("**", ""))
    text = _SYNONYM.sub(lambda match: _SYNONYMS[match[1]], _DOTS.sub(r"\\ldots ", text))
    text = _SPACES.sub(" ", text).replace("{,}", ",")
    text = _SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)
    text = _TEXT_COMMANDS.sub(r"\\text", _FRAC.sub(r"\\frac", text))
    text = _REALS.sub(r"\\mathbb{\1\2}", _CONSTANT.sub(r"\1", text))
    text = _LEADING.sub("", text.strip().rstrip(".,;:` ").lstrip("` "))
    if match := _UNWORDED_TEXT.fullmatch(text):
        text = match[1]
    if text.startswith("{") and text.endswith("}") and _closes_at_end(text):
        text = text[1:-1]
    return _SCIENTIFIC.sub(r"\1\\times 10^{\2}", _LOOSE_SPACE.sub("", text))


def readings(tidied: str) -> list[str]:
    r"""What a tidied answer may say: 2e-1 is 2\times 10^{-1} too."""
    if not re.fullmatch(_DIFFERENCE, tidied):
        return [tidied]
    factor, _, exponent = tidied.partition("e")
    return [tidied, rf"{factor}\times 10^{{{exponent.removeprefix('+')}}}"]


def _closes_at_end(text: str) -> bool:
    """Whether the brace that opens the text is closed by its last character."""
    depth = 0
    for position, brace in ((match.start(), match.group()) for match in _BRACE.finditer(text)):
        depth += (brace == "{") - (brace == "}")
        if depth == 0:
            return position == len(text) - 1
    return False


def is_evident(gold: str) -> bool:
    """Whether a tidied ground truth is a number, words, a choice or a time: usable, and no work for a parser."""
    plain = (quantity(gold), words(gold), clock(gold))
    return (
        gold == r"\ldots"
        or any(value is not None for value in plain)
        or any(says(gold) for says in (is_choice, is_in_base, is_nothing, is_reals))
    )


def compare(gold: str, answer: str) -> bool | None:
    """Whether two tidied answers are equal, or None where that takes algebra."""
    if gold == answer or any(says(gold) and says(answer) for says in (is_nothing, is_reals)):
        return True
    if r"\ldots" in (gold, answer):
        return False
    if is_in_base(gold) or is_in_base(answer):
        return in_base(gold) == in_base(answer)
    if (time := clock(gold)) and (other_time := clock(answer)):
        return time[:2] == other_time[:2] and (time[2] == other_time[2] or "" in (time[2], other_time[2]))
    one, other = quantity(gold), quantity(answer)
    if one is not None and other is not None:
        return same_quantity(one, other)
    if (one_row := _row(gold)) and (other_row := _row(answer)) and one_row[0] == other_row[0]:
        return all(same_quantity(a, b) for a, b in zip(one_row[1], other_row[1], strict=True))
    said, saying = words(gold), words(answer)
    if said is not None and not (is_reals(gold) or is_nothing(gold)):
        if saying is not None and " and " in said:
            return named(said) == named(saying)
        return said == (saying or " ".join(TEXT.sub(r" \1 ", answer).split()).strip(". ").casefold())
    if (is_choice(gold) or (gold.startswith((r"\text{(", "(")) and is_choice(answer))) and (picked := choice(answer)):
        asked = choice(gold)  # "(B) 12" too, as contests' keys are published
        return None if asked is None else picked == asked
    return None


_SCALED = re.compile(r"times|cdot|\^|e|\A\Z")
"""In a number as it was written, what says that its last decimal counts something else, such as a power of ten; a number of words is not written."""
_Row = tuple[tuple[str, str, int], list[Quantity]]
"""The brackets and the length of a point or an interval, and its numbers."""


def _row(tidied: str) -> _Row | None:
    """A point or an interval whose numbers are all plain; else None."""
    if not tidied.startswith(("(", "[")) or not tidied.endswith((")", "]")) or len(tidied) > LONGEST_ANSWER:
        return None
    numbers = [value for part in tidied[1:-1].split(",") if (value := quantity(part.strip())) is not None]
    count = tidied.count(",") + 1
    return ((tidied[0], tidied[-1], count), numbers) if count > 1 and len(numbers) == count else None


def _numbers(tidied: str) -> _Row:
    """A row, or a plain number as one without brackets; of anything else, a row without numbers."""
    return _row(tidied) or (("", "", 1), [value] if (value := quantity(tidied)) else [])


def _surely_differ(one: _Row, other: _Row) -> bool:
    """Whether numbers of the same units differ, none of them being the other rounded."""
    (shape, values), (other_shape, others) = one, other
    if not values or shape != other_shape or [each.unit for each in values] != [each.unit for each in others]:
        return False
    if any(_SCALED.search(each.written) for each in (*values, *others)):
        return False
    return any(
        abs(each.value - its.value) >= max(_last_place(each), _last_place(its)) and each.value != its.value
        for each, its in zip(values, others, strict=True)
    )


def _last_place(number: Quantity) -> Fraction:
    """What the last decimal of a number counts; 0 where it has no decimal point."""
    _, point, decimals = number.written.partition(".")
    return Fraction(1, 10 ** len(decimals)) if point else Fraction(0)
