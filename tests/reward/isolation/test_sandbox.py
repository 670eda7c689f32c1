"""The sandbox seen from inside and from outside, and what happens where there is none."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from reward import RewardError
from reward.isolation import (
    Call,
    Calls,
    Dialogue,
    Execution,
    Limits,
    LocalExecutor,
    Program,
    SandboxFailure,
    SandboxUnavailable,
    check,
    namespace_executor,
    unsafe_executor,
    zygote,
)

from ..corpus.code_corpus import NEEDS_ISOLATION, REFUSING

HELLO = Program("print('hello')", ("",))
QUICK = Limits(cpu_seconds=2, wall_seconds=10, total_seconds=30)
SHORT = Limits(cpu_seconds=2, wall_seconds=1, total_seconds=10)


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    executor = namespace_executor()
    yield executor
    executor.close()


def printed(executor: LocalExecutor, source: str, limits: Limits = QUICK) -> Any:
    """What a program prints, as JSON."""
    [case] = executor.run(Program(source, ("",)), limits).cases
    assert case.status == 0, case
    return json.loads(case.stdout)


def descendants(executor: LocalExecutor) -> list[psutil.Process]:
    return psutil.Process(executor.zygote().pid).children(recursive=True)


def wait_until(condition: Any, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def running(executor: LocalExecutor, seconds: int) -> Iterator[tuple[Future[Execution], list[psutil.Process]]]:
    """A program that sleeps, and the processes of its run: supervisor, process 1 and its own."""
    executor.run(HELLO, QUICK)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(executor.run, Program(f"import time; time.sleep({seconds})", ("",)), QUICK)
        assert wait_until(lambda: len(descendants(executor)) == 3)
        yield run, descendants(executor)


@NEEDS_ISOLATION
class TestInside:
    """What a candidate finds."""

    def test_nobody_without_rights(self, executor: LocalExecutor) -> None:
        source = """
import ctypes, json, os
libc = ctypes.CDLL(None)
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[1] * 6)
libc.capget(header, data)
bounding = [number for number in range(41) if libc.prctl(23, number, 0, 0, 0) == 1]
print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), list(data), bounding, libc.prctl(39, 0, 0, 0, 0)]))
"""
        user, group, groups, capabilities, bounding, no_new_privileges = printed(executor, source)
        assert user == group == [1000] * 3
        assert set(groups) <= {65534}
        assert capabilities == [0] * 6
        assert bounding == []
        assert no_new_privileges == 1

    def test_an_empty_environment_and_four_descriptors(self, executor: LocalExecutor) -> None:
        source = """
import json, os
def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False
print(json.dumps([dict(os.environ), [number for number in range(4096) if is_open(number)], os.listdir(".")]))
"""
        assert printed(executor, source) == [{}, [0, 1, 2, 3], []]

    def test_a_root_that_cannot_be_written(self, executor: LocalExecutor) -> None:
        source = """
import json, os
writable = []
for folder, names, _ in os.walk("/"):
    if os.statvfs(folder).f_flag & os.ST_RDONLY == 0:
        writable.append(folder)
print(json.dumps([writable, os.getcwd(), sorted(os.listdir("/dev")), os.path.exists("/proc"), os.path.exists("/sys")]))
"""
        writable, here, devices, *pseudo = printed(executor, source)
        assert writable == [here]
        assert devices == ["null", "random", "urandom", "zero"]
        assert pseudo == [False, False]

    def test_process_2_of_a_machine_without_a_network(self, executor: LocalExecutor) -> None:
        source = """
import json, os, ctypes
print(json.dumps([os.getpid() <= 3, os.getppid(), os.uname().nodename]))
"""
        assert printed(executor, source) == [True, 1, "sandbox"]

    def test_the_standard_library_works(self, executor: LocalExecutor) -> None:
        source = """
import asyncio, ctypes, decimal, hashlib, json, lzma, random, sqlite3, ssl, zoneinfo, xml.etree.ElementTree, email.message
import concurrent.futures, statistics, difflib, unicodedata, pprint, argparse, unittest, html.parser, http.client
print(json.dumps([hashlib.sha256(b"").hexdigest()[:8], sqlite3.connect(":memory:").execute("select 42").fetchone()]))
"""
        assert printed(executor, source) == ["e3b0c442", [42]]

    def test_no_variable_of_ours_but_the_job_and_the_inputs(self, executor: LocalExecutor) -> None:
        """A descriptor or a limit that by chance is the answer must not be there for a candidate to find."""
        source = """
