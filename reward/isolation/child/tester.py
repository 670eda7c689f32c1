"""The process that runs assert-style tests, in a sandbox of its own; the candidate answers from another one.

The tests see the candidate as a function. Its calls cross a pipe as plain data, so nothing that the candidate
makes (an object that equals everything, a patched builtin) is ever in the process that compares.
"""

from __future__ import annotations

import ast
import builtins
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from . import plain

FILE = "tests.py"
_NO_CASE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
_NO_CASE_EITHER = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Pass, ast.Delete, ast.Global)


class CandidateGone(BaseException):
    """The candidate's process ended, or sent what is no reply, in the middle of a call."""


class CandidateError(Exception):
    """The candidate raised an exception of a class of its own."""


class TestsUnusable(Exception):  # noqa: N818
    """The tests are at fault; the message says how."""

    __test__ = False


class Proxy:
    """The candidate as its tests see it."""

    def __init__(self, calls: int, replies: int) -> None:
        self.calls, self.replies = calls, replies
        self.count = 0
        self.gone = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the candidate returns. Raises what it raises, CandidateGone or TestsUnusable."""
        if self.gone:
            raise CandidateGone
        self.count += 1
        try:
            sent = [plain.encode(arg) for arg in (*args, *kwargs.values())]
        except plain.NotPlain as error:
            raise TestsUnusable(f"an argument cannot be passed to the candidate: {error}") from None
        named = {"dict": list(zip(kwargs, sent[len(args) :], strict=True))}
        reply = self._ask(plain.dumps({"args": sent[: len(args)], "kwargs": named}))
        if "error" in reply:
            raise _rebuilt(reply["error"])
        if reply["value"] is None:  # else it would change what its value is compared with
            for old, before, (after, new) in zip((*args, *kwargs.values()), sent, reply["left"], strict=False):
                # Trees have dictionaries in their order. Of an argument that is given twice, the copy that was changed counts.
                if plain.text(before) != plain.text(after):
                    _put_into(old, new)
        return reply["value"]

    def _ask(self, call: bytes) -> dict[str, Any]:
        """The reply, as {"value"} with trees and values of the arguments, or as {"error"} with a usable description."""
        try:
            plain.send(self.calls, call)
            reply = plain.receive(self.replies)
            if isinstance(reply, dict) and isinstance(reply.get("error"), dict):
                return {"error": reply["error"]}
            if isinstance(reply, dict) and "value" in reply:
                left = reply["left"] if isinstance(reply.get("left"), list) else []
                return {"value": plain.decode(reply["value"]), "left": [(tree, plain.decode(tree)) for tree in left]}
        except (plain.Malformed, BrokenPipeError, RecursionError):
            pass  # the candidate's doing, as is a missing reply
        except OSError as error:
            raise TestsUnusable(f"the pipe to the candidate failed: {error}") from None
        self.gone = True
        raise CandidateGone


def _put_into(old: Any, new: Any) -> None:
    """Make an argument what the candidate's copy of it has become."""
    match old, new:
        case list(), list():
            old[:] = new
        case (set(), set()) | (dict(), dict()):
            old.clear()
            old.update(new)


def _rebuilt(error: Mapping[str, Any]) -> BaseException:
    """The candidate's exception, of the nearest built-in class, with a note of its origin."""
    kind = getattr(builtins, str(error.get("builtin"))[:100], None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or kind is Exception:
        kind = CandidateError
    exception: Exception = kind.__new__(kind)
    exception.args = (str(error.get("message")),)
    exception.from_candidate = error  # type: ignore[attr-defined]
    return exception


def run(job: Mapping[str, Any], calls: int, replies: int) -> dict[str, Any]:
    """Run the tests: the record of each case, and what became of the candidate."""
    proxy = Proxy(calls, replies)
    try:
        record = {"cases": _run(job, proxy), "unusable": ""}
    except TestsUnusable as error:
        record = {"cases": [], "unusable": str(error)[:500]}
    return {"calls": proxy.count, "gone": proxy.gone, **record}


def _run(job: Mapping[str, Any], proxy: Proxy) -> list[dict[str, Any]]:
    entry_point = job["entry_point"]
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    names = module.__dict__
    try:
        exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), names)
        tree = ast.parse(job["tests"], FILE)
    except BaseException as error:
        raise TestsUnusable(f"{type(error).__name__}: {error}") from None
    names[entry_point] = proxy
    outcomes, asked = [], []
    for statement in tree.body:
        outcomes.append(_statement(statement, names))
        asked.append(proxy.count > 0)
    cases = [
        outcome
        for outcome, statement, was_asked in zip(outcomes, tree.body, asked, strict=True)
        # What passed before the candidate was asked for anything tests nothing, unless it asserts.
        if _is_case(statement) and (was_asked or _asserts(statement) or not outcome["passed"])
    ]
    prelude = [outcome for outcome, statement in zip(outcomes, tree.body, strict=True) if not _is_case(statement)]
    if not cases and callable(names.get("check")):
        cases = [_attempt(lambda: names["check"](proxy), "check(candidate)")]
    if not cases:
        raise TestsUnusable("they hold no assert and define no check(candidate)")
    broken = next((outcome for outcome in prelude if not outcome["passed"]), None)
    return [broken] * len(cases) if broken else cases


def _is_case(statement: ast.stmt) -> bool:
    """Whether it tests something, rather than preparing for it."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    return not isinstance(statement, (*_NO_CASE, *_NO_CASE_EITHER))


def _asserts(statement: ast.stmt) -> bool:
    return any(isinstance(part, ast.Assert | ast.Raise) for part in ast.walk(statement))


def _statement(statement: ast.stmt, names: dict[str, Any]) -> dict[str, Any]:
    code = compile(ast.Module([statement], []), FILE, "exec", dont_inherit=True)
    return _attempt(lambda: exec(code, names), ast.unparse(statement))


def _attempt(action: Callable[[], object], label: str) -> dict[str, Any]:
    """One case's record: whether it passed, and if not, what happened and whether the candidate did it."""
    label = label if len(label) <= 200 else label[:199] + "…"
    try:
        action()
        return {"passed": True, "label": label, "what": "", "candidate": None}
    except CandidateGone:
        return {"passed": False, "label": label, "what": "gone", "candidate": None}
    except TestsUnusable:
        raise
    except BaseException as error:
        origin = getattr(error, "from_candidate", None)
        if origin is None and isinstance(error, NameError | ImportError | SystemExit | KeyboardInterrupt):
            raise TestsUnusable(f"{label}: {type(error).__name__}: {error}") from None
        what = f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__
        return {"passed": False, "label": label, "what": what, "candidate": origin}
