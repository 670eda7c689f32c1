"""The supervisor of one run: it enters the namespaces, starts process 1 in them, and kills it when time is up.

It lives outside the run's process namespace, where nothing of the run can reach it. When process 1 is dead the
kernel has killed every process of the namespace, and the namespaces, with the run's files, are gone.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from . import init, kernel, plain, root

FLAGS = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
CHILD_ID = 1000
"""The user and group of a candidate, as it sees them; outside it is nobody, or the user who started the run."""


def enter_namespaces(proc: int) -> None:
    """Leave everything that is shared with the machine; root becomes nobody. Raises OSError."""
    root.give_up_root()
    kernel.enter_user_namespace(FLAGS, proc, CHILD_ID)
    socket.sethostname("sandbox")


def tried(action: Callable[[], None]) -> str:
    """Why the action failed in a child process of its own; empty if it did not."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
        except Exception as error:
            os.write(writing, str(error).encode() or b"failed")
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        reason = file.read().decode()
    _, status = os.waitpid(child, 0)
    return reason or (f"the probe died with status {status}" if status else "")


def supervise(
    control: socket.socket, seconds: float | None, enter: Callable[[], None], start: Callable[[], None]
) -> None:
    """Run `start` as process 1 and tell `control` how that ended: {"exit": status} or {"failed": reason}.

    The run is killed after so many seconds, if any, and as soon as the other end of `control` closes.
    """
    try:
        enter()
        first = os.fork()
    except OSError as error:
        _tell(control, {"failed": str(error)})
        return
    if first == 0:
        _become_first(control, start)
    _wait(first, control, seconds)
    _, status = os.waitpid(first, 0)
    _tell(control, {"exit": os.waitstatus_to_exitcode(status)})


def _become_first(control: socket.socket, start: Callable[[], None]) -> None:
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        start()
    except init.Begin:
        control.close()
        raise
    except BaseException as error:
        _tell(control, {"failed": f"{type(error).__name__}: {error}"})
        os._exit(1)
    os._exit(0)


def _wait(first: int, control: socket.socket, seconds: float | None) -> None:
    ended = os.pidfd_open(first)
    watched = select.poll()
    watched.register(ended, select.POLLIN)
    watched.register(control, select.POLLIN)
    happened = watched.poll(None if seconds is None else seconds * 1000)
    if not any(number == ended for number, _ in happened):
        os.kill(first, signal.SIGKILL)
    os.close(ended)


def _tell(control: socket.socket, message: Mapping[str, Any]) -> None:
    with suppress(OSError):  # nobody may be there to hear it
        control.send(plain.dumps(message), socket.MSG_NOSIGNAL)
