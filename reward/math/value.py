r"""Plain values of tidied answers: numbers with their units, digits in a base, times of day, words, choices.

Nothing here evaluates mathematics: regular expressions in linear time and rational numbers of bounded length.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from reward.math.final_answer import LONGEST_NUMBER, normalise

TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")

_FRACTION = re.compile(r"([+-]?)([1-9][0-9]*)?\\frac(?:([0-9])([1-9])|\{(-?[0-9]+)\}\{(-?[0-9]+)\})")
_MIXED = re.compile(r"([+-]?)([0-9]+) ([0-9]+)/([1-9][0-9]*)")
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\{([0-9]+)\}")
_RATIONAL = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+|/0*[1-9][0-9]*)?")
_EXPONENT = r"(?:\^|\*\*)(?:\{\+?(-?[0-9]{1,3})\}|\(\+?(-?[0-9]{1,3})\)|\+?(-?[0-9]{1,3}))"
_SCIENTIFIC = re.compile(
    r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:e\+?(-?[0-9]{1,3})|(?:\\times|\\cdot|\*|x) ?10" + _EXPONENT + ")"
)
_POWER_OF_TEN = re.compile("([+-]?)10" + _EXPONENT)
_DECIMAL = re.compile(r"[+-]?([0-9]*)\.([0-9]+)")

_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SHORT_UNITS = r"mm|cm|dm|km|mg|kg|ml|mL|ms|sec|min|hrs?|ft|yd|lbs?|oz|mph|kJ|kW|Hz|Pa|am|pm|AM|PM|a\.m\.?|p\.m\.?"
_LETTER_UNITS = "[mgslLhJWVANKCF]|in|mi"
"""Units only after a space: `5 m` is a length and `5m` a product."""
_POWER = r"(?:\^\{?-?[0-9]\}?| squared| cubed)?"
_ONE_TEXT_UNIT = rf"\\text\{{(?:[A-Za-z%][A-Za-z .'/^0-9%-]*|\([A-Za-z%][A-Za-z .'/^0-9%-]*\))\}}{_POWER}"
_UNIT = re.compile(
    rf"(?P<value>.*[0-9A-Za-z)}}\]!|])(?P<unit>(?:(?:/|\\cdot)?{_ONE_TEXT_UNIT})+|\\frac\{{{_ONE_TEXT_UNIT}\}}\{{{_ONE_TEXT_UNIT}\}}"
    r"|\^\{?(?:\\text\{)?(?:st|nd|rd|th)\}{0,2}|\\?%|\^\{?\\circ\}?(?: ?[CF]|\\text\{[CF]\})?)",
    re.DOTALL,
)
_WORD_UNIT = re.compile(
    rf"(?P<value>[^A-Za-z]*[0-9}}]|.*\}})(?P<unit>(?:st|nd|rd|th)| ?(?:{_SHORT_UNITS}){_POWER}"
    rf"| (?:{_SHORT_UNITS}|{_LETTER_UNITS})(?:/(?:{_SHORT_UNITS}|{_LETTER_UNITS}))?{_POWER}"
    rf"| ?(?:{_SHORT_UNITS})/(?:{_SHORT_UNITS}|{_LETTER_UNITS}){_POWER}"
    rf"| ?\((?:(?=[^()]*(?:[A-Za-z]{{3}}|%|/))[A-Za-z% .,/'-]+|{_SHORT_UNITS})\)"
    rf"| [A-Za-z][A-Za-z.'/-]{{2,}}(?: [A-Za-z.'/-]+)*{_POWER})"
)
_DOUBTS = "wrong|incorrect|except|if|else|unless|maybe"
RETRACTED = re.compile(rf"\b(?:not|never|either|{_DOUBTS})\b|n't\b", re.IGNORECASE)
_NO_UNIT = re.compile(
    r"\b(?:and|or|pi|sqrt|mod|sin|cos|tan|log|ln|factorial|times|plus|minus|over|to|base|than|squared|cubed|halves|thirds?"
    r"|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million)ths?|choose|remainder|of [a-z])\b",
    re.IGNORECASE,
)
"""What makes an expression of a number, unless it is among the `_ENDINGS` of a unit."""
_UNITS = """
mm millimeter millimetre|cm centimeter centimetre|dm decimeter decimetre|m meter metre|km kilometer kilometre|in inch inche
ft foot feet|yd yard|mi mile|mg milligram|g gram|kg kilogram|oz ounce|lb pound|ton tonne|ms millisecond|s sec second|min minute|h hr hour
day|week|month|year yr|ml milliliter millilitre|l liter litre|gallon|dollar|cent|euro|am|pm|j joule|kj kilojoule|w watt|kw kilowatt|v volt
a ampere|n newton|k kelvin|c celsius|f fahrenheit|hz hertz|pa pascal|times
"""
_EXCLUSIVE = {name: names.split()[0] for names in re.split(r"[|\n]", _UNITS.strip()) for name in names.split()}
"""Units of which one is never the other, by what they are called; unknown ones are taken to say the same in other words."""
_ENDINGS = re.compile(
    rf"(?:^|\bper |/)(?!times)(?:m|s|units?|(?:{'|'.join(name for name in _EXCLUSIVE if len(name) > 1)})s?) (?:squared|cubed)$"
    r"|\b(?:times(?: as (?:many|much)| (?:a|per|each|every) (?:second|minute|hour|day|week|month|year))?|left over|to go)$",
    re.IGNORECASE,
)
"""5 cm squared, 5 times a day, 2 left over and 5 to go are quantities; 5 squared and 5 times ten are expressions."""
_RATES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h"}

_BASE = re.compile(r"\(?([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\)?_(?:\{(?:\\text\{)?([a-z]+|[0-9]+)\}?\}|([0-9]))")
_BASES = {
    name: str(base)
    for base, name in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=2)
}
_TIME = re.compile(r"([0-9]{1,2}):([0-5][0-9]) ?(?:([ap])\.? ?m\.?)?", re.IGNORECASE)

_CHOICE = re.compile(r"\(?([A-J])[).]?")
_LETTER = r"(?:(?i:option|choice|answer) ?:? ?)?(?:\(([A-J])\)[.:]?|([A-J])(?:[.:)]|$))"
_CHOICE_WITH_VALUE = re.compile(rf"{_LETTER}(?!\s*(?:or\b|and\b|[,;^+*/=-]))(?!.*\b[A-J]\b).*", re.DOTALL)
_CHOICE_WITH_TEXT = re.compile(
    rf"{_LETTER}\s*(?:A (?!(?:or|and|is|was)\b)(?=[a-z])|(?=[A-Z]))(?!.*\b(?:[A-HJ]|I(?! only| (?:and|or) I|,I))\b)"
    rf"(?!.*\b(?i:{_DOUBTS}|not (?:correct|right|true|it|this|that))\b|Not\W*$).*",
    re.DOTALL,
)
"""A choice with a text that begins with a capital, which may say "not", "A triangle" or "I and II", but names no other choice."""
_NOTHING = re.compile(r"\\emptyset|\\\{\\\}|(?:there (?:is|are) )?no (?:real )?solutions?", re.IGNORECASE)
_REALS = re.compile(
    r"(?:[a-z]\\in ?)?\\mathbb\{R\}|\(-\\infty,\+?\\infty\)|(?:[a-z] is )?(?:the set of )?all (?:the )?real(?:s| numbers| values)?(?: of [a-z]| [a-z])?"
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
_WORDY = re.compile(r"[A-Z][a-z]{2,}|yes|no|true|false|[a-z]{3,} [a-z ]*[a-z]{3,}", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A number and the unit after it; `written` is the number's own text, `unit` "" where there is none."""

    value: Fraction
    written: str
    unit: str = ""


