"""Ctrl-C is never lost."""

import os
import signal

import pytest

from align.stages.run import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_whose_exception_is_swallowed_ends_the_run_at_the_next_check(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        with pytest.raises(KeyboardInterrupt):  # what a destructor or a callback of native code would swallow
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    assert signal.getsignal(number) is before
