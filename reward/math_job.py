r"""What the killable workers of `reward.math_answer` do: one answer against one ground truth, by math-verify.

A job file of `reward.killable`: it imports nothing of ours and runs only in those workers. math-verify's own
time-outs are off (they are SIGALRM); it reads LaTeX alone, so that its parser of Python expressions, which is
sympy's and evaluates them, never sees an answer. To its word this adds two vetoes:

- an equation or a chain of them (1 = 2 = 3) is an answer only if all its sides but names are equal: math-verify
  takes the last one;
- what it calls equal must be so in numbers as well, at a few points: it rounds absolutely, and had false
  equalities (1 - 1/e and 1 + 1/e, https://github.com/huggingface/Math-Verify/pull/82).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended import is_expr_of_only_symbols  # type: ignore[import-untyped]
from latex2sympy2_extended.logic import And  # type: ignore[import-untyped]
from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]
from sympy.core.random import seed  # type: ignore[import-untyped]

_READ = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
_POINTS = (("0.73", "1.91", "2.57", "0.41", "3.33"), ("1.37", "0.29", "4.13", "2.11", "0.83"))
"""Where expressions in variables are compared; positive, since roots and logarithms often assume that."""
_CACHED = 256
_ENDLESS = (sympy.factorial, sympy.binomial, sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit)
_LARGEST_POWER = 100
_PROBE = sympy.Integer(424243)
"""An answer that hardly any question has."""

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
    (r"\binom{5}{2}\text{ cm}", "10", True),
    ("5!-|x|", "120", False),
    (r"3 \text{ or } 4", r"3\text{ and }4", True),
    (r"\sum_{k=1}^{3} k", "6", True),
    ("3+4i", "4i+3", True),
)

_golds: OrderedDict[str, Any] = OrderedDict()


class Broken(Exception):  # noqa: N818
    """The library gives wrong answers to known questions: nothing it says counts."""


def warm() -> None:
    """Parses and compares known pairs, which fills the parser's caches. Raises Broken on a wrong answer."""
    logging.disable(logging.CRITICAL)
    for gold, answer, equal in _WARM_UP:
        if judge({"gold": gold, "answer": answer}, lambda phase: None) != {"equal": equal}:
            raise Broken(f"{gold} and {answer} must{'' if equal else ' not'} be equal")
    _golds.clear()


def judge(request: dict[str, str], enter: Callable[[str], None]) -> dict[str, Any]:
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
    try:
        equal = _consistent(gold, answer) and _equal(gold, answer)
        if equal and "%" not in request["gold"] + request["answer"]:
            equal = not _differ(gold, answer)
        return {"equal": bool(equal)}
    except MemoryError:
        raise
    except Exception as error:
        if not _equal(_parsed(r"\frac{1}{2}"), _parsed("0.5")):
            raise Broken from error
        return {"unreadable": f"the comparison raised {type(error).__name__}"}


def _gold(text: str) -> Any:
    """The parsed ground truth, or why it cannot be used."""
    if text not in _golds:
        if len(_golds) >= _CACHED:
            _golds.popitem(last=False)
        _golds[text] = _examined(text)
    return _golds[text]


def _examined(text: str) -> Any:
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
    found = parse(
        r"\boxed{" + text.replace("\n", " ") + "}",
        extraction_config=_READ,
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _equal(gold: Any, answer: Any) -> bool:
    return verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)


def _consistent(gold: Any, answer: Any) -> bool:
    """False for an equation, offered in the place of a value, whose sides are not all that value."""
    chain = isinstance(answer, And) and not isinstance(gold, And)
    if not chain and not (isinstance(answer, sympy.Eq) and not isinstance(gold, (sympy.Eq, And))):
        return True
    links = answer._unsorted_args if chain else (answer,)
    if not all(isinstance(link, sympy.Eq) for link in links):
        return True  # 1 < x < 2
    sides = [side for link in links for side in link.args if not _is_name(side)]
    return all(_equal(sides[-1], side) for side in sides[:-1])


def _is_name(side: Any) -> bool:
    return isinstance(side, AppliedUndef) or bool(is_expr_of_only_symbols(side))


def _differ(gold: Any, answer: Any) -> bool:
    """Whether two expressions are certainly different numbers, at one of the points if they have variables."""
    if isinstance(answer, sympy.Eq) and not isinstance(gold, sympy.Eq):
        answer = answer.rhs
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return False
    names = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if len(names) > len(_POINTS[0]):
        return False
    for point in _POINTS if names else _POINTS[:1]:
        at = dict(zip(names, map(sympy.Rational, point), strict=False))
        one, other = _number(gold, at), _number(answer, at)
        if one is not None and other is not None:
            largest = max(abs(one), abs(other))
            if abs(one - other) > max(1e-5 * largest, 1e-12):
                return True
    return False


def _number(expression: Any, at: dict[Any, Any]) -> complex | None:
    try:
        return complex(expression.evalf(20, subs=at))
    except MemoryError:
        raise
    except Exception:  # no number there: nothing to object
        return None