def number(tidied: str) -> Fraction | None:
    r"""The rational number that a tidied answer plainly is: 1,234.5, -7/3, \frac{1}{2}, 2\frac12, 0.\overline{3}, 3\times 10^{5}."""
    if len(tidied) > LONGEST_NUMBER:
        return None
    text = normalise(tidied)
    if _RATIONAL.fullmatch(text):
        return Fraction(text)
    if match := _FRACTION.fullmatch(text):
        sign, whole, top, bottom, long_top, long_bottom = match.groups()
        if int(bottom or long_bottom) == 0:
            return None
        part = Fraction(int(top or long_top), int(bottom or long_bottom))
        if whole and not 0 <= part < 1:
            return None
        return (-1 if sign == "-" else 1) * (int(whole or 0) + part)
    if match := _MIXED.fullmatch(text):
        part = Fraction(int(match[3]), int(match[4]))
        return (-1 if match[1] == "-" else 1) * (int(match[2]) + part) if part < 1 else None
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, cycle = match.groups()
        value = Fraction(int(f"{whole or 0}{fixed}"), 10 ** len(fixed))
        value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
        return -value if sign == "-" else value
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(next(filter(None, match.groups()[1:])))
    if match := _POWER_OF_TEN.fullmatch(text):
        return Fraction(f"{match[1]}1") * Fraction(10) ** int(next(filter(None, match.groups()[1:])))
    return None


