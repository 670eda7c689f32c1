"""The forms in which tables hold programming tasks, those of HumanEval, MBPP and APPS.

A form is a part of a data card that says which columns it reads. Its `task` is what to ask, and tests as `reward.code.cases` takes
them; it raises NothingToJudgeBy for a row whose answers cannot be judged, and UserError for one of another form. The code in a
row is parsed, and never run here.
"""

import ast
import builtins
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from align.data.rows import NothingToJudgeBy, Row
from align.data.types import Strict
from align.errors import UserError
from reward.code.cases import UnusableTests, parse_tests

ROLE = "tests"
Task = tuple[str, dict[str, Any]]


class HumanEvalTests(Strict):
    """Test code of HumanEval (Chen et al. 2021, arXiv:2107.03374); the prompt is the head of the function."""

    format: Literal["human_eval"]
    code: str
    """Defines `check(candidate)`."""
    entry_point: str

    def task(self, row: Row, prompt: str) -> Task:
        code, entry_point = (row.text(column, ROLE) for column in (self.code, self.entry_point))
        if "check" not in _functions(_parsed(code, row, self.code)):
            raise row.error(self.code, "defines no check(candidate)")
        if entry_point not in _functions(_parsed(prompt, row)):
            raise UserError(f"{row.where}: the prompt defines no {entry_point!r}, as column {self.entry_point!r} says")
        return prompt, {"kind": "assert", "entry_point": entry_point, "code": code, "setup": prompt}


class MbppTests(Strict):
    """Asserts of MBPP (Austin et al. 2021, arXiv:2108.07732); the prompt shows them, as the paper's does."""

    format: Literal["mbpp"]
    asserts: str
    setup: str | None = None
    """Code that the asserts need, one text or a list of imports."""
    solution: str
    """The reference, parsed for the name of the function and never run."""

    def task(self, row: Row, prompt: str) -> Task:
        code = row.lines(self.asserts, ROLE)
        setup = row.lines(self.setup, ROLE) if self.setup else ""
        tests, prepared = _parsed(code, row, self.asserts), _parsed(setup, row, self.setup)
        solution = _parsed(row.text(self.solution, ROLE), row, self.solution)
        tested = set(_functions(solution)).intersection(*map(_calls, tests.body))
        if len(tested) != 1 or not tests.body:
            raise UserError(
                f"{row.where}: each assert in column {self.asserts!r} must call one and the same function of those "
                f"in column {self.solution!r}; they call {', '.join(sorted(tested)) or 'none'}"
            )
        [entry_point] = tested
        if unknown := _used(tests, prepared) - {entry_point} - set(dir(builtins)):
            raise NothingToJudgeBy(f"the tests use {', '.join(sorted(unknown))}, which only the solution defines")
        asked = f"{prompt.rstrip()}\nYour code should pass these tests:\n\n{code}"
        return asked, {"kind": "assert", "entry_point": entry_point, "code": code, "setup": setup}


class AppsTests(Strict):
    """Inputs and outputs of APPS (Hendrycks et al. 2021, arXiv:2105.09938), of a program or of a function."""

    format: Literal["apps"]
    cases: str
    """JSON text of `inputs`, `outputs` and, for a function, `fn_name`."""
    starter: str
    """The head of the function, or empty."""

    def task(self, row: Row, prompt: str) -> Task:
        name, inputs, outputs = _cases(row, self.cases)
        if name is None:
            texts = [
                {"input": _stream(given), "output": _stream(out)} for given, out in zip(inputs, outputs, strict=True)
            ]
            asked = f"{prompt.rstrip()}\n\nRead from standard input, and write to standard output."
            return asked, {"kind": "stdio", "cases": texts}
        starter = row.text(self.starter, ROLE, empty=True)
        # Codewars' outputs are each in a list, as the arguments are; LeetCode's are not, and ask for a method.
        if "class Solution" not in starter and all(isinstance(out, list) and len(out) == 1 for out in outputs):
            outputs = [out for [out] in outputs]
        calls = [
            {
                "args": [_with_numbers(value) for value in given] if isinstance(given, list) else given,
                "expected": expected,
            }
            for given, expected in zip(inputs, map(_with_numbers, outputs), strict=True)
        ]
        asked = f"{prompt.rstrip()}\n\nWrite this function, outside any class:\n\n{_head(starter, name)}"
        return asked, {"kind": "function", "entry_point": name, "cases": calls}


CodeRows = Annotated[HumanEvalTests | MbppTests | AppsTests, Field(discriminator="format")]


def code_task(form: CodeRows, row: Row, prompt: str) -> Task:
    """What to ask, and the tests of an answer. `prompt` is the row's own. Raises NothingToJudgeBy for tests that cannot be used."""
    task = form.task(row, prompt)
    try:
        parse_tests(task[1], float_tolerance=0.0)
    except UnusableTests as error:
        raise NothingToJudgeBy(str(error)) from None
    return task


def _cases(row: Row, column: str) -> tuple[str | None, list[Any], list[Any]]:
    """The name of the function, if there is one, and the inputs and outputs of the same number of cases."""
    text = row.text(column, ROLE, empty=True)
    if not text.strip():
        raise NothingToJudgeBy("there are no tests")
    try:
        match json.loads(text):
            case {"inputs": list(inputs), "outputs": list(outputs), **rest}:
                name = rest.get("fn_name")
            case _:
                raise row.error(column, "must hold JSON of lists named inputs and outputs")
    except json.JSONDecodeError as error:
        raise row.error(column, f"is not JSON: {error}") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise NothingToJudgeBy(str(error)) from None
    if len(inputs) != len(outputs) or not inputs:
        raise NothingToJudgeBy(f"there are {len(inputs)} inputs and {len(outputs)} outputs")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise NothingToJudgeBy(f"{name!r} is no name of a function")
    return name, inputs, outputs


def _stream(value: Any) -> Any:
    """The text of a stream, which may be published as a list of its lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value


def _with_numbers(value: Any) -> Any:
    """A value with the whole numbers that JSON made texts of, as keys of a dictionary."""
    if isinstance(value, dict) and all(re.fullmatch(r"-?[0-9]{1,18}", key) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def _head(starter: str, name: str) -> str:
    """The line that begins the function, of a method too."""
    found = re.search(rf"def\s+{re.escape(name)}\s*\(.*", starter)
    return re.sub(r"\(\s*self\s*,?\s*", "(", found.group().rstrip(), count=1) if found else f"def {name}(...):"


def _parsed(code: str, row: Row, column: str | None = None) -> ast.Module:
    """The code of a column, of the prompt where none is named."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        where = f"column {column!r}" if column else "the prompt"
        raise UserError(f"{row.where}: {where} is no Python: {error}") from None


def _functions(tree: ast.Module) -> Iterator[str]:
    return (statement.name for statement in tree.body if isinstance(statement, ast.FunctionDef))


def _calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def _used(*trees: ast.Module) -> set[str]:
    """The names that code uses and does not define anywhere."""
    used, defined = set(), set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.alias(name=name, asname=alias):
                defined.add(alias or name.partition(".")[0])
    return used - defined
