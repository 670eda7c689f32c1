"""What runs in the worker processes of `reward.isolation.killable`: a script of its own that imports nothing of ours.

    python -P inside.py JOB.py MEMORY_BYTES PARENT_PID

Standard input is the control socket. The process loads and warms the job once, says so, and from then on only
forks: each fork serves one socket that it was handed, within hard limits, until it is killed. The mother process
never sees a request, so a fork starts warm and clean in milliseconds, however badly the last one ended.

A job is a file with `warm() -> None` and `judge(request, enter) -> dict`; `enter(name)` tells the parent which
phase begins, so that it knows whose fault an overrun is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1


def main(job_path: str, memory_bytes: int, parent: int) -> None:
    control = socket.socket(fileno=0)
    try:
        job = _load(job_path)
        job.warm()
    except BaseException as error:
        control.send(f"failed {type(error).__name__}: {error}".encode()[:2000])
        raise
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # parsers and algebra make many short-lived objects
    control.send(b"ready")
    while os.getppid() == parent:
        if not select.select([control], [], [], 1.0)[0]:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        command, _, argument = message.decode().partition(" ")
        if command == "fork":
            control.send(f"{_fork(control, descriptors[0], job, memory_bytes)}".encode())
        elif command == "reap":
            control.send(f"{_reap(int(argument))}".encode())


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("job", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fork(control: socket.socket, descriptor: int, job: ModuleType, memory_bytes: int) -> int:
    mother = os.getpid()
    pid = os.fork()
    if pid:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        control.detach()
        os.dup2(1, 0)  # /dev/null in the place of the control socket
        _confine(mother, memory_bytes)
        _serve(socket.socket(fileno=descriptor), job.judge)
        status = 0
    finally:
        os._exit(status)


def _reap(pid: int) -> int:
    """The exit code of a fork that has ended, negative for a signal; 0 where there is none to wait for."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 0


def _confine(mother: int, memory_bytes: int) -> None:
    """Dies with its mother; may grow by so many bytes, write no file, start no process and leave no core."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != mother:
        os._exit(1)
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    most = _virtual_bytes() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _virtual_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 30


def _serve(connection: socket.socket, judge: Callable[[Any, Callable[[str], None]], dict[str, Any]]) -> None:
    full = _virtual_bytes() + resource.getrlimit(resource.RLIMIT_AS)[0] >> 1
    for line in connection.makefile("rb"):
        order = json.loads(line)

        def send(message: dict[str, Any], number: int = order["id"]) -> None:
            head = {"id": number, "cpu": time.process_time()}
            connection.sendall(json.dumps(head | message).encode() + b"\n")

        try:
            message: dict[str, Any] = {"reply": judge(order["request"], lambda phase: send({"phase": phase}))}
        except MemoryError:
            message = {"memory": True}
        except Exception as error:  # only its type: the text of an expression can take for ever to write
            message = {"raised": type(error).__name__}
        send(message | {"worn": _virtual_bytes() > full})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
