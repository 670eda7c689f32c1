"""The tests of a programming task: the job they make for a sandbox, and the outcome of each case.

Three kinds, each a mapping or its JSON text:

    {"kind": "stdio", "cases": [{"input": "2\\n", "output": "4\\n"}]}
    {"kind": "function", "entry_point": "add", "cases": [{"args": [1, 2], "kwargs": {}, "expected": 3}]}
    {"kind": "assert", "entry_point": "add", "code": "assert add(1, 2) == 3", "setup": ""}

`kwargs` and `setup` can be left out. `code` is test code as HumanEval publishes it (it defines `check(candidate)`)
or as MBPP does (asserts); `setup` is code of the task's author that it needs, such as a HumanEval prompt.
"""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any, ClassVar, Protocol

from reward.isolation import Call, Calls, CaseReport, Dialogue, Execution, Job, Limits, Program
from reward.isolation.child import plain
from reward.types import Verdict

_NUMBER = re.compile(r"((?<![\w.])[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?!\w|\.[0-9]))")
EXACT = 2**53
"""Below it doubles tell whole numbers apart, so that no tolerance is due to them."""
_INTEGER = re.compile(r"[+-]?[0-9]+")

SHAPES = {
    "stdio": '{"kind": "stdio", "cases": [{"input": text, "output": text}, …]}',
    "function": '{"kind": "function", "entry_point": name, "cases": [{"args": list, "kwargs"?: mapping, "expected": value}, …]}',
    "assert": '{"kind": "assert", "entry_point": name, "code": text, "setup"?: text}',
}


class UnusableTests(Exception):  # noqa: N818
    """The tests are at fault, not the candidate: the message says what is wrong."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case; `detail` is for a human, and empty for a pass."""

    verdict: Verdict
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS


class Tests(Protocol):
    """Tests of one kind."""

    @property
    def entry_point(self) -> str | None:
        """The function that they call; None where they run a program."""

    def job(self, source: str) -> Job:
        """What a sandbox is to run: nothing in it tells an expected output to the candidate's process."""

    def outcomes(self, execution: Execution, limits: Limits) -> list[Outcome]:
        """One outcome for each case, those that were not reached too. Raises UnusableTests."""


