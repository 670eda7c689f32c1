"""Code, judged by running it against tests in a sandbox: see `reward.code_cases` for the tests' three kinds.

The sandbox is `reward.sandbox`: where the machine cannot isolate, nothing is run. The expected outputs stay in this
process, or, for test code, in a sandbox that the candidate is not in.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import math
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial as bound

from reward.code_cases import Outcome, UnusableTests, parse_tests
from reward.registry import register
from reward.sandbox import Executor, Limits, LocalExecutor, SandboxFailure, namespace_executor, unsafe_executor
from reward.types import RewardError, Sample, Score, Verdict

_log = logging.getLogger(__name__)

NAMESPACES = "namespaces"
_PYTHON = ("", "python", "python3", "py")
_FENCE = re.compile(r"[ \t]{0,3}(`{3,})[ \t]*([^`\s]*)[^`]*")

_executors: dict[str, Executor] = {}
_lock = threading.Lock()


@register("code_tests", batched=True)
def code_tests(
    samples: Sequence[Sample],
    *,
    partial: bool = False,
    right: float = 1.0,
    wrong: float = 0.0,
    fenced: bool = True,
    seconds: float = 5.0,
    memory_mb: float = 512.0,
    disk_mb: float = 32.0,
    output_kb: float = 1024.0,
    float_tolerance: float = 1e-9,
    workers: int = 0,
    executor: str = NAMESPACES,
    unsafe_no_isolation: bool = False,
) -> list[Score]:
    """Whether the program in the completion passes the tests in the metadata: `right` or `wrong`.

    `sample.metadata["tests"]` is as `reward.code_cases` says. The program is the last fenced code block of Python
    or of no language, or with `fenced=False` the whole completion. With `partial` the value lies between `wrong` and
    `right` by the share of cases passed; the verdict is that of the first case that was not.

    A program that several samples have in common, with the same tests, is run once.

    `seconds` of processor time, and six times that of wall time, are for each case; `memory_mb`, `disk_mb` and
    `output_kb` too. `workers` programs run at once (0: one for each core). `executor` may name another executor as
    "package.module:function". `unsafe_no_isolation` runs the code with this user's rights and marks every score.

    Raises SandboxUnavailable where the machine cannot isolate. A sample with unusable tests, or whose sandbox
    failed, gets INFRA_ERROR.
    """
    limits = Limits(
        cpu_seconds=seconds,
        wall_seconds=6 * seconds,
        total_seconds=24 * seconds,
        memory_mb=memory_mb,
        disk_mb=disk_mb,
        output_kb=output_kb,
        result_kb=output_kb,
    )
    runner = _executor(executor, unsafe_no_isolation)
    if isinstance(runner, LocalExecutor):
        try:
            runner.launcher()  # a refusal comes before the first sample
        except SandboxFailure as error:
            return [Score(math.nan, Verdict.INFRA_ERROR, str(error)) for _ in samples]
    judge = bound(
        _score,
        executor=runner,
        limits=limits,
        partial=partial,
        right=right,
        wrong=wrong,
        fenced=fenced,
        float_tolerance=float_tolerance,
    )
    same = [_program_and_tests(sample, fenced) for sample in samples]
    different = dict(zip(same, samples, strict=True))
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        scores = dict(zip(different, pool.map(judge, different.values()), strict=True))
    return [scores[key] for key in same]


def _program_and_tests(sample: Sample, fenced: bool) -> tuple[str | None, str]:
    """What a score depends on. Of samples that are equal in it, as many of a group are, one is run."""
    source = last_code_block(sample.completion) if fenced else sample.completion
    return source, repr(sample.metadata.get("tests"))


def _score(
    sample: Sample,
    *,
    executor: Executor,
    limits: Limits,
    partial: bool,
    right: float,
    wrong: float,
    fenced: bool,
    float_tolerance: float,
) -> Score:
    mark = "" if executor.isolated else "not isolated; "
    try:
        tests = parse_tests(sample.metadata.get("tests"), float_tolerance=float_tolerance)
        source = last_code_block(sample.completion) if fenced else sample.completion
        if source is None or not source.strip():
            return Score(wrong, Verdict.NO_ANSWER, f"{mark}no closed block of Python code between ``` fences")
        execution = executor.run(tests.job(source), limits, stop=not partial)
        outcomes = tests.outcomes(execution, limits)
    except UnusableTests as error:
        return Score(math.nan, Verdict.INFRA_ERROR, f"unusable tests of sample {sample.id!r}: {error}")
    except SandboxFailure as error:
        return Score(math.nan, Verdict.INFRA_ERROR, f"{mark}{error}")
    passed = sum(outcome.passed for outcome in outcomes)
    if passed == len(outcomes):
        return Score(right, Verdict.PASS, f"{mark}{_count(passed, outcomes)}")
    value = wrong + (right - wrong) * passed / len(outcomes) if partial else wrong
    number, first = next((n, outcome) for n, outcome in enumerate(outcomes, 1) if not outcome.passed)
    return Score(value, first.verdict, f"{mark}{_count(passed, outcomes)}; case {number}: {first.detail}")


def _count(passed: int, outcomes: Sequence[Outcome]) -> str:
    return f"{passed} of {len(outcomes)} cases passed"


def last_code_block(text: str) -> str | None:
    """The last closed block between fences that names Python or no language; None if there is none."""
    found, fence, language, lines = None, "", "", list[str]()
    for line in text.split("\n"):
        match = _FENCE.fullmatch(line.rstrip("\r"))
        if not fence:
            if match:
                fence, language, lines = match[1], match[2].lower(), []
        elif match and not match[2] and len(match[1]) >= len(fence):
            if language in _PYTHON:
                found = "\n".join(lines) + "\n"
            fence = ""
        else:
            lines.append(line)
    return found


def _executor(name: str, unsafe: bool) -> Executor:
    """The executor of that name, made at its first use in this process and closed at its end."""
    if unsafe and name != NAMESPACES:
        raise RewardError(f"unsafe_no_isolation takes the place of an executor: leave executor={name!r} out, or it")
    key = "unsafe" if unsafe else name
    with _lock:
        if key not in _executors:
            if unsafe:
                _log.warning("unsafe_no_isolation: a model's code runs with this user's rights; scores are marked")
            made = unsafe_executor() if unsafe else namespace_executor() if name == NAMESPACES else _imported(name)
            atexit.register(made.close)
            _executors[key] = made
        return _executors[key]


def _imported(name: str) -> Executor:
    module, _, function = name.partition(":")
    try:
        made: Executor = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(
            f"executor {name!r} must be {NAMESPACES!r} or 'package.module:function', a function without arguments "
            f"that returns a reward.sandbox.Executor: {error}"
        ) from error
    return made
