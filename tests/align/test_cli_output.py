"""What a command prints ends it in no way when nobody reads it any more: `| head`, a `tee` that Ctrl-C ended, a closed terminal."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RUN = """
import os, signal, sys
from pathlib import Path
from typing import Any

from align import cli
from align.errors import UserError
from align.run import Progress
from align.session.signals import StopRequest

def keys(*_: Any) -> None:
    with StopRequest(grace_s=60) as stop, Progress(log=Path(sys.argv[1])) as progress:
        progress.stage("SFT", 2)
        with stop.deferred():
            sys.stdin.readline()
            os.kill(os.getpid(), signal.SIGINT)
            progress.step(1, {"loss": 1.0})
            progress.note("saved")
        stop.check()

cli.COMMANDS["keys"] = lambda: keys()
sys.exit(cli.main(["keys"]))
"""


@pytest.mark.parametrize("open_output", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_a_run_that_nobody_reads_ends_its_step_and_keeps_its_log(
    open_output: Callable[[], tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = open_output()
    log = tmp_path / "log.txt"
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(log)],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=writer,
        start_new_session=True,
    )
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    run.communicate(b"go on\n", timeout=60)
    assert run.returncode == 128 + signal.SIGINT
    assert log.read_text().splitlines()[-1] == "saved"


def test_a_help_of_which_nothing_is_read_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
