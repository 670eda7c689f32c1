r"""What the workers of `reward.math.answer` do: one value of an answer against one of the ground truth.

A job of `reward.isolation.pool`: it imports nothing of ours and runs only in those workers. LaTeX is read by math-verify's
parser, so that sympy's parser of Python expressions, which evaluates them, never sees an answer. Letters keep their case
where an answer has both of one, and nothing is taken for a unit: `5t` is not 5, and R - r not 0.

Values are compared in numbers first, to 30 digits and relative to their size, at a few points where they have variables:
what differs there is not equal, whatever its size. math-verify's comparison, whose rounding is absolute
(https://github.com/huggingface/Math-Verify/pull/82), has the word on sets, relations and matrices, and where numbers
leave it open; its own time-outs are off (they are SIGALRM). An equation or a chain of them (1 = 2 = 3) is an answer only if all
its sides but names are equal.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended import (  # type: ignore[import-untyped]
    NormalizationConfig,
    is_expr_of_only_symbols,
    latex2sympy,
    normalize_latex,
)
from latex2sympy2_extended.latex2sympy2 import ConversionConfig  # type: ignore[import-untyped]
from latex2sympy2_extended.logic import And  # type: ignore[import-untyped]
from math_verify import verify  # type: ignore[import-untyped]
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]
from sympy.core.random import seed  # type: ignore[import-untyped]

_SPELLING = NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
_SYMBOLS = ConversionConfig(lowercase_symbols=False)
_POSITIVE = (("0.73", "1.91", "2.57", "0.41", "3.33"), ("1.37", "0.29", "4.13", "2.11", "0.83"))
"""Where expressions in variables must agree; positive, since roots and logarithms often assume that."""
_MIXED = (("-1.71", "0.37", "-2.23", "1.19", "-0.61"),)
"""Where they must agree too, if numbers alone are to prove them equal."""
_WHOLE = (
    ("3", "5", "4", "2", "7"),
    ("6", "4", "9", "5", "8"),
    ("9", "13", "11", "8", "12"),
    ("13", "7", "10", "12", "9"),
)
"""Where factorials, sums and the like in variables are compared."""
_DIGITS, _SAME = 50, sympy.Rational(1, 10**30)
_ENDLESS = (sympy.factorial, sympy.binomial, sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit)
_LARGEST_POWER = 100
_PROBE = sympy.Integer(424243)
"""An answer that hardly any question has."""
_SIX_DECIMALS = re.compile(r"[+-]?([0-9]*)\.([0-9]{6,})")
_TWO_NUMBERS = re.compile(r"(?<![_^0-9.])(?<!frac )[0-9][0-9.]* +[0-9]")
_PERIODIC = ("k", "n", "m", "l", "t")
"""Names of an arbitrary whole number, as in pi/6+2k pi."""

_WARM_UP = (
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{\sqrt{3}}{2}+\pi", r"\pi+\sqrt{\frac34}", True),
    (r"2\sqrt[3]{5}-\frac{\pi^2}{6}", r"-\pi^2/6+\sqrt[3]{40}", True),
    ("x^2+2x+1", "(x+1)^2", True),
    ("(3a-b)(3a+b)", "9*a^2-b^2", True),
    (r"\frac{1}{x+1}", r"\frac{-1}{x-1}", False),
    (r"\{1,2\}", "2,1", True),
    (r"\pm 4", "4,-4", True),
    (r"\emptyset", r"\{\}", True),
    ("(1,2)", "(2,1)", False),
    ("(2,-3,4)", "(2,-3,5)", False),
    (r"[0,\infty)", r"x\ge 0", True),
    (r"[-1,1]", "(-1,1)", False),
    (r"(-\infty,0)\cup(1,5]", r"(1,5]\cup(-\infty,0)", True),
    ("-1<x<5", "(-1,5)", True),
    ("y<4", "4>y", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\3\end{bmatrix}", False),
    (r"\log_2 8+\ln e", "4", True),
    (r"\sin^2 x+\cos^2 x", "1", True),
    (r"\tan(\frac{\pi}{4})", r"\frac{\sqrt{2}}{2}", False),
    ("1-e^{-1}", "1+e^{-1}", False),
    ("2^{n+1}", r"2\cdot 2^{n}", True),
    (r"1.5\times 10^{3}", "1500", True),
    ("x=3", "3", True),
    ("y=2x+1", "y=1+2x", True),
    ("2x+y=1", "2x+y=2", False),
    ("f(x)=x_1", "x_2", False),
    ("90^\\circ", r"90^{\circ}", True),
    (r"25\%", r"25 \%", True),
    ("2:5", r"\frac{2}{5}", True),
    (r"\binom{5}{2}", "10", True),
    ("5!-|x|", "120", False),
    (r"3 \text{ or } 4", r"3\text{ and }4", True),
    (r"\sum_{k=1}^{3} k", "6", True),
    ("3+4i", "4i+3", True),
)


class Broken(Exception):  # noqa: N818
    """The library gives wrong answers to known questions: nothing it says counts."""


def warm() -> None:
    """Parses and compares known pairs, which fills the parser's caches. Raises Broken on a wrong answer."""
    logging.disable(logging.CRITICAL)
    for gold, answer, equal in _WARM_UP:
        if work({"gold": gold, "answer": answer}, lambda phase: None) != {"equal": equal}:
            raise Broken(f"{gold} and {answer} must{'' if equal else ' not'} be equal")
    _gold.cache_clear()


