"""The parent's side of the zygote: starting it, asking it for a run, and hearing what came of it."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from reward.isolation.child import plain
from reward.isolation.types import Limits, SandboxFailure
from reward.types import RewardError

START_SECONDS = 60.0
GRACE_SECONDS = 5.0
"""How long after its deadline a run may take to be gone."""
_FOLDER = str(Path(__file__).parent)
_BOOT = (
    "import sys; sys.path.append({folder!r}); from child import {module}; sys.path.pop(); {module}.main({arguments})"
)


class Refused(Exception):  # noqa: N818
    """The zygote cannot isolate; `step` is what failed, `why` the system's word on it."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")


def python_command(module: str, arguments: Sequence[str] | None = None) -> list[str]:
    """A Python that sees the standard library and `child` only, running `child.<module>.main`."""
    boot = _BOOT.format(folder=_FOLDER, module=module, arguments="" if arguments is None else repr(list(arguments)))
    return [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-X", "int_max_str_digits=0", "-c", boot]


@dataclass
class Handle:
    """One run on the parent's side: its report comes line by line, its end on the control socket."""

    control: socket.socket
    report: int
    lines: list[bytes] = field(default_factory=list)
    rest: bytearray = field(default_factory=bytearray)
    ended: Mapping[str, Any] | None = None
    reported: bool = False

    def read(self) -> None:
        """Take what the report pipe holds; sets `reported` at its end."""
        new = os.read(self.report, 1 << 20)
        self.reported = not new
        self.rest += new
        *lines, self.rest = self.rest.split(b"\n")
        self.lines += map(bytes, lines)

    def hear_end(self) -> None:
        """Take the supervisor's last word."""
        message = self.control.recv(65536)
        self.ended = plain.loads(message) if message else {"failed": "its supervisor ended without a word"}

    def kill(self) -> None:
        """Make the supervisor kill the run."""
        with suppress(OSError):
            self.control.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.control.close()
        os.close(self.report)


class Zygote:
    """The zygote's process. Raises Refused, SandboxFailure where it does not come up, RewardError for a package."""

    def __init__(self, isolated: bool, packages: Sequence[str] = ()) -> None:
        shown = plain.text({"names": list(packages), "paths": installed(tuple(packages))})
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mode = "isolated" if isolated else "unsafe"
        self._process = subprocess.Popen(
            python_command("zygote", [str(theirs.fileno()), mode, shown]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.seccomp = bool(self._greeting()["seccomp"])

    def _greeting(self) -> Mapping[str, Any]:
        self._channel.settimeout(START_SECONDS)
        try:
            message = self._channel.recv(65536)
        except TimeoutError:
            self.close()
            raise SandboxFailure(f"its zygote did not start within {START_SECONDS:.0f} s") from None
        self._channel.settimeout(None)
        if not message:
            _, said = self._process.communicate()
            lines = said.decode(errors="replace").strip().splitlines()
            self.close()
            raise SandboxFailure(f"its zygote did not start: {lines[-1] if lines else 'it said nothing'}")
        greeting: Mapping[str, Any] = plain.loads(message)
        if "missing" in greeting:
            self.close()
            raise Refused(greeting["missing"], greeting["why"])
        if "package" in greeting:
            self.close()
            raise RewardError(
                f"packages: {greeting['package']!r} cannot be used in the sandbox: {greeting['why'].rstrip('.')}. "
                "Name what it needs in packages too, or leave it out"
            )
        return greeting

    @property
    def pid(self) -> int:
        return self._process.pid

    def start_run(self, job: Mapping[str, Any], limits: Limits, pipes: Sequence[int] = ()) -> Handle:
        """Start a run of `job`, whose process gets the descriptors `pipes`. Raises OSError if the zygote is gone."""
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reading, writing = os.pipe()
        content = os.memfd_create("job", os.MFD_CLOEXEC)
        try:
            _write_all(content, plain.dumps(job))
            os.lseek(content, 0, os.SEEK_SET)
            message = plain.dumps({"limits": asdict(limits)})
            with self._lock:
                socket.send_fds(self._channel, [message], [theirs.fileno(), content, writing, *pipes])
        except OSError:
            control.close()
            os.close(reading)
            raise
        finally:
            theirs.close()
            os.close(writing)
            os.close(content)
        return Handle(control, reading)

    def close(self) -> None:
        """Let the zygote end, and wait for it."""
        self._channel.close()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def abandon(self) -> None:
        """In a forked child: drop the descriptors of what belongs to its parent."""
        self._channel.close()
        self._process.returncode = 0  # not ours to wait for
        if self._process.stderr is not None:
            self._process.stderr.close()


def gather(handles: Sequence[Handle], seconds: float, first: Handle | None = None) -> None:
    """Read all handles to their ends. When `first` is done the others get a moment, then they are killed.

    Whatever has not ended after `seconds` and a grace is killed too. Raises SandboxFailure where even that fails.
    """
    deadline = time.monotonic() + seconds + GRACE_SECONDS
    killed = False
    with selectors.DefaultSelector() as selector:
        for handle in handles:
            selector.register(handle.report, selectors.EVENT_READ, (handle, handle.read))
            selector.register(handle.control, selectors.EVENT_READ, (handle, handle.hear_end))
        while selector.get_map():
            _read_once(selector, max(0.0, deadline - time.monotonic()))
            if first is not None and first.ended is not None:
                first, deadline = None, min(deadline, time.monotonic() + 0.5)
            if selector.get_map() and time.monotonic() >= deadline:
                if killed:
                    raise SandboxFailure("a run did not end when it was killed")
                for handle in handles:
                    handle.kill()
                killed, deadline = True, time.monotonic() + GRACE_SECONDS


def _read_once(selector: selectors.BaseSelector, seconds: float) -> None:
    for key, _ in selector.select(seconds):
        handle, take = key.data
        take()
        if handle.reported or take == handle.hear_end:
            with suppress(KeyError):
                selector.unregister(key.fileobj)


def close_all(handles: Iterable[Handle]) -> None:
    for handle in handles:
        handle.close()


def _write_all(number: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]


@cache
def installed(names: Sequence[str]) -> list[str]:
    """The paths of everything that the distributions of some packages have installed; `names` are as an import says.

    Raises RewardError where one is not installed, or lies in a folder that it shares with other distributions.
    """
    if not names:
        return []
    owners = metadata.packages_distributions()
    return sorted({path for name in names for path in _paths(name, owners)})


def _paths(name: str, owners: Mapping[str, list[str]]) -> list[str]:
    theirs = set(owners.get(name, ()))
    if not theirs:
        raise RewardError(
            f"packages: no package {name!r} is installed in {sys.prefix}. Name packages as an import does "
            "(sklearn, not scikit-learn); the standard library needs no name"
        )
    if len(theirs) > 1:
        raise RewardError(
            f"packages: {name!r} is a folder that {', '.join(sorted(theirs))} share; none of them can be shown alone"
        )
    distribution = metadata.distribution(theirs.pop())
    tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    shared = sorted(top for top in tops if len(set(owners.get(top, ()))) > 1)
    if shared:
        raise RewardError(
            f"packages: {name!r} shares the folder {shared[0]} with other packages and cannot be shown alone"
        )
    paths = [os.path.abspath(str(distribution.locate_file(top))) for top in tops]
    return [path for path in paths if os.path.exists(path)]
