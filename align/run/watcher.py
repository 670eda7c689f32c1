"""Terminates the processes that a killed run leaves behind: Ray takes longer to do so than a user waits, and misses grandchildren.

The watcher is a separate process. It notices the run's death when a pipe closes, and finds the processes to end by polling the run's
descendants while it lives and by an environment variable that all of them inherit.
"""

import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

MARK = "ALIGN_WATCHED"
PATIENCE_S = 20.0
LOOK_S = 2.0


@contextmanager
def watched() -> Iterator[None]:
    """Ensure that processes started in the block do not outlive this process, even if it is killed."""
    mark = f"{os.getpid()}-{secrets.token_hex(8)}"
    os.environ[MARK] = mark
    command = [sys.executable, "-P", __file__, mark]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watcher.communicate(b"well ended")
        del os.environ[MARK]


def main(mark: str) -> None:
    """Wait for the pipe to close. Unless the run announced its end, kill its known descendants and all processes with `mark`."""
    import psutil

    watched_process = psutil.Process(int(mark.partition("-")[0]))
    known: set[psutil.Process] = set()
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        with suppress(psutil.Error):
            known = {process for process in known if process.is_running()}
            known |= set(watched_process.children(recursive=True))
    if sys.stdin.buffer.read():
        return
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and _kill(known | _marked(mark)):
        time.sleep(0.2)


def _marked(mark: str) -> set[Any]:
    """The processes with the mark and their descendants. Ray's processes lose it when they set their title."""
    import psutil

    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found |= {process, *process.children(recursive=True)}
    return found


def _kill(processes: set[Any]) -> bool:
    """Kill the processes; whether any of them was still running."""
    import psutil

    left = False
    for process in processes:
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                left = True
    return left


if __name__ == "__main__":
    main(sys.argv[1])