@dataclass(frozen=True)
class StdioTests:
    """A program reads each input and prints the output: see `same_text`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_tolerance: float
    any_whitespace: bool
    entry_point: ClassVar[None] = None

    def job(self, source: str) -> Job:
        return Program(source, self.inputs)

    def outcomes(self, execution: Execution, limits: Limits) -> list[Outcome]:
        found = []
        for report, output in zip(execution.cases, self.outputs, strict=False):
            trouble = _trouble(report, limits)
            if trouble is None and report.status != 0:
                trouble = Outcome(Verdict.CRASH, f"exit status {report.status}")
            if trouble is None and not self._right(report.stdout, output):
                trouble = Outcome(Verdict.WRONG, f"printed {_cut(repr(report.stdout))} instead of {_cut(repr(output))}")
            found.append(trouble or Outcome(Verdict.PASS))
        return _filled(found, len(self.outputs), execution, limits)

    def _right(self, printed: str, output: str) -> bool:
        return same_text(printed, output, self.float_tolerance, any_whitespace=self.any_whitespace)


@dataclass(frozen=True)
class FunctionTests:
    """A function returns the expected plain data: see `same`."""

    entry_point: str
    calls: tuple[Call, ...]
    expected: tuple[Any, ...]
    float_tolerance: float

    def job(self, source: str) -> Job:
        return Calls(source, self.entry_point, self.calls)

    def outcomes(self, execution: Execution, limits: Limits) -> list[Outcome]:
        pairs = zip(execution.cases, self.expected, strict=False)
        found = [self._outcome(report, expected, limits) for report, expected in pairs]
        return _filled(found, len(self.expected), execution, limits)

    def _outcome(self, report: CaseReport, expected: Any, limits: Limits) -> Outcome:
        trouble = _trouble(report, limits, self.entry_point)
        if trouble is not None:
            return trouble
        if report.result is None or "value" not in report.result:
            return Outcome(Verdict.CRASH, f"ended with exit status {report.status} and did not return")
        value, wanted = report.result["value"], plain.encode(expected)
        if same(value, wanted, self.float_tolerance):
            return Outcome(Verdict.PASS)
        return Outcome(Verdict.WRONG, f"returned {_cut(plain.text(value))} instead of {_cut(plain.text(wanted))}")


@dataclass(frozen=True)
class AssertTests:
    """Test code calls the function. Each top-level statement that asserts, raises or comes after the first call, and is no definition, is a case; or else `check`."""

    entry_point: str
    code: str
    setup: str

    def job(self, source: str) -> Job:
        return Dialogue(source, self.entry_point, self.code, self.setup)

    def outcomes(self, execution: Execution, limits: Limits) -> list[Outcome]:
        served = execution.cases[0] if execution.cases else None
        trouble = _trouble(served, limits, self.entry_point) if served else None
        tester = execution.tester
        if tester is None or tester.result is None:
            return [_without_record(tester, trouble, limits)]
        record = tester.result
        if record["unusable"]:
            raise UnusableTests(f"the test code is at fault: {record['unusable']}")
        outcomes = [self._outcome(case, trouble) for case in record["cases"]]
        if record["calls"] == 0 and not any(case["what"] == "gone" for case in record["cases"]):
            raise UnusableTests(f"the test code never calls {self.entry_point!r}")
        return outcomes

    def _outcome(self, case: Mapping[str, Any], trouble: Outcome | None) -> Outcome:
        if case["passed"] is True:
            return Outcome(Verdict.PASS)
        if case["what"] == "gone":
            return trouble or Outcome(Verdict.CRASH, f"ended in the middle of a call, at {case['label']}")
        if isinstance(case["candidate"], Mapping):
            outcome = _described(case["candidate"], self.entry_point)
            return Outcome(outcome.verdict, f"{outcome.detail}, at {case['label']}")
        return Outcome(Verdict.WRONG, f"{case['what']}, at {case['label']}")


def parse_tests(tests: Any, *, float_tolerance: float, any_whitespace: bool = False) -> Tests:
    """The tests of a task. Raises UnusableTests, saying what they must be.

    For `float_tolerance` see `same` and `same_text`, for `any_whitespace` the latter.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise UnusableTests(f"tests given as text must be JSON: {error}") from None
    if not isinstance(tests, Mapping) or tests.get("kind") not in SHAPES:
        raise UnusableTests(f"tests must be one of {'; '.join(SHAPES.values())}")
    setup = tests.get("setup") or ""
    match dict(tests):
        case {"kind": "stdio", "cases": [_, *_] as cases} if all(map(_is_stdio_case, cases)):
            inputs, outputs = (tuple(case[name] for case in cases) for name in ("input", "output"))
            return StdioTests(inputs, outputs, float_tolerance, any_whitespace)
        case {"kind": "function", "entry_point": str(name), "cases": [_, *_] as cases} if all(map(_is_call, cases)):
            calls = tuple(Call(tuple(case["args"]), dict(case.get("kwargs") or {})) for case in cases)
            return FunctionTests(name, calls, tuple(case["expected"] for case in cases), float_tolerance)
        case {"kind": "assert", "entry_point": str(name), "code": str(code)} if isinstance(setup, str):
            return AssertTests(name, code, setup)
    kind = tests["kind"]
    raise UnusableTests(f"tests of kind {kind!r} must be {SHAPES[kind]} with at least one case of plain data")


def _is_stdio_case(case: Any) -> bool:
    return isinstance(case, Mapping) and isinstance(case.get("input"), str) and isinstance(case.get("output"), str)


