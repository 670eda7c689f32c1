"""Process 1 of a run: one confined child and one empty /tmp for each case, and a report on how it ended.

It never runs a candidate's code, and the candidate has no way to it: it cannot be traced, it ignores the signals
of its own namespace, and the pipe to the parent is open in it alone. What it says is therefore true.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from . import confine, kernel, plain

_STDERR_KEPT = 4096
_READY = b"1"


@dataclass
class Stream:
    """The reading end of a pipe from a case; at most `cap` bytes of it are kept."""

    number: int
    cap: int
    data: bytearray = field(default_factory=bytearray)
    overflowed: bool = False

    def read(self) -> bool:
        """Take what is there; False at the end."""
        try:
            new = os.read(self.number, 65536)
        except BlockingIOError:
            return True
        room = self.cap - len(self.data)
        self.data += new[:room]
        self.overflowed |= len(new) > room
        return bool(new)


@dataclass(frozen=True)
class Setting:
    """What every run starts from. `lines` is the seccomp filter, empty where the machine has none."""

    isolated: bool
    lines: bytes
    work_folder: str


@dataclass
class Run:
    """What the cases of a run have in common."""

    job: Mapping[str, Any]
    limits: Mapping[str, float]
    pipes: Sequence[int]
    setting: Setting


def main(job: int, report: int, limits: Mapping[str, float], pipes: Sequence[int], setting: Setting) -> None:
    """Run every case of the job that descriptor `job` holds; write a line for each to descriptor `report`."""
    with open(job, "rb") as file:
        this = Run(plain.loads(file.read()), limits, pipes, setting)
    deadline = time.monotonic() + this.limits["total_seconds"]
    for index, inputs in enumerate(this.job["cases"]):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            break
        with fresh_folder(this) as folder:
            outcome = _one_case(this, inputs, folder.path, min(remaining, this.limits["wall_seconds"]))
        plain.write_all(report, plain.dumps({"case": index, "nonce": this.job["nonce"], **outcome}) + b"\n")
        if this.job["stop"] and outcome["ended"] != "exit":
            break


@dataclass
class Begin(BaseException):
    """Takes the child of a case out of all our frames, since a candidate can read the variables of its callers.

    Raised in the child; `zygote.main` catches it.
    """

    run: Run
    inputs: Mapping[str, Any]
    folder: str
    numbers: Sequence[int]


class fresh_folder:  # noqa: N801 (a context manager that reads like a function)
    """An empty folder for one case: its own tmpfs where the run is isolated."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = run.setting.work_folder if run.setting.isolated else tempfile.mkdtemp(prefix="candidate-")

    def __enter__(self) -> fresh_folder:
        if self.run.setting.isolated:
            options = f"size={int(self.run.limits['disk_mb'])}m,mode=700,nr_inodes=4096"
            flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
            kernel.mount("tmpfs", self.path, "tmpfs", flags, options)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is Begin:
            return  # the child, which is about to use it
        if self.run.setting.isolated:
            kernel.unmount(self.path)
        else:
            shutil.rmtree(self.path, ignore_errors=True)


def _one_case(run: Run, inputs: Mapping[str, Any], folder: str, wall_seconds: float) -> dict[str, Any]:
    stdin = _memory_file(str(inputs.get("stdin", "")).encode("utf-8", "surrogatepass"))
    pairs = [os.pipe() for _ in range(4)]
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        raise Begin(run, inputs, folder, [stdin, *(writing for _, writing in pairs)])
    for number in (stdin, *(writing for _, writing in pairs), *run.pipes):
        os.close(number)
    run.pipes = ()
    caps = (int(run.limits["output_kb"] * 1024), _STDERR_KEPT, int(run.limits["result_kb"] * 1024), 4096)
    streams = [Stream(reading, cap) for (reading, _), cap in zip(pairs, caps, strict=True)]
    ended = _watch(child, streams, started + wall_seconds)
    status, usage = _end(child, run.setting.isolated)
    wall = time.monotonic() - started
    _drain(streams)
    out, err, result, ready = streams
    if ended == "exit" and (out.overflowed or result.overflowed):
        ended = "output"
    return {
        "ended": ended,
        "failure": "" if bytes(ready.data) == _READY else _text(ready) or "the case's process died before it started",
        "status": status,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": wall,
        "stdout": _text(out),
        "stderr": _text(err),
        "result": _text(result),
    }


def confine_case(begin: Begin) -> None:
    """Leave the calling process, a case's, its descriptors and its folder, and take everything else. Exits on failure."""
    *standard, ready = begin.numbers
    wanted = [*standard, *begin.run.pipes, ready]
    ready = len(wanted) - 1
    try:
        confine.keep_descriptors(wanted)
        os.chdir(begin.folder)
        setting = begin.run.setting
        confine.give_up_everything(begin.run.limits, setting.lines, setting.isolated)
        os.write(ready, _READY)
        os.close(ready)
    except BaseException as error:
        with suppress(OSError):
            os.write(ready, f"{type(error).__name__}: {error}".encode()[:2000])
        os._exit(1)


def _watch(child: int, streams: Sequence[Stream], deadline: float) -> str:
    """Read until the child has ended ("exit"), is too late ("wall") or says too much ("output")."""
    ended = os.pidfd_open(child)
    by_number = {stream.number: stream for stream in streams}
    watched = select.poll()
    for number in (ended, *by_number):
        watched.register(number, select.POLLIN)
    try:
        while (remaining := deadline - time.monotonic()) > 0:
            ready = [number for number, _ in watched.poll(remaining * 1000)]
            for number in ready:
                if number != ended and not by_number[number].read():
                    watched.unregister(number)
            _, _, result, _ = streams
            if streams[0].overflowed or result.overflowed:
                return "output"
            if ended in ready:
                return "exit"
        return "wall"
    finally:
        os.close(ended)


def _end(child: int, isolated: bool) -> tuple[int, Any]:
    """Kill whatever the case has left, and wait for all of it; the child's exit status and resource usage."""
    os.kill(child, signal.SIGKILL)
    if isolated and os.getpid() == 1:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    with suppress(ChildProcessError):
        while isolated:
            os.waitpid(-1, 0)
    return os.waitstatus_to_exitcode(status), usage


def _drain(streams: Sequence[Stream]) -> None:
    """Read what is still in the pipes of a dead case, without waiting for more."""
    for stream in streams:
        os.set_blocking(stream.number, False)
        before = -1
        while before != len(stream.data) and not stream.overflowed:
            before = len(stream.data)
            if not stream.read():
                break
        os.close(stream.number)


def _memory_file(content: bytes) -> int:
    number = os.memfd_create("stdin")
    plain.write_all(number, content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _text(stream: Stream) -> str:
    return stream.data.decode("utf-8", "replace")


def forget_modules() -> None:
    """Leave no name of ours among the modules that a candidate could import."""
    for name in [name for name in sys.modules if name == "child" or name.startswith("child.")]:
        del sys.modules[name]
