"""Nothing outlives a process that was killed, and nothing is ended after one that ended well."""

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

# One child in a session of its own, one without the mark, as Ray's are, and one with a child without it, as a sandbox may be.
CODE = """
import subprocess, sys, time
from align.run.watcher import LOOK_S, watched
SLEEP = "import time; time.sleep(300)"
BARE = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}], env={{}})"
with watched():
    subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
    subprocess.Popen([sys.executable, "-c", SLEEP], env={})
    time.sleep(2 * LOOK_S)
    subprocess.Popen([sys.executable, "-c", BARE])
    print("started", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def processes() -> Iterator[list["subprocess.Popen[str]"]]:
    """One for each test, started together, for a watcher looks only every few seconds."""
    command = [sys.executable, "-c", CODE]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    yield started.copy()
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def process(processes: list["subprocess.Popen[str]"]) -> "subprocess.Popen[str]":
    return processes.pop()


def family_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The watcher, three children, and a grandchild."""
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    found: list[psutil.Process] = []
    while len(found) < 5:
        found = psutil.Process(process.pid).children(recursive=True)
    return found


def test_what_was_started_does_not_outlive_a_process_that_was_killed(process: "subprocess.Popen[str]") -> None:
    family = family_of(process)
    process.kill()
    assert psutil.wait_procs(family, timeout=30)[1] == []


def test_after_a_good_end_the_watcher_ends_and_kills_nothing(process: "subprocess.Popen[str]") -> None:
    family = family_of(process)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    ended, running = psutil.wait_procs(family, timeout=2)
    for left in running:
        left.kill()
    assert (len(ended), len(running)) == (1, 4)