def _is_call(case: Any) -> bool:
    if not isinstance(case, Mapping) or "expected" not in case or not isinstance(case.get("args"), list | tuple):
        return False
    kwargs = case.get("kwargs") or {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        return False
    try:
        plain.encode([list(case["args"]), dict(kwargs), case["expected"]])
    except (plain.NotPlain, RecursionError):
        return False
    return True


def same(got: Any, expected: Any, tolerance: float) -> bool:
    """Whether the tree `got`, which may be anything that JSON holds, is the tree `expected`.

    True is not 1. A tuple may stand for a list, which is all that JSON has. A number may differ from an expected float
    by `tolerance`, relative or absolute, but whole numbers, and any number from an expected integer, by the absolute
    alone; integers may not differ.
    """
    try:
        return _same(got, expected, tolerance)
    except (RecursionError, OverflowError):  # a forged tree: too deep, or an integer that is no float
        return False


def _same(got: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, list):
        if isinstance(got, dict) and got.keys() == {"tuple"}:
            got = got["tuple"]
        if not isinstance(got, list) or len(got) != len(expected):
            return False
        return all(_same(one, other, tolerance) for one, other in zip(got, expected, strict=True))
    if isinstance(expected, dict):
        if not isinstance(got, dict) or got.keys() != expected.keys():
            return False
        [(tag, content)] = expected.items()
        found = got[tag]
        if tag == "dict":
            found, content = _in_order(_keys_as_json(found, content)), _in_order(content)
        return _same(found, content, tolerance)
    kinds = type(got), type(expected)
    if kinds in ((float, float), (int, float), (float, int)):
        whole = type(expected) is int or (abs(expected) < EXACT and expected % 1 == got % 1 == 0)
        relative = 0.0 if whole else tolerance
        return math.isclose(got, expected, rel_tol=relative, abs_tol=tolerance) or (got != got and expected != expected)
    return type(got) is type(expected) and bool(got == expected)


def same_text(printed: str, expected: str, tolerance: float, *, any_whitespace: bool = False) -> bool:
    """Whether a program printed the expected text, but for white space at the ends of lines and of the text.

    With `any_whitespace` it is compared word by word, whatever white space and line breaks stand between the words.
    Numbers with a decimal point or an exponent, on either side, are compared as `same` compares floats; integers and
    everything else as text, and so are nan, inf, and digits within a name, a version or an address.
    """
    if any_whitespace:
        return _same_line(" ".join(printed.split()), " ".join(expected.split()), tolerance)
    lines, others = _lines(printed), _lines(expected)
    return len(lines) == len(others) and all(_same_line(*pair, tolerance) for pair in zip(lines, others, strict=True))


def _same_line(printed: str, expected: str, tolerance: float) -> bool:
    """Whether the texts between the numbers are equal, and the numbers close."""
    if printed == expected:
        return True
    pieces, others = _NUMBER.split(printed), _NUMBER.split(expected)
    if len(pieces) != len(others) or pieces[::2] != others[::2]:
        return False
    return all(_close(*pair, tolerance) for pair in zip(pieces[1::2], others[1::2], strict=True))


def _close(printed: str, expected: str, tolerance: float) -> bool:
    """Whether two numbers, as text, are equal, or within the tolerance where one of them is no integer."""
    if printed == expected or (_INTEGER.fullmatch(printed) and _INTEGER.fullmatch(expected)):
        return printed == expected
    # With this many digits a difference that matters is exact, and no exponent makes it long.
    digits = Context(prec=len(printed) + len(expected) + 30, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
    got, sought = digits.create_decimal(printed), digits.create_decimal(expected)
    difference = digits.abs(digits.subtract(got, sought))
    whole = _INTEGER.fullmatch(expected) or (
        abs(sought) < EXACT and all(number == number.to_integral_value() for number in (got, sought))
    )
    size = Decimal(1) if whole else max(Decimal(1), digits.abs(sought))
    return difference.is_finite() and difference <= digits.multiply(Decimal(tolerance), size)


def _keys_as_json(pairs: Any, expected: Any) -> Any:
    """The pairs of a dictionary with the keys that JSON writes, where all expected ones are texts: JSON has no other, and writes 1 as "1"."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return pairs
    if not all(isinstance(key, str) for key, _ in expected):
        return pairs
    return [[json.dumps(key) if isinstance(key, int | float | None) else key, value] for key, value in pairs]


def _in_order(pairs: Any) -> Any:
    """The pairs of a dictionary by the text of their keys; what is no list of pairs stays as it is."""
    if isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return sorted(pairs, key=lambda pair: plain.text(pair[0]))
    return pairs


def _trouble(report: CaseReport, limits: Limits, entry_point: str = "") -> Outcome | None:
    """Why a candidate's process did not do its work; None where it may have."""
    if report.ended == "wall":
        return Outcome(Verdict.TIMEOUT, f"still running after {report.wall_seconds:.1f} s of wall time")
    if report.ended == "output":
        return Outcome(
            Verdict.OUTPUT,
            f"printed more than {limits.output_kb:g} KB or returned more than {limits.result_kb:g} KB",
        )
    if report.status < 0:
        return _killed(report, limits)
    if report.result is not None and isinstance(report.result.get("error"), Mapping):
        return _described(report.result["error"], entry_point)
    return None


def _killed(report: CaseReport, limits: Limits) -> Outcome:
    number = -report.status
    if number == signal.SIGXCPU or (number == signal.SIGKILL and report.cpu_seconds >= limits.cpu_seconds):
        return Outcome(
            Verdict.TIMEOUT, f"used {report.cpu_seconds:.1f} s of processor time, the limit is {limits.cpu_seconds:g}"
        )
    if number == signal.SIGSYS:
        return Outcome(Verdict.DENIED, "made a system call of another architecture")
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return Outcome(Verdict.CRASH, f"killed by {name}")


def _described(error: Mapping[str, Any], entry_point: str) -> Outcome:
    """The outcome of an exception, as the candidate's process tells it."""
    stage, kind, message = (str(error.get(name, ""))[:300] for name in ("stage", "type", "message"))
    if stage == "missing":
        return Outcome(Verdict.NO_ANSWER, f"defines no function {entry_point!r}")
    if stage == "size":
        return Outcome(Verdict.OUTPUT, "returned more than is read")
    said = f"{kind}: {message}" if message else kind
    line = error.get("line")
    where = f", line {line}" if type(line) is int else ""
    if error.get("memory") is True:
        return Outcome(Verdict.MEMORY, f"out of memory{where}")
    if error.get("denied") is True or message.startswith("can't start new thread"):
        return Outcome(Verdict.DENIED, f"forbidden in the sandbox: {said}{where}")
    if kind in ("SyntaxError", "IndentationError", "TabError"):
        return Outcome(Verdict.CRASH, f"syntax error: {said}{where}")
    if kind in ("ImportError", "ModuleNotFoundError"):
        return Outcome(
            Verdict.CRASH,
            f"import error: {said}{where} (there are the standard library and what the parameter packages names)",
        )
    if stage == "result":
        return Outcome(Verdict.WRONG, f"returned what is no plain data: {message or kind}")
    return Outcome(Verdict.CRASH, f"runtime error: {said}{where}")


def _without_record(tester: CaseReport | None, trouble: Outcome | None, limits: Limits) -> Outcome:
    """The outcome of a dialogue whose test code did not get to its end."""
    if trouble is not None:
        return trouble
    if tester is None or tester.ended == "wall":
        return Outcome(Verdict.TIMEOUT, "a call did not return before the wall limit")
    ending = _trouble(tester, limits)
    if ending is not None and ending.verdict is Verdict.TIMEOUT:
        return Outcome(Verdict.TIMEOUT, f"the test code, at work on what the function returned, {ending.detail}")
    raise UnusableTests(f"the test code ended without a word: {ending.detail if ending else 'it left the process'}")


def _filled(found: Sequence[Outcome], count: int, execution: Execution, limits: Limits) -> list[Outcome]:
    """The outcomes, with one for each case that was not reached."""
    if execution.timed_out:
        rest = Outcome(Verdict.TIMEOUT, f"not reached within {limits.total_seconds:g} s for all cases")
    else:
        rest = Outcome(Verdict.WRONG, "not run, after a case that was stopped")
    return [*found, *[rest] * (count - len(found))]


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
