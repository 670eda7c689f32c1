"""The parent's side of the zygote: starting it, asking it for a run, and hearing what came of it."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from reward.isolation.child import plain
from reward.isolation.types import Limits, SandboxFailure
from reward.types import RewardError

T = TypeVar("T")
START_SECONDS = 60.0
GRACE_SECONDS = 30.0
"""How long after its deadline a run may take to be gone. A supervisor that an overloaded machine lets wait would seem to be lost."""
_FOLDER = str(Path(__file__).parent)
_BOOT = (
    "import sys; sys.path.append({folder!r}); from child import {module}; sys.path.pop(); {module}.main({arguments})"
)


class Refused(RewardError):  # noqa: N818
    """The zygote cannot isolate: the step that failed, and the system's word on it."""


_ALONE = ("-I", "-S", "-B", "-X", "utf8", "-X", "int_max_str_digits=0")
"""The options of a Python that sees the standard library and `child` only."""
_WITH_PACKAGES = ("-P", "-s", "-B", "-W", "ignore")


def python_command(module: str, arguments: Sequence[str] | None = None, options: Sequence[str] = _ALONE) -> list[str]:
    """A Python that runs `child.<module>.main`."""
    boot = _BOOT.format(folder=_FOLDER, module=module, arguments="" if arguments is None else repr(list(arguments)))
    return [sys.executable, *options, "-c", boot]


def _job_environment() -> dict[str, str]:
    """All that a job learns of our environment: no keys, no tokens. Forking needs a single thread."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL") if name in os.environ}
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    ours = Path(_FOLDER).parent  # there, types.py would hide the module of the standard library
    path = os.pathsep.join(entry for entry in sys.path if entry and not Path(entry).resolve().is_relative_to(ours))
    return {**kept, **single, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}


@dataclass
class Handle:
    """One run on the parent's side: its report comes on a pipe, its end on the control socket."""

    control: socket.socket
    report: int
    said: bytearray = field(default_factory=bytearray)
    ended: Mapping[str, Any] | None = None

    def read(self) -> bool:
        """Take what the report pipe holds; False at its end."""
        new = os.read(self.report, 1 << 20)
        self.said += new
        return bool(new)

    def lines(self) -> list[bytes]:
        """The lines of the report that were written to their ends."""
        return bytes(self.said).split(b"\n")[:-1]

    def hear_end(self) -> bool:
        """Take the supervisor's last word. False: nothing more comes."""
        message = self.control.recv(65536)
        self.ended = plain.loads(message) if message else {"failed": "its supervisor ended without a word"}
        return False

    def kill(self) -> None:
        """Make the supervisor kill the run."""
        with suppress(OSError):
            self.control.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.control.close()
        os.close(self.report)


