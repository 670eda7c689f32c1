"""The corpus of hostile programs: every verdict right, nothing leaked, nothing left, nothing passed that cheats."""

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from reward import Score, Verdict
from reward.code import answer as reward_module
from reward.code.answer import code_tests
from reward.isolation import Calls, Dialogue

from ..corpus.code_corpus import NEEDS_EVERYTHING, SECRET, TASKS, Program, Recorder, hostile

pytestmark = NEEDS_EVERYTHING
PROGRAMS = hostile()


class Ran(NamedTuple):
    """The corpus after it ran, and what the machine looked like before and after."""

    scores: Mapping[str, Score]
    recorder: Recorder
    left_processes: list[str]
    new_files: set[str]
    new_mounts: int


def mounts() -> int:
    return len(Path("/proc/self/mountinfo").read_text().splitlines())


def files() -> set[str]:
    return {str(path) for path in Path(tempfile.gettempdir()).iterdir()} | {
        str(path) for path in Path("/dev/shm").iterdir()
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """The whole corpus run once, eight at a time, with a secret planted wherever a candidate could look for one."""
    planted = tmp_path_factory.mktemp("planted") / "secret.txt"
    planted.write_text(SECRET)
    patch = pytest.MonkeyPatch()
    patch.setenv("PLANTED_KEY", SECRET)
    inherited = os.open(planted, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    recorder = Recorder()
    patch.setitem(reward_module._executors, reward_module.NAMESPACES, recorder)
    files_before, mounts_before = files(), mounts()
    try:
        scores = code_tests([program.sample() for program in PROGRAMS], seconds=1, memory_mb=128, workers=8)
        zygote = psutil.Process(recorder.zygote().pid)
        psutil.wait_procs(zygote.children(recursive=True), timeout=5)
        left = [child.name() for child in zygote.children(recursive=True)]
        by_name = {program.name: score for program, score in zip(PROGRAMS, scores, strict=True)}
        yield Ran(by_name, recorder, left, files() - files_before, mounts() - mounts_before)
        recorder.close()
        assert not zygote.is_running()
    finally:
        recorder.close()
        os.close(inherited)
        patch.undo()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_verdict_is_right(ran: Ran, program: Program) -> None:
    score = ran.scores[program.name]
    assert (score.verdict, score.value) == (program.verdict, float(program.verdict is Verdict.PASS)), score.detail


def test_the_corpus_is_large_enough() -> None:
    assert len(PROGRAMS) >= 50
    assert len([program for program in PROGRAMS if program.name.startswith("cheats")]) >= 20
    assert {program.verdict for program in PROGRAMS} == set(Verdict) - {Verdict.INFRA_ERROR, Verdict.UNSCORED}


def test_no_planted_secret_leaves_a_sandbox(ran: Ran) -> None:
    """Neither what was planted around the run, nor an expected answer: not even test code knows what to say."""
    assert len(ran.recorder.executions) == len(PROGRAMS)
    told = [report for execution in ran.recorder.executions for report in execution.cases]
    assert told
    assert SECRET not in repr(told)


def test_expected_answers_are_not_among_what_the_candidate_is_given(ran: Ran) -> None:
    """A job holds the answers in one place only: the code of the tests, which the candidate's process never gets."""
    for job in ran.recorder.jobs:
        if isinstance(job, Calls):
            assert SECRET not in repr(job)
            assert not hasattr(job, "expected")
        if isinstance(job, Dialogue):
            assert SECRET not in job.source


def test_nothing_is_left(ran: Ran) -> None:
    assert ran.left_processes == []
    assert ran.new_mounts == 0
    assert not [path for path in ran.new_files if "candidate" in path or "sandbox" in path]
    assert threading.active_count() < 50


def test_every_task_can_be_passed() -> None:
    """A corpus whose tasks nobody passes would prove nothing."""
    answers = {
        "stdio": "print(2 * int(input()))",
        "function": "def double(n): return 2 * n",
        "one": "def one(): return 1",
        "order": "def order(items): return sorted(items)",
        "secret": f"def reveal(): return {SECRET!r}",
        "assert": "def double(n): return n + n",
        "check": "def double(n): return n * 2",
        "order check": "order = sorted",
        "secret assert": f"reveal = lambda: {SECRET!r}",
    }
    assert answers.keys() == TASKS.keys()
    samples = [Program(task, task, None, source).sample() for task, source in answers.items()]
    assert [score.verdict for score in code_tests(samples)] == [Verdict.PASS] * len(samples)
