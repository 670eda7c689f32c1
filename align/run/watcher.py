"""Ends what a process that was killed leaves behind: Ray's own end takes longer than a user waits, and knows of no grandchildren.

The watcher is a process of its own. It learns of the death by the end of a pipe, and knows what to end by having looked now and
then, and by a variable in the environment, which every process below has inherited.
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
    """What this process starts inside does not outlive it, even where it is killed."""
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
    """Wait for the pipe's end. Unless it was announced, end all that was seen below the process, and all with the mark."""
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
    """The processes with the mark and those below them. Ray's lose it where they give themselves a title."""
    import psutil

    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found |= {process, *process.children(recursive=True)}
    return found


def _kill(processes: set[Any]) -> bool:
    """End them. Whether any was left to end."""
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