def work(request: dict[str, str], enter: Callable[[str], None]) -> dict[str, Any]:
    """`{"equal": bool}`, or `{"gold": why}` for an unusable ground truth, or `{"unreadable": why}` for the answer.

    Without an answer only the ground truth is examined: `{}` if it is usable.
    """
    seed(0)  # sympy tries expressions at random points
    enter("gold")
    gold = _gold(request["gold"])
    if isinstance(gold, str):
        return {"gold": gold}
    if request.get("answer") is None:
        return {}
    enter("answer")
    answer = _parsed(request["answer"])
    if answer is None:
        return {"unreadable": "it is no formula that math-verify reads"}
    if request["gold"].count("'") != request["answer"].count("'"):
        return {"equal": False}  # the parser drops primes
    try:
        return {"equal": bool(_same(*_one_case(gold, answer)) or _rounded(gold, answer, request))}
    except MemoryError:
        raise
    except Exception as error:
        if not _equal(_parsed(r"\frac{1}{2}"), _parsed("0.5")):
            raise Broken from error
        return {"unreadable": f"the comparison raised {type(error).__name__}"}


@lru_cache(maxsize=256)
def _gold(text: str) -> Any:
    """The parsed ground truth, or why it cannot be used."""
    gold = _parsed(text)
    if gold is None:
        return "math-verify cannot read it"
    if isinstance(gold, sympy.Expr):
        if gold.has(sympy.nan, sympy.zoo):
            return "it is no number"
        if not gold.free_symbols and _may_be_endless(gold):
            _equal(gold, _PROBE)  # if that takes for ever, it does so here, at the expense of the data
    return gold


def _may_be_endless(expression: Any) -> bool:
    return expression.has(*_ENDLESS) or any(
        not power.exp.is_Number or abs(power.exp) > _LARGEST_POWER for power in expression.atoms(sympy.Pow)
    )


def _parsed(text: str) -> Any:
    """What the text says, with decimals as the rational numbers that they are; None if it cannot be read."""
    if _TWO_NUMBERS.search(text):
        return None  # the parser would add them
    try:
        latex = normalize_latex(text.replace("\n", " "), _SPELLING)
        found = latex2sympy(latex, is_real=True, normalization_config=None, conversion_config=_SYMBOLS)
        return _replaced(found, lambda leaf: _exact(leaf)) if found is not None else None
    except MemoryError:
        raise
    except Exception:
        return None


def _exact(leaf: Any) -> Any:
    if isinstance(leaf, sympy.Float):
        return sympy.Rational(str(leaf))
    return sympy.I if isinstance(leaf, sympy.Symbol) and leaf.name == "i" else leaf


