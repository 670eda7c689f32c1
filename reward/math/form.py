r"""The shape of a tidied answer: lists, points, intervals, equations, so that algebra is asked about single values only.

`read` takes an answer apart by its brackets, commas, conjunctions and relations, without evaluating anything;
`equal` compares two such forms and leaves what is no form any more to a function of two texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from string import ascii_lowercase

from reward.math.value import is_reals, number, split_unit

DEEPEST = 8
"""Forms within forms; deeper ones are compared as text."""
MOST_PAIRS = 400
"""Pairs of members of two unordered lists; longer lists are compared in their order."""
UNORDERED = ({","}, {"{}"}, {",", "{}"}, {"∪"})
"""The ends of two forms whose members may come in any order."""
Same = Callable[[str, str], bool | None]

_OPEN, _CLOSE = r"(?P<open>\\\{|[{(\[])", r"(?P<close>\\\}|[})\]])"
_LIST = r"[,;]|\\text\{[ ,]*(?:and|or)[ ,]*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:lor|land|vee)(?![a-zA-Z])"
_RELATION = r"\\(?:le|ge|ne|in|approx|simeq|equiv)(?![a-zA-Z])|[<>=]=?"
_SEPARATORS = {
    name: re.compile(rf"(?P<separator>{pattern})|{_OPEN}|{_CLOSE}|\\[a-zA-Z]+|\\.", re.DOTALL)
    for name, pattern in {
        "list": _LIST,
        "comma": "[,;]",
        "union": r"\\cup(?![a-zA-Z])",
        "relation": _RELATION,
        "bar": r"\\mid(?![a-zA-Z])|\||:",
        "ratio": ":",
        "rows": r"\\\\",
        "none": "(?!)",
    }.items()
}
_SUBSCRIPT = r"_(?:\{[^{}]*\}|\\[a-zA-Z]+|[A-Za-z0-9])"
_FUNCTIONS = (
    "sqrt|frac|sin|cos|tan|cot|sec|csc|arc[a-z]+|log|ln|exp|pi|infty|pm|mp|sum|int|prod|lim|binom|begin|cdot|times|text"
)
_NAME = re.compile(
    rf"(?:\([A-Za-z](?:,[A-Za-z])*\)|(?:[A-Za-z]|\|[A-Z]{{2}}\||\\(?!(?:{_FUNCTIONS})(?![a-zA-Z]))[a-zA-Z]+(?![a-zA-Z])|\\text\{{[A-Za-z .'()-]+\}})"
    rf"(?:[A-Za-z ']|{_SUBSCRIPT}|\^\{{-1\}}|\((?:[^()]|\([^()]*\))*\)|\{{[A-Za-z\\ ]*\}}|\\(?!(?:{_FUNCTIONS})(?![a-zA-Z]))[a-zA-Z]+(?![a-zA-Z])"
    rf"|\\text\{{[A-Za-z .'()-]+\}})*)"
)
_NUMBERED = re.compile(r"_(?:[0-9]|\{[0-9]+\})")
_NAMES_ONLY = re.compile(r"(?!-)(?:[A-Za-z+\-/(){} ]|\\(?:frac|cdot|angle|overline)(?![a-zA-Z])|_[A-Za-z0-9])+")
_ANGLE = r"(?:\\angle ?)?(?:[A-Z]+|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|sigma|phi|omega)(?![a-zA-Z]))"
_VECTOR = r"\\(?:text|vec)\{[A-Za-z]+\}"
_QUANTITY = re.compile(
    rf"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z]) ?[({{]*{_ANGLE}(?:[+-]{_ANGLE})*[)}}]*"
    rf"|\|(?:z(?:_[0-9])?|[A-Z]+|\\vec\{{[A-Za-z]+\}})\||{_VECTOR}(?:\\cdot|\\times) ?{_VECTOR}"
)
"""What may be asked for, as a name is: cos A, |z| or a·b. Not ln x or |x|, of which an equation is one to solve."""
_CONDITION = re.compile(
    r"[,;]?(?:\\text\{\s*(?:for|where|with|when)\b|(?<![A-Za-z\\])(?:for|where|with|when)\b)(?!.*(?:\bor\b|\band\b|[,;]-?[0-9])).*"
    r"|\((?:\\text\{where\b|[a-z]\\in\\mathbb)[^()]*\)$",
    re.DOTALL,
)
_MEMBERSHIP = re.compile(r"[A-Za-z](?:,[A-Za-z])*\\in\\mathbb\{[ZNRQ]\}.*")
_ENDLESS = re.compile(r"(?<=[0-9])\\ldots$")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z]) ?")
_MODULUS = re.compile(r"(.*?)(?:\(?\\[pb]?mod ?\{?|\\text\{\(?mod ?)([0-9a-z]+)\)?\}?\)?")
_LETTERED = re.compile(r"(?:\\text\{ ?)?(?:\([A-J]\)|[A-J][.:)])\}? ?(.+)", re.DOTALL)
"""A choice and what it stands for."""
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "<=": ">=", ">=": "<="}


@dataclass(frozen=True)
class Form:
    r"""A value, or members with what encloses them.

    `text` is what a value says without its name, `whole` all that was written, `label` the name before an equals sign.
    `ends` is "" for a value, "," for an unordered list, "{}" for a set, "∪" for a union, "=" for a chain of equations,
    or the two brackets of a point or an interval, or "mod" or ":".
    """

    text: str
    whole: str
    label: str = ""
    items: tuple[Form, ...] = ()
    ends: str = ""
    also: str = ""
    """What the value is said to be about."""

    def values(self) -> Iterator[Form]:
        """All that is compared as a single value."""
        if self.items:
            for item in self.items:
                yield from item.values()
        else:
            yield self


def split(text: str, kind: str) -> tuple[list[str], list[str]]:
    """The pieces between the separators that lie in no bracket, and the separators."""
    pieces, separators, depth, start = [], [], 0, 0
    for match in _SEPARATORS[kind].finditer(text):
        if match["open"]:
            depth += 1
        elif match["close"]:
            depth -= 1
        elif match["separator"] and depth == 0:
            pieces.append(text[start : match.start()].strip())
            separators.append(match["separator"])
            start = match.end()
    return [*pieces, text[start:].strip()], separators


def read(text: str, *, grouped: bool = True, depth: int = 0) -> Form:
    """The form of a tidied answer. Without `grouped`, every comma between digits separates."""
    whole = text
    if depth > DEEPEST:
        return Form(text, whole)
    if is_reals(text):
        return _interval(r"(", r"-\infty", r"\infty", ")", whole)
    if (condition := _CONDITION.search(text)) and condition.start() > 0:
        text = text[: condition.start()].strip()
    text = _ENDLESS.sub("", text)
    if (lettered := _LETTERED.fullmatch(text)) and number(split_unit(lettered[1])[0]) is not None:
        text = lettered[1]
    if grouped and number(text) is not None:
        return Form(text, whole)
    for reader in (_braced, _cases, _listed, _united, _related, _congruent, _plus_minus, _bracketed, _proportion):
        if (form := reader(text, whole, grouped, depth + 1)) is not None:
            return form
    return Form(split_unit(text)[0], whole)


def _many(pieces: list[str], grouped: bool, depth: int) -> tuple[Form, ...]:
    return tuple(read(piece, grouped=grouped, depth=depth) for piece in pieces if piece)


def _encloses(text: str, opening: str, closing: str) -> str | None:
    """What the brackets at both ends hold, if they belong together."""
    if not (text.startswith(opening) and text.endswith(closing)) or len(text) < len(opening) + len(closing):
        return None
    depth = 0
    for match in _SEPARATORS["none"].finditer(text):
        depth += bool(match["open"]) - bool(match["close"])
        if depth == 0:
            return text[len(opening) : -len(closing)] if match.end() == len(text) else None
    return None


def _braced(text: str, whole: str, grouped: bool, depth: int) -> Form | None:
    inner = _encloses(text, r"\{", r"\}")
    if not inner:
        return None
    parts, bars = split(inner, "bar")
    if len(bars) == 1:
        name, _, domain = parts[0].partition(r"\in")
        if _NAME.fullmatch(name) and domain in ("", r"\mathbb{R}"):
            return read(parts[1], depth=depth)
        return None
    items = _many(split(inner, "list")[0], grouped, depth)
    return replace(items[0], whole=whole) if len(items) == 1 else Form(text, whole, items=items, ends="{}")


def _cases(text: str, whole: str, grouped: bool, depth: int) -> Form | None:
    inner = text.removeprefix(r"\begin{cases}").removesuffix(r"\end{cases}")
    if len(inner) != len(text) - 24 or "&" in inner:
        return None
    return Form(text, whole, items=_many(split(inner, "rows")[0], grouped, depth), ends=",")


def _listed(text: str, whole: str, grouped: bool, depth: int) -> Form | None:
    pieces, separators = split(text, "list")
    pieces = [piece for piece in pieces if piece and not (len(pieces) > 1 and _MEMBERSHIP.fullmatch(piece))]
    if len(pieces) < 2:
        return read(pieces[0], depth=depth) if separators and pieces else None
    items = _many(pieces, grouped, depth)
    if len(items) == 2 and "and" in separators[0] and (both := _overlap(*items, whole)):
        return both
    return Form(text, whole, items=items, ends=",")


def _overlap(one: Form, other: Form, whole: str) -> Form | None:
    r"""x > 1 and x < 4 as one interval."""
    if one.label == other.label and one.ends and other.ends and len(one.items) == len(other.items) == 2:
        for low, high in ((one, other), (other, one)):
            if low.items[1].text == r"\infty" and high.items[0].text == r"-\infty":
                return replace(low, whole=whole, items=(low.items[0], high.items[1]), ends=low.ends[0] + high.ends[1])
    return None


def _united(text: str, whole: str, grouped: bool, depth: int) -> Form | None:
    pieces, _ = split(text, "union")
    return Form(text, whole, items=_many(pieces, True, depth), ends="∪") if len(pieces) > 1 else None


def _interval(opening: str, low: str, high: str, closing: str, whole: str, label: str = "") -> Form:
    items = tuple(Form(text, text) for text in (low, high))
    return Form(f"{opening}{low},{high}{closing}", whole, label, items, opening + closing)


def _related(text: str, whole: str, grouped: bool, depth: int) -> Form | None:
    sides, relations = split(text, "relation")
    if not relations or "" in sides:
        return None
    if set(relations) <= {"=", r"\approx", r"\simeq"}:
        return _equated(text, whole, sides, relations, depth)
    named = [_NAME.fullmatch(side) is not None for side in sides]
    if len(sides) == 3 and named[1] and not named[0] and {relations[0], relations[1]} <= _FLIPPED.keys():
        if relations[0] in (">", ">=", r"\ge"):
            sides, relations = sides[::-1], [_FLIPPED[each] for each in relations[::-1]]
        if all(each in ("<", "<=", r"\le") for each in relations):
            opening, closing = ("(" if relations[0] == "<" else "["), (")" if relations[1] == "<" else "]")
            return _interval(opening, sides[0], sides[2], closing, whole, sides[1])
        return None
    if len(sides) != 2 or named[0] == named[1]:
        return None
    name, value = sides if named[0] else sides[::-1]
    relation = relations[0] if named[0] else _FLIPPED.get(relations[0], relations[0])
    if relation == r"\in" and named[0]:
        return replace(read(value, depth=depth), label=name, whole=whole)
    if relation == r"\equiv" and (match := _MODULUS.fullmatch(value)):
        return Form(text, whole, name, _many([match[1], match[2]], True, depth), "mod")
    if relation == r"\ne":
        parts = (_interval("(", r"-\infty", value, ")", ""), _interval("(", value, r"\infty", ")", ""))
        return Form(text, whole, name, parts, "∪")
    if relation in ("<", "<=", r"\le"):
        return _interval("(", r"-\infty", value, ")" if relation == "<" else "]", whole, name)
    if relation in (">", ">=", r"\ge"):
        return _interval("(" if relation == ">" else "[", value, r"\infty", ")", whole, name)
    return None


def _equated(text: str, whole: str, sides: list[str], relations: list[str], depth: int) -> Form | None:
    """A name for a value, a chain of equal ones, or a value and what it is about."""
    about = next((place for place, relation in enumerate(relations, 1) if relation != "="), len(sides))
    exact = sides[:about]
    label = next((side for side in exact if _NAME.fullmatch(side)), "") if len(sides) > 1 else ""
    values = [side for side in exact if not _NAME.fullmatch(side)] or ([] if about < len(sides) else exact[-1:])
    rough = sides[about] if about < len(sides) else ""
    if not values:
        return replace(read(rough, depth=depth), label=label, whole=whole)
    if len(values) == 1:
        if not _near(values[0], rough):
            return Form(text, whole, items=_many([values[0], rough], True, depth), ends=",")
        return replace(read(values[0], depth=depth), label=label, whole=whole, also=rough)
    return Form(text, whole, label, _many(values, True, depth), "=", rough)


def _near(exact: str, rough: str) -> bool:
    """Whether `rough` may be what a value is about: False only for plain numbers that do not round to it."""
    one, other = number(exact), number(rough)
    if one is None or other is None:
        return True
    _, point, decimals = rough.partition(".")
    place = -len(decimals) if point else len(rough) - len(rough.rstrip("0"))
    return abs(one - other) < Fraction(10) ** place


def _congruent(text: str, whole: str, grouped: bool, depth: int) -> Form | None:
    match = _MODULUS.fullmatch(text)
    return Form(text, whole, items=_many([match[1], match[2]], True, depth), ends="mod") if match else None


def _plus_minus(text: str, whole: str, grouped: bool, depth: int) -> Form | None:
    if not _PLUS_MINUS.search(text):
        return None
    plus = _PLUS_MINUS.sub(lambda match: "+" if "pm" in match.group() else "-", text)
    minus = _PLUS_MINUS.sub(lambda match: "-" if "pm" in match.group() else "+", text)
    items = _many([plus.removeprefix("+"), minus.removeprefix("+")], grouped, depth)
    return Form(text, whole, items=items, ends=",")


def _bracketed(text: str, whole: str, grouped: bool, depth: int) -> Form | None:
    for opening in "([":
        for closing in ")]":
            if (inner := _encloses(text, opening, closing)) and len(pieces := split(inner, "comma")[0]) > 1:
                return Form(text, whole, items=_many(pieces, grouped, depth), ends=opening + closing)
    return None


def _proportion(text: str, whole: str, grouped: bool, depth: int) -> Form | None:
    pieces, _ = split(text, "ratio")
    return Form(text, whole, items=_many(pieces, grouped, depth), ends=":") if len(pieces) > 2 else None


def equal(gold: Form, answer: Form, same: Same) -> bool | None:
    """Whether two forms are equal, where `same` says it of two texts or None for "not known yet"; then None too."""
    if gold.label and answer.label and _bare(gold.label) != _bare(answer.label):
        return False if gold.items or answer.items else same(gold.whole, answer.whole)
    if "=" in (gold.ends, answer.ends):
        return _equal_chains(gold, answer, same)
    if gold.ends == "," and not answer.items and "," in answer.text:
        answer = read(answer.text, grouped=False)  # 100,200 for 100, 200
    if gold.items and answer.items:
        return _equal_members(gold, answer, same)
    if gold.items or answer.items:
        compound, single = (gold, answer) if gold.items else (answer, gold)
        if compound.ends == "mod":
            return equal(gold.items[0], answer, same) if compound is gold else equal(gold, answer.items[0], same)
        about_sets = split(single.text, "relation")[1] or re.search(r"\\(?:setminus|backslash|cap|mathbb)", single.text)
        return same(gold.whole, answer.whole) if about_sets or single.text.startswith(r"\begin") else False
    verdict = same(gold.text, answer.text)
    if verdict is False and gold.also:
        verdict = same(gold.also, answer.text)
    if verdict is False and "=" in gold.whole and "=" in answer.whole and gold.label != answer.label:
        verdict = same(gold.whole, answer.whole)
    return verdict


def _bare(label: str) -> str:
    return re.sub(r"\\text|[ {}]", "", label).casefold()


def _equal_chains(gold: Form, answer: Form, same: Same) -> bool | None:
    r"""An equation is equal to an equation; in the place of a value, all its sides but names must be that value."""
    if gold.ends == "=" and (answer.ends == "=" or answer.label):
        return same(gold.whole, answer.whole)
    chain, other = (answer, gold) if answer.ends == "=" else (gold, answer)
    if other.label and not chain.label:
        return same(gold.whole, answer.whole)
    said = [side for side in chain.items if not _NAMES_ONLY.fullmatch(side.text)]
    sides = [side for side in said if not _QUANTITY.fullmatch(side.whole)] or said or list(chain.items[-1:])
    verdicts = [equal(other, side, same) if chain is answer else equal(side, other, same) for side in sides]
    return False if False in verdicts else None if None in verdicts else True


def _equal_members(gold: Form, answer: Form, same: Same) -> bool | None:
    ends = {gold.ends, answer.ends}
    if len(gold.items) != len(answer.items):
        return False
    if ends == {",", "()"} or (ends in UNORDERED and _are_named(gold) and _names(gold) == _names(answer)):
        return _equal_in_order(_by_name(gold), _by_name(answer), same)
    if ends in UNORDERED:
        one, other = map(_unnumbered, (gold, answer)) if _numbers_say_nothing(gold, answer) else (gold, answer)
        if {""} in (_names(one), _names(other)) and (_are_named(one) or _are_named(other)):
            # Bare values of several unknowns come in the order of the names; of letters that have none, as r and h, in the one that is written too.
            orders = [(_by_name(one), _by_name(other))]
            letters = "".join(sorted(_names(one) | _names(other)))
            if len(letters) == len(one.items) and letters not in ascii_lowercase and not set(letters) <= set("wxyz"):
                orders.append((one.items, other.items))
            verdicts = {_equal_in_order(golds, answers, same) for golds, answers in orders}
            return True if True in verdicts else None if None in verdicts else False
        return _equal_in_any_order(one.items, other.items, same)
    if ends == {",", "∪"}:
        return _equal_in_any_order(gold.items, answer.items, same)
    return _equal_in_order(gold.items, answer.items, same) if gold.ends == answer.ends else False


def _names(form: Form) -> set[str]:
    return {_bare(item.label) for item in form.items}


def _are_named(form: Form) -> bool:
    """Whether each member has a name of its own, as in x=1, y=2."""
    return "" not in _names(form) and len(_names(form)) == len(form.items) > 1


def _by_name(form: Form) -> tuple[Form, ...]:
    return tuple(sorted(form.items, key=lambda item: _bare(item.label))) if _are_named(form) else form.items


def _are_numbered(form: Form) -> bool:
    return any(_NUMBERED.search(item.label) for item in form.items)


def _numbers_say_nothing(gold: Form, answer: Form) -> bool:
    """Whether one side alone numbers its members, and the numbers say nothing: the other has the same letters, or x_1 and x_2 are two values of x."""
    if _are_numbered(gold) == _are_numbered(answer):
        return False
    numbered, plain = (gold, answer) if _are_numbered(gold) else (answer, gold)
    letters = _names(_unnumbered(numbered))
    return letters == _names(plain) or (len(letters) == 1 and len(gold.items) == 2 and letters <= set("xyzt"))


def _unnumbered(form: Form) -> Form:
    """Members without the numbers of their names: the roots x_1 and x_2 are both x."""
    return replace(form, items=tuple(replace(item, label=_NUMBERED.sub("", item.label)) for item in form.items))


def _equal_in_order(golds: tuple[Form, ...], answers: tuple[Form, ...], same: Same) -> bool | None:
    verdicts = []
    for gold, answer in zip(golds, answers, strict=True):
        verdicts.append(equal(gold, answer, same))
        if verdicts[-1] is False:
            return False
    return None if None in verdicts else True


def _equal_in_any_order(golds: tuple[Form, ...], answers: tuple[Form, ...], same: Same) -> bool | None:
    if len(golds) ** 2 > MOST_PAIRS:
        return _equal_in_order(golds, answers, same)
    left, unknown = list(answers), False
    for gold in golds:
        verdicts = [equal(gold, answer, same) for answer in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            unknown = True
        else:
            return False
    return None if unknown else True