def same_number(one: Fraction, other: Fraction, written: str, other_written: str) -> bool:
    """Whether two numbers are one, or one of them is the other rounded or cut off at six decimals or more.

    A number of 15 significant digits or more is a binary floating-point number written out, and equal within its error.
    """
    if one == other:
        return True
    for exact, rounded, text in ((one, other, other_written), (other, one, written)):
        match = _DECIMAL.fullmatch(normalise(text))
        if not match:
            continue
        digits, scale = len((match[1] + match[2]).lstrip("0")), 10 ** len(match[2])
        if len(match[2]) >= 6 <= digits and rounded * scale in (round(exact * scale), int(exact * scale)):
            return True
        if digits >= 15 and abs(exact - rounded) <= abs(exact) / 10**14:
            return True
    return False


def split_unit(tidied: str) -> tuple[str, str]:
    r"""A tidied answer without its unit, and that: ("29", "cm") of `29\text{cm}`; ("5t", "") of the product `5t`.

    Plain words are a unit only after a plain number, `\text{}` after anything.
    """
    match = _UNIT.fullmatch(tidied)
    if match is None and len(tidied) <= 2 * LONGEST_NUMBER:
        match = _WORD_UNIT.fullmatch(tidied)
        if match and number(match["value"]) is None:
            return tidied, ""
    if match is None:
        return tidied, ""
    unit = " ".join(TEXT.sub(r" \1 ", match["unit"]).split()).strip("() ")
    return (tidied, "") if _NO_UNIT.search(_ENDINGS.sub("", unit)) or RETRACTED.search(unit) else (match["value"], unit)


def quantity(tidied: str) -> Quantity | None:
    r"""The number with its unit that a tidied answer plainly is: 29, 29 apples, 1.2\text{ million}, 25\%, 2 (coats)."""
    if (value := number(tidied)) is not None:
        return Quantity(value, tidied)
    text, unit = split_unit(tidied)
    value = number(text) if unit else None
    if value is None:
        return None
    scale, _, rest = unit.partition(" ")
    if scale.casefold() in _SCALES:
        return Quantity(value * 10 ** _SCALES[scale.casefold()], "", rest)
    return Quantity(value, text, unit)


def _known_unit(unit: str) -> tuple[str, Counter[str]] | None:
    """A unit by its abbreviation, and what it is divided by, how many times; None where one of them is not among those of which one is never the other."""
    spelled = re.sub(r"^times (?:a|each|every) ", "times/", re.sub(" (?:left over|to go)$", "", unit.lower()))
    spelled = re.sub(r"[.\s{}]", "", spelled).replace("squared", "^2").replace("cubed", "^3")
    whole, _, power = spelled.partition("^")
    parts = re.split(r"/|(?<=\w)per(?=\w)", _RATES.get(whole, whole))
    first, *below = [_EXCLUSIVE.get(part) or _EXCLUSIVE.get(part.removesuffix("s"), "") for part in parts]
    if not first or not all(below):
        return None
    times = Counter(below)
    if below and power.isdigit():
        times[below[-1]] += int(power) - 1
    elif power:
        first = f"{first}^{power}"
    return first, times


