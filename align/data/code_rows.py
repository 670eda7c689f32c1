"""Programming tasks from the rows of HumanEval, MBPP and APPS: a prompt, and tests as `reward.code.cases` takes them.

The code in a row is parsed, and never run here.
"""

import ast
import builtins
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from align.data.cards import AppsTests, HumanEvalTests, MbppTests
from align.errors import UserError
from reward.code.cases import UnusableTests, parse_tests

Row = Mapping[str, Any]


class NothingToJudgeBy(Exception):  # noqa: N818
    """The row is as published, and no answer to it can be judged: it is left out and counted."""


def code_task(
    columns: HumanEvalTests | MbppTests | AppsTests, row: Row, prompt: str, where: str
) -> tuple[str, dict[str, Any]]:
    """What to ask, and the tests of an answer. `prompt` is the row's own.

    Raises UserError naming the column where the row is not in the format, and NothingToJudgeBy.
    """
    match columns:
        case HumanEvalTests():
            task = _human_eval(columns, row, prompt, where)
        case MbppTests():
            task = _mbpp(columns, row, prompt, where)
        case AppsTests():
            task = _apps(columns, row, prompt, where)
    try:
        parse_tests(task[1], float_tolerance=0.0)
    except UnusableTests as error:
        raise NothingToJudgeBy(str(error)) from None
    return task


def _human_eval(columns: HumanEvalTests, row: Row, prompt: str, where: str) -> tuple[str, dict[str, Any]]:
    code, entry_point = (_column(row, column, where) for column in (columns.code, columns.entry_point))
    if "check" not in _functions(_parsed(code, f"{where}: column {columns.code!r}")):
        raise UserError(f"{where}: column {columns.code!r} defines no check(candidate)")
    if entry_point not in _functions(_parsed(prompt, f"{where}: the prompt")):
        raise UserError(f"{where}: the prompt defines no {entry_point!r}, as column {columns.entry_point!r} says")
    return prompt, {"kind": "assert", "entry_point": entry_point, "code": code, "setup": prompt}


def _mbpp(columns: MbppTests, row: Row, prompt: str, where: str) -> tuple[str, dict[str, Any]]:
    code = _lines(row, columns.asserts, where)
    setup = _lines(row, columns.setup, where) if columns.setup else ""
    tests = _parsed(code, f"{where}: column {columns.asserts!r}")
    prepared = _parsed(setup, f"{where}: column {columns.setup!r}")
    solution = _parsed(_column(row, columns.solution, where), f"{where}: column {columns.solution!r}")
    tested = set(_functions(solution)).intersection(*map(_calls, tests.body))
    if len(tested) != 1 or not tests.body:
        raise UserError(
            f"{where}: each assert in column {columns.asserts!r} must call one and the same function of those "
            f"in column {columns.solution!r}; they call {', '.join(sorted(tested)) or 'none'}"
        )
    [entry_point] = tested
    if unknown := _used(tests, prepared) - {entry_point} - set(dir(builtins)):
        raise NothingToJudgeBy(f"the tests use {', '.join(sorted(unknown))}, which only the solution defines")
    asked = f"{prompt.rstrip()}\nYour code should pass these tests:\n\n{code}"
    return asked, {"kind": "assert", "entry_point": entry_point, "code": code, "setup": setup}


def _apps(columns: AppsTests, row: Row, prompt: str, where: str) -> tuple[str, dict[str, Any]]:
    name, inputs, outputs = _cases(_column(row, columns.cases, where, empty=True), f"{where}: column {columns.cases!r}")
    if name is None:
        texts = [{"input": _stream(given), "output": _stream(out)} for given, out in zip(inputs, outputs, strict=True)]
        asked = f"{prompt.rstrip()}\n\nRead from standard input, and write to standard output."
        return asked, {"kind": "stdio", "cases": texts}
    starter = _column(row, columns.starter, where, empty=True)
    # Codewars' outputs are each in a list, as the arguments are; LeetCode's are not, and ask for a method.
    if "class Solution" not in starter and all(isinstance(out, list) and len(out) == 1 for out in outputs):
        outputs = [out for [out] in outputs]
    calls = [
        {"args": [_with_numbers(value) for value in given] if isinstance(given, list) else given, "expected": expected}
        for given, expected in zip(inputs, map(_with_numbers, outputs), strict=True)
    ]
    asked = f"{prompt.rstrip()}\n\nWrite this function, outside any class:\n\n{_head(starter, name)}"
    return asked, {"kind": "function", "entry_point": name, "cases": calls}


def _cases(text: str, where: str) -> tuple[str | None, list[Any], list[Any]]:
    """The name of the function, if there is one, and the inputs and outputs of the same number of cases."""
    if not text.strip():
        raise NothingToJudgeBy("there are no tests")
    try:
        match json.loads(text):
            case {"inputs": list(inputs), "outputs": list(outputs), **rest}:
                name = rest.get("fn_name")
            case _:
                raise UserError(f"{where} must hold JSON of lists named inputs and outputs")
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
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


def _column(row: Row, column: str, where: str, *, empty: bool = False) -> str:
    if column not in row:
        raise UserError(f"{where}: no column {column!r} for the tests; there are {', '.join(row) or 'none'}")
    value = row[column]
    if empty and value in (None, ""):
        return ""
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: column {column!r} must hold text for the tests, not {value!r:.40}")
    return value


def _lines(row: Row, column: str, where: str) -> str:
    """The text of a column that may hold a list of lines; empty where that is empty."""
    if isinstance(row.get(column), list) and all(isinstance(line, str) for line in row[column]):
        return "\n".join(row[column])
    return _column(row, column, where, empty=True)


def _parsed(code: str, where: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{where} is no Python: {error}") from None


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
