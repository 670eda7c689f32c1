"""Code, judged by running it against tests in a sandbox: see `reward.code.cases` for the tests' three kinds.

The sandbox is `reward.isolation`: where the machine cannot isolate, nothing is run. The expected outputs stay in this
process, or, for test code, in a sandbox that the candidate is not in.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial as bound
from typing import Any

from reward.code.blocks import program
from reward.code.cases import Tests, UnusableTests, parse_tests
from reward.isolation import Executor, Limits, LocalExecutor, SandboxFailure, namespace_executor, unsafe_executor
from reward.registry import register
from reward.types import RewardError, Sample, Score, Verdict

_log = logging.getLogger(__name__)

NAMESPACES = "namespaces"

_executors: dict[str, Executor] = {}
_lock = threading.Lock()


def _ready(executor: str = NAMESPACES, unsafe_no_isolation: bool = False, packages: Sequence[str] = ()) -> None:
    """Raise RewardError where this machine cannot run the programs as these parameters want it."""
    code_tests([], executor=executor, unsafe_no_isolation=unsafe_no_isolation, packages=packages)


@register("code_tests", batched=True, columns=["tests"], ready=_ready)
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
    float_tolerance: float = 1e-6,
    any_whitespace: bool = False,
    packages: Sequence[str] = (),
    workers: int = 0,
    executor: str = NAMESPACES,
    unsafe_no_isolation: bool = False,
) -> list[Score]:
    """Whether the program in the completion passes the tests in the metadata: `right` or `wrong`.

    `sample.metadata["tests"]` is as `reward.code.cases` says. The program is the block between fences that
    `reward.code.blocks.program` chooses, or with `fenced=False` the whole completion. With `partial` the value lies
    between `wrong` and `right` by the share of cases passed; the verdict is that of the first case that was not.

    Numbers that are returned or printed, integers aside, may differ by `float_tolerance`, relative or absolute; what is
    printed is compared line by line, with `any_whitespace` word by word (see `same_text` in `reward.code.cases`).

    `packages` names what programs and test code may import besides the standard library, as an import names it:
    [numpy]. They are those of this Python, and read-only in the sandbox; name what a package itself needs too.

    A program that several samples have in common, with the same tests, is run once.

    `seconds` of processor time, and six times that of wall time, are for each case; `memory_mb`, `disk_mb` and
    `output_kb` too. All cases of a program together have 24 times `seconds` of wall time: raise it for tests of many slow cases. `workers` programs run at once (0: one for each core). `executor` may name another executor as
    "package.module:function". `unsafe_no_isolation` runs the code with this user's rights and marks every score.

    Raises SandboxUnavailable where the machine cannot isolate, and RewardError where one of `packages` cannot be
    imported. A sample with unusable tests, or whose sandbox failed, gets INFRA_ERROR.
    """
    tolerance = _tolerance(float_tolerance)
    limits = Limits(
        cpu_seconds=seconds,
        wall_seconds=6 * seconds,
        total_seconds=24 * seconds,
        memory_mb=memory_mb,
        disk_mb=disk_mb,
        output_kb=output_kb,
        result_kb=output_kb,
    )
    runner = _executor(executor, unsafe_no_isolation, packages)
    if isinstance(runner, LocalExecutor):
        try:
            runner.zygote()  # a refusal comes before the first sample
        except SandboxFailure as error:
            return [Score(math.nan, Verdict.INFRA_ERROR, str(error)) for _ in samples]
    given = [sample.metadata.get("tests") for sample in samples]
    keys = [_key(one) for one in given]
    different_tests = dict(zip(keys, given, strict=True)).items()
    tests = {key: _parsed(one, tolerance, any_whitespace) for key, one in different_tests}
    sources = [_source(sample.completion, tests[key], fenced) for sample, key in zip(samples, keys, strict=True)]
    # What a score depends on: of samples that are equal in it, as many of a group are, one is run.
    runs = list(zip(sources, keys, strict=True))
    different = dict(zip(runs, samples, strict=True))
    score = bound(_score, executor=runner, limits=limits, partial=partial, right=right, wrong=wrong)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda run: score(different[run].id, run[0], tests[run[1]]), different)
        scores = dict(zip(different, found, strict=True))
    return [scores[run] for run in runs]


def _tolerance(value: Any) -> float:
    """The number, also from text, which is how YAML reads 1e-3. Raises RewardError."""
    try:
        if 0 <= (number := float(value)) < math.inf:
            return number
    except (TypeError, ValueError):
        pass
    raise RewardError(f"float_tolerance must be a number from 0 on, not {value!r}")


def _key(tests: Any) -> str:
    try:
        return repr(tests)
    except ValueError:  # an integer of more digits than Python writes
        return f"the tests at {id(tests)}"


def _parsed(tests: Any, float_tolerance: float, any_whitespace: bool) -> Tests | UnusableTests:
    try:
        return parse_tests(tests, float_tolerance=float_tolerance, any_whitespace=any_whitespace)
    except UnusableTests as error:
        return error


def _source(completion: str, tests: Tests | UnusableTests, fenced: bool) -> str | None:
    if not fenced:
        return completion
    return program(completion, None if isinstance(tests, UnusableTests) else tests.entry_point)


def _score(
    sample_id: str,
    source: str | None,
    tests: Tests | UnusableTests,
    *,
    executor: Executor,
    limits: Limits,
    partial: bool,
    right: float,
    wrong: float,
) -> Score:
    mark = "" if executor.isolated else "not isolated; "
    try:
        if isinstance(tests, UnusableTests):
            raise tests
        if source is None or not source.strip():
            return Score(wrong, Verdict.NO_ANSWER, f"{mark}no block of Python code between ``` fences")
        execution = executor.run(tests.job(source), limits, stop=not partial)
        outcomes = tests.outcomes(execution, limits)
    except UnusableTests as error:
        return Score(math.nan, Verdict.INFRA_ERROR, f"unusable tests of sample {sample_id!r}: {error}")
    except SandboxFailure as error:
        return Score(math.nan, Verdict.INFRA_ERROR, f"{mark}{error}")
    passed = sum(outcome.passed for outcome in outcomes)
    told = f"{mark}{passed} of {len(outcomes)} cases passed"
    if passed == len(outcomes):
        return Score(right, Verdict.PASS, told)
    value = wrong + (right - wrong) * passed / len(outcomes) if partial else wrong
    number, first = next((n, outcome) for n, outcome in enumerate(outcomes, 1) if not outcome.passed)
    return Score(value, first.verdict, f"{told}; case {number}: {first.detail}")


def _executor(name: str, unsafe: bool, packages: Sequence[str]) -> Executor:
    """The executor of that name with those packages, made at its first use in this process and closed at its end."""
    if isinstance(packages, str):
        raise RewardError(f"packages must be a list of names, such as [{packages}]")
    if packages and name != NAMESPACES:
        raise RewardError(f"packages are of our own sandbox: leave them out, or executor={name!r}")
    if unsafe and name != NAMESPACES:
        raise RewardError(f"unsafe_no_isolation takes the place of an executor: leave executor={name!r} out, or it")
    key = " ".join(["unsafe" if unsafe else name, *packages])
    with _lock:
        if key not in _executors:
            if unsafe:
                _log.warning("unsafe_no_isolation: a model's code runs with this user's rights; scores are marked")
            if name == NAMESPACES:
                made: Executor = unsafe_executor(packages) if unsafe else namespace_executor(packages)
            else:
                made = _imported(name)
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
            f"that returns a reward.isolation.Executor: {error}"
        ) from error
    return made