def _replaced(found: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(found, sympy.MatrixBase):
        return found.applyfunc(lambda element: _replaced(element, change))
    leaves = found.atoms(sympy.Float, sympy.Symbol)
    bound = set().union(*(limit.bound_symbols for limit in found.atoms(*_ENDLESS) if hasattr(limit, "bound_symbols")))
    return found.xreplace({leaf: new for leaf in leaves - bound if (new := change(leaf)) is not leaf})


def _one_case(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Both in small letters, unless one of them has a letter in both cases."""
    for found in (gold, answer):
        names = {str(name) for name in found.atoms(sympy.Symbol)}
        if len({name.lower() for name in names}) < len(names):
            return gold, answer

    def lower(leaf: Any) -> Any:
        return sympy.Symbol(leaf.name.lower(), real=leaf.is_real) if isinstance(leaf, sympy.Symbol) else leaf

    return _replaced(gold, lower), _replaced(answer, lower)


def _equal(gold: Any, answer: Any) -> bool:
    return verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)


def _same(gold: Any, answer: Any) -> bool:
    """Whether both are one value, matrix, set or relation."""
    if _is_equation(answer) and not _is_equation(gold):
        return _consistent(gold, answer)
    if _is_equation(gold) and isinstance(answer, sympy.Expr):
        gold = _sides(gold)[-1]
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape == answer.shape and all(map(_same, gold.doit(), answer.doit()))
    if isinstance(gold, sympy.Rel) and isinstance(answer, sympy.Rel):
        proportional = _proportional(gold, answer)
        return _equal(gold, answer) if proportional is None else proportional
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return _equal(gold, answer)
    verdict = _agree(gold, _renamed(gold, answer))
    return _equal(gold, answer) if verdict is None else verdict


def _is_equation(found: Any) -> bool:
    return isinstance(found, sympy.Eq) or (isinstance(found, And) and all(isinstance(a, sympy.Eq) for a in found.args))


def _sides(equation: Any) -> list[Any]:
    links = equation._unsorted_args if isinstance(equation, And) else (equation,)
    return [side for link in links for side in link.args]


def _consistent(gold: Any, answer: Any) -> bool:
    """Whether an equation, offered in the place of a value, has that value on all sides but names."""
    sides = _sides(answer)
    return all(_same(gold, side) for side in [side for side in sides if not _is_name(side)] or sides[-1:])


def _is_name(side: Any) -> bool:
    return isinstance(side, AppliedUndef) or bool(is_expr_of_only_symbols(side))


def _renamed(gold: Any, answer: Any) -> Any:
    """The answer with the ground truth's name for an arbitrary whole number or constant: 2 k pi, x^2 + C."""
    own, other = gold.free_symbols - answer.free_symbols, answer.free_symbols - gold.free_symbols
    if len(own) != 1 or len(other) != 1:
        return answer
    (name,), (given,) = other, own
    periodic = all(
        symbol.name in _PERIODIC and found.coeff(symbol).has(sympy.pi)
        for found, symbol in ((gold.expand(), given), (answer.expand(), name))
    )
    constant = {name.name, given.name} <= {"c", "C", "k", "K"} and all(
        found.coeff(symbol) == 1 and not found.diff(symbol, 2) for found, symbol in ((gold, given), (answer, name))
    )
    return answer.xreplace({name: given}) if periodic or constant else answer


def _agree(gold: Any, answer: Any) -> bool | None:
    """Whether two expressions are the same number, at some points if they have variables; None where that is open."""
    names = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if len(names) > len(_WHOLE[0]):
        return None
    whole = bool(names) and (gold.has(*_ENDLESS) or answer.has(*_ENDLESS))
    sure = True
    for point in (_WHOLE if whole else (*_POSITIVE, *_MIXED)) if names else (_WHOLE[0],):
        at = dict(zip(names, map(sympy.Rational, point), strict=False))
        one, other = _number(gold, at), _number(answer, at)
        if one is None or other is None:
            sure = False
        elif abs(one - other) > _SAME * max(abs(one), abs(other)):
            if point not in _MIXED:
                return False
            sure = False
    if sure and not names and _number(gold - answer, {}):
        return False  # large numbers that agree in all the digits above
    return True if sure else None


def _proportional(gold: Any, answer: Any) -> bool | None:
    """Whether two equations or inequalities are one but for a factor; None where numbers do not tell."""
    if not isinstance(gold, type(answer)) and not isinstance(gold, answer.reversed.func):
        return False
    one, other = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    names = sorted(one.free_symbols | other.free_symbols, key=str)
    if not names or len(names) > len(_WHOLE[0]):
        return None
    ratios = []
    for point in (*_POSITIVE, *_MIXED):
        at = dict(zip(names, map(sympy.Rational, point), strict=False))
        top, bottom = _number(one, at), _number(other, at)
        if not top or not bottom:
            return None
        ratios.append(top / bottom)
    if all(abs(ratio - ratios[0]) <= _SAME * abs(ratio) for ratio in ratios):
        turned = not isinstance(gold, type(answer))
        return isinstance(gold, (sympy.Eq, sympy.Ne)) or bool(ratios[0].is_real and (ratios[0] < 0) == turned)
    return False if one.is_polynomial(*names) and other.is_polynomial(*names) else None


def _rounded(gold: Any, answer: Any, request: dict[str, str]) -> bool:
    """Whether one of both is written as a decimal of six places or more that the other rounds to."""
    for text, exact in ((request["answer"], gold), (request["gold"], answer)):
        match = _SIX_DECIMALS.fullmatch(text)
        if match and isinstance(exact, sympy.Expr) and len((match[1] + match[2]).lstrip("0")) >= 6:
            value = None if exact.free_symbols else _number(exact, {})
            unit = sympy.Rational(1, 10 ** len(match[2]))
            if value is not None and value.is_real and abs(value - sympy.Rational(text)) < unit:
                return True
    return False


def _number(expression: Any, at: dict[Any, Any]) -> Any:
    """The value as a complex number of sympy's; None where there is none."""
    try:
        value = expression.subs(at).doit() if expression.has(*_ENDLESS) and at else expression
        value = sympy.N(value, _DIGITS, subs=at)
        parts = [sympy.Integer(0) if getattr(part, "_prec", 2) == 1 else part for part in value.as_real_imag()]
        return parts[0] + sympy.I * parts[1] if all(part.is_Number and part.is_finite for part in parts) else None
    except MemoryError:
        raise
    except Exception:  # no number there: nothing to say
        return None