def same_quantity(one: Quantity, other: Quantity) -> bool:
    """Whether two quantities are equal; a unit that one of them lacks is taken for granted, so is what it is divided by, and a per cent sign."""
    units = [known for each in (one, other) if (known := _known_unit(each.unit))]
    if len({first for first, _ in units}) > 1 or len({frozenset(below.items()) for _, below in units if below}) > 1:
        return False
    if same_number(one.value, other.value, one.written, other.written):
        return True
    shares = [each for each in (one, other) if is_percent(each.unit)]
    return len(shares) == 1 and shares[0].value / 100 == (other if shares[0] is one else one).value


def is_percent(unit: str) -> bool:
    """Whether a unit says hundredths."""
    return unit in ("%", r"\%", "percent", "per cent")


def in_base(tidied: str) -> tuple[str, str] | None:
    r"""Digits and base: ("1011", "2") of `1011_{2}` and of `1011_{\text{two}}`; a plain whole number is in base 10."""
    if match := _BASE.fullmatch(tidied):
        base = match[2] or match[3]
        return match[1].lstrip("0").upper() or "0", _BASES.get(base, base)
    value = number(tidied)
    return None if value is None else (str(value), "10")


def is_in_base(tidied: str) -> bool:
    """Whether the base of a number is written out."""
    return _BASE.fullmatch(tidied) is not None


def clock(tidied: str) -> tuple[int, int, str] | None:
    """Hour, minute and "a", "p" or "" of a time of day such as 10:30 p.m."""
    match = _TIME.fullmatch(TEXT.sub(r" \1", tidied).strip())
    return (int(match[1]), int(match[2]), (match[3] or "").lower()) if match else None


def words(tidied: str) -> str | None:
    r"""The words that an answer plainly is, in small letters: \text{Evelyn}, no, even function."""
    text = " ".join(TEXT.sub(r" \1 ", tidied).split()).strip(". ")
    if not _WORDS.fullmatch(text):
        return None
    if not TEXT.fullmatch(tidied.strip()) and not _WORDY.fullmatch(text):
        return None
    return re.sub(r"^(?:an?|the) ", "", text.casefold())


def named(said: str) -> list[str]:
    """The members of an enumeration in words, in alphabetical order: anna and ben."""
    return sorted(re.split(r",(?: and)? ?| and ", said))


def is_nothing(tidied: str) -> bool:
    """Whether an answer says that there is none."""
    return _NOTHING.fullmatch(TEXT.sub(r"\1", tidied).strip()) is not None


def is_reals(tidied: str) -> bool:
    """Whether an answer is the whole real line."""
    return _REALS.fullmatch(TEXT.sub(r"\1", tidied).strip()) is not None


def choice(tidied: str) -> str | None:
    r"""The letter of a multiple choice that an answer plainly is: A, (A), \text{(A)} 5, Option A, A. 14, A. Not both."""
    text = TEXT.sub(r" \1 ", tidied).strip()
    if match := _CHOICE.fullmatch(text):
        return match[1]
    match = _CHOICE_WITH_VALUE.fullmatch(text) or _CHOICE_WITH_TEXT.fullmatch(text)
    return match[1] or match[2] if match else None


def has_own_text(tidied: str) -> bool:
    """Whether an answer is a choice with a text, whose "not" takes nothing back."""
    return _CHOICE_WITH_TEXT.fullmatch(TEXT.sub(r" \1 ", tidied).strip()) is not None


def is_choice(tidied: str) -> bool:
    """Whether an answer is the letter of a choice and nothing else."""
    return _CHOICE.fullmatch(TEXT.sub(r"\1", tidied)) is not None
