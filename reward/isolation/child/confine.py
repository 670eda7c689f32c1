"""What a case's process gives up before it runs anything: descriptors, rights, resources, system calls."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence

from . import kernel, seccomp

SHARES_OF_INIT = 3
"""Processes of the run besides the case's threads: supervisor, init, and the case's main thread."""
STACK = 64 * 2**20


def keep_descriptors(wanted: Sequence[int]) -> None:
    """Make `wanted[n]` the descriptor n, and close every other one."""
    above = [fcntl.fcntl(number, fcntl.F_DUPFD, len(wanted)) for number in wanted]
    for number, copy in enumerate(above):
        os.dup2(copy, number, inheritable=True)
    os.closerange(len(wanted), _highest_descriptor())


def _highest_descriptor() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else soft


def give_up_everything(limits: Mapping[str, float], lines: bytes, isolated: bool) -> None:
    """Bind the calling process and all its descendants to the limits, without a way back. Raises OSError.

    `lines` is the seccomp filter, empty where the machine has none. Comes after `keep_descriptors`.
    """
    os.setsid()
    os.umask(0o077)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _limit_resources(limits)
    if isolated and kernel.counts_threads_per_run():
        processes = int(limits["threads"]) + SHARES_OF_INIT
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if lines:
        seccomp.install(lines)


def _limit_resources(limits: Mapping[str, float]) -> None:
    memory, disk = int(limits["memory_mb"] * 2**20), int(limits["disk_mb"] * 2**20)
    cpu = max(1, -int(-limits["cpu_seconds"] // 1))
    for name, soft, hard in (
        ("AS", memory, memory),
        ("FSIZE", disk, disk),
        ("CPU", cpu, cpu + 1),
        ("NOFILE", 64, 64),
        ("CORE", 0, 0),
        ("MEMLOCK", 0, 0),
        ("MSGQUEUE", 0, 0),
        ("STACK", STACK, None),  # a program may raise it as far as the user may: its memory bounds it
    ):
        limit(name, soft, hard)


def limit(name: str, soft: int, hard: int | None) -> None:
    """Bind the calling process to the limit `RLIMIT_<name>`, where this machine has it; without `hard` that stays."""
    which = getattr(resource, f"RLIMIT_{name}", None)
    if which is not None:
        _, ceiling = resource.getrlimit(which)
        most = sys.maxsize if ceiling == resource.RLIM_INFINITY else ceiling
        resource.setrlimit(which, (min(soft, most), ceiling if hard is None else min(hard, most)))
