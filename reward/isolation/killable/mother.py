"""The mother process: it imports the job once and forks the workers, warm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from reward.isolation.killable.types import Limits, WorkersUnavailable
from reward.isolation.killable.worker import Worker, readable

_INSIDE = Path(__file__).with_name("inside.py")
_OURS = _INSIDE.parents[:3]
"""Folders left out of the path of the workers: there, `types.py` would hide the module of the standard library."""
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
"""All that a worker learns of our environment: no keys, no tokens."""


class Mother:
    """Her process. Raises WorkersUnavailable where the job does not load."""

    def __init__(self, job: Path, limits: Limits) -> None:
        self._limits = limits
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        path = [entry for entry in sys.path if entry and Path(entry).resolve() not in _OURS]
        environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # forking needs a single thread
        flags = ["-P", "-s", "-B", "-W", "ignore"]
        self._process = subprocess.Popen(
            [sys.executable, *flags, str(_INSIDE), str(job), str(limits.memory_bytes), str(os.getpid())],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
        )
        theirs.close()
        said = self._hear(limits.start_s)
        if said != "ready":
            self.close()
            raise WorkersUnavailable(f"{job.name}: {said}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self) -> Worker:
        """A new worker. Raises WorkersUnavailable."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
            return Worker(int(self._hear(10.0)), ours, self._limits)
        except (OSError, ValueError) as error:
            ours.close()
            raise WorkersUnavailable(f"cannot fork a worker: {error}") from error
        finally:
            theirs.close()

    def reap(self, worker: Worker) -> int:
        """Kills the worker unless it has ended, and returns its exit code, negative for a signal."""
        worker.connection.close()
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        try:
            self._control.send(b"reap %d" % worker.pid)
            return int(self._hear(10.0))
        except (OSError, ValueError) as error:
            raise WorkersUnavailable(f"the mother of the workers is gone: {error}") from error

    def close(self) -> None:
        """Ends her, and the kernel ends the workers with her."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def _hear(self, seconds: float) -> str:
        if not readable([self._control.fileno()], seconds):
            return f"nothing heard for {seconds:g} s"
        return self._control.recv(4096).decode() or "it ended"
