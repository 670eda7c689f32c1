"""The system calls that Python's standard library lacks. Each raises OSError that names the call."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_NOATIME, MS_NODIRATIME = 0x400, 0x800
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_M_ARENA_MAX = -8

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")


def unshare(flags: int, what: str) -> None:
    """Enter new namespaces; `what` names them in the error."""
    _checked(_libc.unshare(flags), f"unshare({what})")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    fs = kind.encode() if kind else None
    data = options.encode() if options else None
    result = _libc.mount(source.encode(), target.encode(), fs, ctypes.c_ulong(flags), data)
    _checked(result, f"mount({kind or source} on {target})")


def unmount(target: str) -> None:
    """Detach the mount at `target`."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"umount({target})")


def pivot_root_here() -> None:
    """Make the current directory the root, and detach the old one."""
    _checked(_libc.pivot_root(b".", b"."), "pivot_root")
    unmount(".")
    os.chdir("/")


def prctl(option: int, argument: int = 0, other: int = 0) -> None:
    """`other` may be an address."""
    _checked(_libc.prctl(option, *(ctypes.c_ulong(a) for a in (argument, other, 0, 0))), f"prctl({option})")


def drop_capabilities() -> None:
    """Give up every capability: effective, permitted, inheritable, ambient and bounding."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the first number that this kernel does not know, or no right to drop any (without namespaces)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(header, nothing), "capset")


def enter_user_namespace(others: int, proc: int, its_id: int) -> None:
    """Enter a new user namespace, and the `others` with it; the caller's user and group get the id `its_id` there.

    `proc` is a descriptor of /proc, which need not be reachable otherwise. The kernel lets an unprivileged process
    map only its own ids, and only after it has given up setgroups.
    """
    user, group = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | others, "user" if not others else "user, mount, pid, net, ipc, uts")
    prctl(PR_SET_DUMPABLE, 1)  # else, after a change of user, the files below belong to root
    _write(proc, "self/setgroups", "deny")
    _write(proc, "self/uid_map", f"{its_id} {user} 1")
    _write(proc, "self/gid_map", f"{its_id} {group} 1")


def _write(proc: int, name: str, text: str) -> None:
    file = os.open(name, os.O_WRONLY, dir_fd=proc)
    try:
        os.write(file, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"write({name}): {error.strerror}") from None
    finally:
        os.close(file)


def counts_threads_per_run() -> bool:
    """Whether RLIMIT_NPROC counts the processes of the user namespace, and not all of the user's (Linux 5.14)."""
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    return (major, minor) >= (5, 14)


def one_malloc_arena() -> None:
    """Keep threads from reserving 64 MB of address space each, which RLIMIT_AS would count (glibc only)."""
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def setting(name: str) -> str | None:
    """The content of a file below /proc/sys, None where this kernel has none."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return None
