"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP are never lost, let a step end within its grace, and end the process when they come twice."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from align.errors import Terminated
from align.session.ray import _Head, kept_signal_handlers
from align.session.signals import StopRequest

KINDS = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGUSR1: Terminated,
    signal.SIGHUP: Terminated,
}


@pytest.fixture(autouse=True)
def _no_nohup() -> Iterator[None]:
    """What the tests began under is not what they are of."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", KINDS)
def test_a_signal_whose_exception_is_swallowed_ends_the_run_at_the_next_check(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        with pytest.raises(KINDS[number]):  # what a destructor or a callback of native code would swallow
            os.kill(os.getpid(), number)
        with pytest.raises(KINDS[number]) as again:
            stop.check()
    assert again.type is KINDS[number]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", KINDS)
def test_what_is_deferred_ends_before_the_run_does(number: signal.Signals) -> None:
    ended = False
    with StopRequest(grace_s=60) as stop:
        with stop.deferred():
            os.kill(os.getpid(), number)
            stop.check()
            assert stop.asked
            ended = True
        with pytest.raises(KINDS[number]):
            stop.check()
    assert ended


def test_under_nohup_a_run_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_ray_starts_outlives_the_terminal() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGHUP)"
    with kept_signal_handlers():
        assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


@pytest.fixture
def other_thread() -> Iterator[int]:
    """The id of a thread that waits until the test is over, and takes signals as those of Ray and gRPC do."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    yield thread.ident or 0
    over.set()
    thread.join()


@pytest.mark.parametrize("takes", ["this thread", "another thread"])
def test_a_run_hears_of_the_end_of_its_terminal_once_ray_has_started(takes: str, other_thread: int) -> None:
    started = []

    def start() -> None:
        with kept_signal_handlers():
            signal.pthread_kill(threading.get_ident() if takes == "this thread" else other_thread, signal.SIGHUP)
            time.sleep(0.1)  # Python calls a handler a little after another thread has taken the signal
            started.append("Ray")

    with StopRequest(), pytest.raises(Terminated):
        start()
    assert started
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_ctrl_c_while_ray_starts_leaves_no_signal_blocked() -> None:
    with StopRequest(), pytest.raises(KeyboardInterrupt), kept_signal_handlers():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_signal_from_outside_is_not_the_death_of_ray() -> None:
    head = object.__new__(_Head)
    head._processes, head._died, head.over = {}, None, threading.Event()
    with StopRequest(), head.watched(), pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_when_the_grace_is_over_what_is_deferred_is_interrupted() -> None:
    began = time.monotonic()
    with StopRequest(grace_s=0.2) as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated):
            time.sleep(30)
    assert 0.2 <= time.monotonic() - began < 20


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, 128 + signal.SIGINT), (signal.SIGTERM, 0)])
def test_a_second_ctrl_c_ends_the_process_at_once_and_a_second_sigterm_does_not(
    second: signal.Signals, status: int
) -> None:
    code = f"""
import os, signal
from align.session.signals import StopRequest
with StopRequest(grace_s=60) as stop, stop.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), {int(second)})
    os.kill(os.getpid(), 0)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=30)
    assert done.returncode == status