import sys
def f():
    frame, seen = sys._getframe(1), {}
    while frame is not None:
        if frame.f_locals is not frame.f_globals:
            seen |= frame.f_locals
        frame = frame.f_back
    return [[name, repr(value)] for name, value in seen.items()]
"""
        for job in (Calls(source, "f", (Call((), {}),)), Program(source + "print(repr(f()))", ("",))):
            [case] = executor.run(job, QUICK).cases
            found = dict(case.result["value"] if case.result else ast.literal_eval(case.stdout))
            assert found.keys() <= {
                "job",
                "inputs",
                "role",
                "function",
                "args",
                "kwargs",
                "arguments",
                "source",
                "name",
                "code",
                "module",
            }
            assert found.get("args", "[]") == "[]"

    def test_cases_do_not_see_each_other(self, executor: LocalExecutor) -> None:
        source = "import os\nprint(os.listdir('.'))\nopen('mark', 'w').write('x')\nimport json\njson.mark = 1"
        execution = executor.run(Program(source + "\nprint(hasattr(json, 'mark'))", ("", "")), QUICK)
        assert [case.stdout for case in execution.cases] == ["[]\nTrue\n"] * 2

    def test_a_call_gets_and_returns_plain_data(self, executor: LocalExecutor) -> None:
        job = Calls("def f(x, *, y): return [x, y, (1, 2), {3}]", "f", (Call(({"a": (1,)},), {"y": b"\0"}),))
        [case] = executor.run(job, QUICK).cases
        assert case.result is not None
        expected = [{"dict": [["a", {"tuple": [1]}]]}, {"bytes": "00"}, {"tuple": [1, 2]}, {"set": [3]}]
        assert case.result["value"] == expected

    def test_test_code_and_candidate_are_in_different_processes(self, executor: LocalExecutor) -> None:
        source = "import os, sys\nmark = 1\ndef f(): return ['tests' in sys.modules, os.listdir('.')]"
        tests = "open('here', 'w').close()\nassert f() == [False, []]\nassert 'mark' not in globals()"
        execution = executor.run(Dialogue(source, "f", tests), QUICK)
        assert execution.tester is not None
        assert execution.tester.result is not None
        assert [case["passed"] for case in execution.tester.result["cases"]] == [True] * 2


@NEEDS_ISOLATION
class TestOutside:
    """What a run is to the machine."""

    def test_it_has_six_namespaces_of_its_own_and_an_unprivileged_user(self, executor: LocalExecutor) -> None:
        with running(executor, seconds=1) as (run, family):
            for name in ("user", "mnt", "pid_for_children", "net", "ipc", "uts"):
                theirs = os.readlink(f"/proc/{family[0].pid}/ns/{name}")
                assert theirs != os.readlink(f"/proc/self/ns/{name}"), name
                assert theirs != os.readlink(f"/proc/{executor.zygote().pid}/ns/{name}"), name
            assert {process.uids().real for process in family} == {os.getuid() or 65534}
            run.result()

    def test_it_is_killed_at_the_wall_limit_and_nothing_is_left(self, executor: LocalExecutor) -> None:
        started = time.monotonic()
        [case] = executor.run(Program("import time; time.sleep(1000)", ("",)), SHORT).cases
        assert case.ended == "wall"
        assert time.monotonic() - started < 8
        assert wait_until(lambda: descendants(executor) == [])

    def test_all_its_cases_share_a_limit(self, executor: LocalExecutor) -> None:
        limits = Limits(cpu_seconds=5, wall_seconds=5, total_seconds=3)
        execution = executor.run(Program("import time; time.sleep(0.6)", ("",) * 10), limits)
        assert execution.timed_out
        assert 0 < len(execution.cases) < 10

    def test_it_dies_with_its_owner(self) -> None:
        source = (
            "from reward.isolation import *\n"
            "executor = namespace_executor()\n"
            "print(executor.zygote().pid, flush=True)\n"
            "executor.run(Program('import time; time.sleep(1000)', ('',)), Limits(wall_seconds=500, total_seconds=500))\n"
        )
        owner = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        zygote = psutil.Process(int(owner.stdout.readline()))
        assert wait_until(lambda: len(zygote.children(recursive=True)) == 3)
        family = [zygote, *zygote.children(recursive=True)]
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []

    def test_it_dies_with_its_supervisor_and_that_is_our_failure(self, executor: LocalExecutor) -> None:
        with running(executor, seconds=1000) as (run, family):
            family[0].kill()
            with pytest.raises(SandboxFailure, match="supervisor"):
                run.result()
        assert psutil.wait_procs(family, timeout=5)[1] == []

    def test_a_dead_zygote_is_replaced_and_closing_leaves_no_process(self) -> None:
        executor = namespace_executor()
        executor.run(HELLO, QUICK)
        zygote = psutil.Process(executor.zygote().pid)
        zygote.kill()
        assert wait_until(lambda: zygote.status() == psutil.STATUS_ZOMBIE)
        assert executor.run(HELLO, QUICK).cases[0].stdout == "hello\n"
        zygote = psutil.Process(executor.zygote().pid)
        executor.close()
        assert not zygote.is_running()
        assert executor.run(HELLO, QUICK).cases[0].stdout == "hello\n"
        executor.close()

    def test_runs_of_several_threads_do_not_mix(self, executor: LocalExecutor) -> None:
        jobs = [Program(f"print(int(input()) + {n})", (str(n), "0")) for n in range(16)]
        with ThreadPoolExecutor(8) as pool:
            executions = list(pool.map(lambda job: executor.run(job, Limits()), jobs))
        texts = [[case.stdout for case in execution.cases] for execution in executions]
        assert texts == [[f"{2 * n}\n", f"{n}\n"] for n in range(16)]


def test_limits_must_be_positive() -> None:
    with pytest.raises(RewardError, match="limit memory_mb must be a positive number, not -1"):
        Limits(memory_mb=-1)


class TestWithoutIsolation:
    """A machine that forbids namespaces, played by a zygote to which `unshare` is refused."""

    @pytest.fixture(autouse=True)
    def no_namespaces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zygote, "_BOOT", REFUSING)

    def test_nothing_is_run_and_the_missing_piece_is_named(self, tmp_path: Path) -> None:
        executor = namespace_executor()
        with pytest.raises(SandboxUnavailable, match=r"Missing: user namespaces \(.*unshare\(user\)") as caught:
            executor.run(Program(f"open({str(tmp_path / 'ran')!r}, 'w')", ("",)), QUICK)
        assert "align sandbox check" in str(caught.value)
        assert "unsafe_no_isolation" in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_check_says_what_is_missing(self) -> None:
        pieces = {piece.name: piece for piece in check()}
        assert not pieces["user namespaces"].ok
        assert "Operation not permitted" in pieces["user namespaces"].detail
        assert "trial run" not in pieces

    def test_the_unsafe_executor_runs_all_the_same(self, tmp_path: Path) -> None:
        executor = unsafe_executor()
        source = f"import os\nprint(os.path.exists({str(tmp_path)!r}), os.listdir('.'))\nopen('x', 'w').close()"
        [first, second] = executor.run(Program(source, ("", "")), QUICK).cases
        assert first.stdout == second.stdout == "True []\n"
        executor.close()
        assert not executor.isolated


@pytest.mark.parametrize(
    ("source", "limits", "ended", "status"),
    [
        ("while True: pass", Limits(cpu_seconds=1), "exit", -signal.SIGXCPU),
        ("import time; time.sleep(100)", SHORT, "wall", -signal.SIGKILL),
        ("print('x' * 10**8)", QUICK, "output", -signal.SIGKILL),
        ("bytearray(10**11)", QUICK, "exit", 1),
    ],
    ids=["time", "wall", "output", "memory"],
)
def test_the_unsafe_executor_keeps_its_limits(source: str, limits: Limits, ended: str, status: int) -> None:
    executor = unsafe_executor()
    [case] = executor.run(Program(source, ("",)), limits).cases
    executor.close()
    assert (case.ended, case.status) == (ended, status)


@NEEDS_ISOLATION
def test_check_finds_everything_that_a_run_needs() -> None:
    pieces = check()
    assert all(piece.ok for piece in pieces if piece.needed)
    assert pieces[-1].name == "trial run"
    assert "hello" in pieces[-1].detail
