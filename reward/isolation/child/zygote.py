"""The zygote: a small process, started once, that forks the supervisor of each run.

It loads a trusted job (see `worker`), or it imports the standard library once for all runs (a fork costs a millisecond, a Python start ten), enters the
read-only root, and from then on reads nothing but limits: programs and inputs reach the run by descriptors that
the zygote passes on unread. So no run can find anything of another in the memory that it inherits.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import site
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from . import case, init, kernel, plain, root, seccomp, supervisor, worker

PRELOADED = """
abc ast asyncio bisect cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq inspect
itertools json math numbers operator random re statistics string sys textwrap threading time traceback typing
"""
"""What candidates use most. Each import saved is milliseconds for every case."""
_SLOW_OR_SHOWN = ("_tkinter", "_curses", "_test", "xx", "_ctypes_test", "readline", "_xxtest")
_POLL_MS = 2000

Start = Callable[[Mapping[str, Any], Sequence[int]], None]
"""Be the supervisor of a process that gets a message and descriptors, the first of which is the control socket."""


def main(arguments: Sequence[str]) -> None:
    """Serve runs over the socket of the given descriptor until its other end is closed.

    Arguments: the descriptor, "isolated" or "unsafe" or "job", and JSON of the packages to show, {"names", "paths"}, or of
    the job's path. The first message out is {"ready": …}, {"missing", "why"}, {"package", "why"} or {"failed"}.
    """
    try:
        _launch(arguments)
        return
    except init.Begin as begin:
        child = begin.with_traceback(None)
    try:
        init.confine_case(child)
        job, inputs = child.run.job, child.inputs
        del child
        case.main(job, inputs)
    finally:
        os._exit(1)


def _launch(arguments: Sequence[str]) -> None:
    channel, mode, given = socket.socket(fileno=int(arguments[0])), arguments[1], plain.loads(arguments[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    start = _with_job(channel, given) if mode == "job" else _with_packages(channel, given, mode != "unsafe")
    if start is not None:
        gc.collect()
        gc.freeze()
        _serve(channel, parent, start)


def _with_job(channel: socket.socket, path: str) -> Start | None:
    """What starts a worker for a job."""
    try:
        job = worker.load(path)
    except BaseException as error:
        channel.send(plain.dumps({"failed": f"{os.path.basename(path)}: {type(error).__name__}: {error}"[:2000]}))
        return None
    gc.set_threshold(50_000, 20, 100)  # parsers and algebra make many short-lived objects
    channel.send(plain.dumps({"ready": True}))

    def start(message: Mapping[str, Any], numbers: Sequence[int]) -> None:
        control, connection = socket.socket(fileno=numbers[0]), numbers[1]
        supervisor.supervise(
            control, None, lambda: None, lambda: worker.serve(job, connection, message["memory_bytes"])
        )

    return start


def _with_packages(channel: socket.socket, packages: Mapping[str, Any], isolated: bool) -> Start | None:
    """What starts a run of a candidate's program."""
    os.environ.clear()
    _preload()
    kernel.one_malloc_arena()
    lines = b"" if seccomp.unavailable() else seccomp.program()
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    for name in packages["names"]:
        if why := _unusable(name, packages["paths"], proc):
            channel.send(plain.dumps({"package": name, "why": why}))
            return None
    setting = init.Setting(isolated, lines, root.work_folder(packages["paths"]))
    if isolated:
        try:
            root.enter(proc, packages["paths"])
            step, why = "run", supervisor.tried(lambda: _enter_a_run(proc, setting.work_folder))
        except OSError as error:
            step, why = "root", str(error)
        if why:
            channel.send(plain.dumps({"missing": step, "why": why}))
            return None
    channel.send(plain.dumps({"ready": True}))
    return partial(_run, setting, proc)


def _enter_a_run(proc: int, work_folder: str) -> None:
    supervisor.enter_namespaces(proc)
    kernel.mount("tmpfs", work_folder, "tmpfs", 0, "size=4k")


def _serve(channel: socket.socket, parent: int, start: Start) -> None:
    """Fork a supervisor for each message, until the other end of the channel closes or the parent is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    watched = select.poll()
    watched.register(channel, select.POLLIN)
    while True:
        if not watched.poll(_POLL_MS):
            if os.getppid() != parent:
                return
            continue
        message, numbers, _, _ = socket.recv_fds(channel, 4096, 8)
        if not message:
            return
        if os.fork() == 0:
            try:
                channel.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                start(plain.loads(message), numbers)
            except init.Begin:
                raise
            except BaseException:
                os._exit(1)
            os._exit(0)
        for number in numbers:
            os.close(number)


def _run(setting: init.Setting, proc: int, message: Mapping[str, Any], numbers: Sequence[int]) -> None:
    """Be the supervisor of one run. The descriptors: control, job, report, and the pipes of a dialogue."""
    control, job, report, *pipes = numbers
    limits = message["limits"]

    def enter() -> None:
        if setting.isolated:
            supervisor.enter_namespaces(proc)

    def start() -> None:
        os.close(proc)
        init.forget_modules()
        init.main(job, report, limits, pipes, setting)

    supervisor.supervise(socket.socket(fileno=control), limits["total_seconds"], enter, start)


class _Packages:
    """Finds named packages where they are installed, and nothing else of what is installed there."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.folders = {os.path.basename(path).partition(".")[0]: os.path.dirname(path) for path in paths}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self.folders[name]]) if name in self.folders else None


def _unusable(name: str, paths: Sequence[str], proc: int) -> str:
    """Why the package cannot be imported; empty once it is, with the shared libraries that the root will not show."""
    if not any(isinstance(finder, _Packages) for finder in sys.meta_path):
        sys.meta_path.append(_Packages(paths))
    # The threads of a numerical library would not survive a fork, and a run has few to spend.
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    try:
        importlib.import_module(name)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:500]
    finally:
        os.environ.clear()
    tasks = os.open("self/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    threads = len(os.listdir(tasks))
    os.close(tasks)
    return f"its import starts {threads - 1} threads, which no run would have" if threads > 1 else ""


def _preload() -> None:
    """Import what is used most, and load the shared libraries that the root will not show."""
    folders = [path for path in sys.path if os.path.basename(path) == "lib-dynload" and os.path.isdir(path)]
    found = sorted(entry.split(".")[0] for folder in folders for entry in os.listdir(folder))
    extensions = [name for name in found if not name.startswith(_SLOW_OR_SHOWN)]
    for name in (*PRELOADED.split(), *extensions):
        try:
            importlib.import_module(name)
        except Exception:
            continue  # not built here; a candidate that wants it gets the ImportError
    site.setquit()  # what Python's start without -S gives to programs
    site.sethelper()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