class Zygote:
    """The zygote's process. Raises Refused, SandboxFailure where it does not come up, RewardError for a package."""

    def __init__(
        self, mode: Literal["isolated", "unsafe", "job"], given: Any, *, start_seconds: float = START_SECONDS
    ) -> None:
        """`given` is {"names", "paths"} of the packages to show, or the path of the job."""
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments, is_job = [str(theirs.fileno()), mode, plain.text(given)], mode == "job"
        self._process = subprocess.Popen(
            python_command("zygote", arguments, _WITH_PACKAGES if is_job else _ALONE),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if is_job else subprocess.PIPE,
            env=_job_environment() if is_job else {},
            cwd="/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        try:
            self._wait_until_ready(start_seconds)
        except RewardError:
            self.close()
            raise

    def _wait_until_ready(self, seconds: float) -> None:
        self._channel.settimeout(seconds)
        try:
            message = self._channel.recv(65536)
        except TimeoutError:
            raise SandboxFailure(f"its zygote did not start within {seconds:.0f} s") from None
        self._channel.settimeout(None)
        if not message:
            _, said = self._process.communicate()
            lines = (said or b"").decode(errors="replace").strip().splitlines()
            raise SandboxFailure(f"its zygote did not start: {lines[-1] if lines else 'it said nothing'}")
        match plain.loads(message):
            case {"failed": why}:
                raise SandboxFailure(why)
            case {"missing": step, "why": why}:
                raise Refused(f"{step}: {why}")
            case {"package": name, "why": why}:
                raise RewardError(
                    f"packages: {name!r} cannot be used in the sandbox: {why.rstrip('.')}. "
                    "Name what it needs in packages too, or leave it out"
                )

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, message: Mapping[str, Any], descriptors: Sequence[int]) -> socket.socket:
        """Have a process forked that gets the message and the descriptors; its supervisor's end of a control socket.

        The supervisor kills the process when the socket is shut, and says how it ended. Raises OSError if the zygote is gone.
        """
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with self._lock:
                socket.send_fds(self._channel, [plain.dumps(message)], [theirs.fileno(), *descriptors])
        except OSError:
            control.close()
            raise
        finally:
            theirs.close()
        return control

    def start_runs(self, jobs: Sequence[tuple[Mapping[str, Any], Sequence[int]]], limits: Limits) -> list[Handle]:
        """Start a run of each job, whose process gets the descriptors beside it. Raises OSError if the zygote is gone."""
        handles: list[Handle] = []
        try:
            for job, pipes in jobs:
                handles.append(self._start_run(job, limits, pipes))
        except OSError:
            close_all(handles)
            raise
        return handles

    def _start_run(self, job: Mapping[str, Any], limits: Limits, pipes: Sequence[int]) -> Handle:
        reading, writing = os.pipe()
        content = os.memfd_create("job", os.MFD_CLOEXEC)
        try:
            plain.write_all(content, plain.dumps(job))
            os.lseek(content, 0, os.SEEK_SET)
            return Handle(self.start({"limits": asdict(limits)}, [content, writing, *pipes]), reading)
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
            os.close(content)

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


class Keeper:
    """Keeps a zygote running: started when it is first needed, again when it has died, and anew in a forked process."""

    def __init__(self, make: Callable[[], Zygote]) -> None:
        self._make = make
        self._zygote: Zygote | None = None
        self._owner, self._lock = os.getpid(), threading.Lock()

    def zygote(self) -> Zygote:
        """The running zygote. Raises what `make` does."""
        self._leave_to_parent()
        with self._lock:
            if self._zygote is None:
                self._zygote = self._make()
            return self._zygote

    def use(self, action: Callable[[Zygote], T]) -> T:
        """What the action makes of the zygote, or of a new one if that has died. Raises SandboxFailure, and as `zygote`."""
        for attempt in (1, 2):
            zygote = self.zygote()
            try:
                return action(zygote)
            except OSError as error:
                if attempt == 2:
                    raise SandboxFailure(f"its zygote takes no run: {error}") from error
                with self._lock:
                    if self._zygote is zygote:
                        zygote.close()
                        self._zygote = None
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the zygote. A later use starts another one."""
        self._leave_to_parent()
        with self._lock:
            if self._zygote is not None:
                self._zygote.close()
            self._zygote = None

    def _leave_to_parent(self) -> None:
        if self._owner != os.getpid():
            if self._zygote is not None:
                self._zygote.abandon()
            self._zygote, self._owner, self._lock = None, os.getpid(), threading.Lock()


def gather(handles: Sequence[Handle], seconds: float, first: Handle | None = None) -> None:
    """Read all handles to their ends. When `first` is done the others get a moment, then they are killed.

    Whatever has not ended after `seconds` and a grace is killed too. Raises SandboxFailure where even that fails.
    """
    deadline = time.monotonic() + seconds + GRACE_SECONDS
    killed = False
    with selectors.DefaultSelector() as selector:
        for handle in handles:
            selector.register(handle.report, selectors.EVENT_READ, handle.read)
            selector.register(handle.control, selectors.EVENT_READ, handle.hear_end)
        while selector.get_map():
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                if not key.data():
                    selector.unregister(key.fileobj)
            if first is not None and first.ended is not None:
                first, deadline = None, min(deadline, time.monotonic() + 0.5)
            if selector.get_map() and time.monotonic() >= deadline:
                if killed:
                    raise SandboxFailure("a run did not end when it was killed")
                for handle in handles:
                    handle.kill()
                killed, deadline = True, time.monotonic() + GRACE_SECONDS


def close_all(handles: Iterable[Handle]) -> None:
    for handle in handles:
        handle.close()


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
