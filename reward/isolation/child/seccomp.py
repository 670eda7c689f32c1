"""The seccomp filter of a case: no new process, no program, no network socket, no mount, and nothing exotic.

A forbidden call fails with EPERM, which Python raises as PermissionError. So does changing the limits of another
process, which for want of a second user would be allowed to reach process 1. It is a list of what is forbidden: the
namespaces, the capabilities and the limits hold without it, and Python needs most of the calls that are left.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys

from . import kernel

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_DENY, _ABSENT = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000

# Calls with one number on every architecture.
_COMMON = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443, "memfd_secret": 447,
    "process_mrelease": 448,
}  # fmt: skip

_X86_64 = {
    "shmget": 29, "shmat": 30, "socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50,
    "fork": 57, "vfork": 58, "execve": 59, "semget": 64, "msgget": 68, "ptrace": 101, "syslog": 103, "mknod": 133,
    "personality": 135, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164,
    "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170,
    "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179,
    "lookup_dcookie": 212, "clock_settime": 227, "mq_open": 240, "kexec_load": 246, "add_key": 248,
    "request_key": 249, "keyctl": 250, "migrate_pages": 256, "mknodat": 259, "unshare": 272, "vmsplice": 278,
    "move_pages": 279, "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
    "kcmp": 312, "finit_module": 313, "seccomp": 317, "memfd_create": 319, "kexec_file_load": 320, "bpf": 321,
    "execveat": 322, "userfaultfd": 323,
}  # fmt: skip

_AARCH64 = {
    "lookup_dcookie": 18, "mknodat": 33, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60,
    "acct": 89, "personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106,
    "clock_settime": 112, "syslog": 116, "ptrace": 117, "reboot": 142, "sethostname": 161, "setdomainname": 162,
    "settimeofday": 170, "adjtimex": 171, "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194, "shmat": 196,
    "socket": 198, "bind": 200, "listen": 201, "accept": 202, "connect": 203, "add_key": 217, "request_key": 218,
    "keyctl": 219, "execve": 221, "swapon": 224, "swapoff": 225, "vmsplice": 75, "migrate_pages": 238,
    "move_pages": 239, "perf_event_open": 241, "fanotify_init": 262, "name_to_handle_at": 264,
    "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271,
    "kcmp": 272, "finit_module": 273, "seccomp": 277, "memfd_create": 279, "bpf": 280, "execveat": 281,
    "userfaultfd": 282, "kexec_file_load": 294,
}  # fmt: skip

# The architecture's number in the kernel's audit.h, its calls, and the numbers of clone, clone3 and prlimit64.
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64, 56, 435, 302),
    "aarch64": (0xC00000B7, _AARCH64, 220, 435, 261),
}


def unavailable() -> str:
    """Why this machine can have no filter; empty where it can."""
    if platform.machine() not in _MACHINES or sys.maxsize < 2**32:
        return f"no list of system calls for {platform.machine()}: there is one for {' and '.join(_MACHINES)}"
    actions = kernel.setting("kernel/seccomp/actions_avail")
    return "" if actions and "errno" in actions else "the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)"


def program() -> bytes:
    """The filter for this machine, as the kernel's `struct sock_filter[]`. Raises KeyError where there is none."""
    architecture, calls, clone, clone3, prlimit = _MACHINES[platform.machine()]
    denied = sorted({*_COMMON.values(), *calls.values()})
    # Each line jumps forward by the lines still to come, so the tail is written first.
    tail = [
        _line(_LOAD, _FIRST_ARGUMENT),
        _line(_JUMP_ANY_BIT, _CLONE_THREAD, 1, 0),
        _line(_RETURN, _DENY),
        _line(_RETURN, _ALLOW),
        _line(_RETURN, _ABSENT),
        _line(_LOAD, _FIRST_ARGUMENT),
        _line(_JUMP_EQUAL, 0, 1, 0),
        _line(_RETURN, _DENY),
        _line(_RETURN, _ALLOW),
    ]
    threads_only, deny, absent, itself_only = 0, 2, 4, 5
    checks = [(clone, threads_only), (clone3, absent), (prlimit, itself_only), *((number, deny) for number in denied)]
    body = []
    for position, (number, target) in enumerate(checks):
        # One more line, the unconditional permission, stands between the checks and the tail.
        body.append(_line(_JUMP_EQUAL, number, len(checks) - position - 1 + 1 + target, 0))
    head = [
        _line(_LOAD, _ARCHITECTURE),
        _line(_JUMP_EQUAL, architecture, 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
        _line(_JUMP_AT_LEAST, _X32, 0, 1),
        _line(_RETURN, _DENY),
    ]
    return b"".join([*head, *body, _line(_RETURN, _ALLOW), *tail])


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_char_p))


def install(lines: bytes) -> None:
    """Bind the calling thread and all its descendants to the filter, for ever. Needs no-new-privileges."""
    whole = _Program(len(lines) // 8, lines)
    kernel.prctl(kernel.PR_SET_SECCOMP, kernel.SECCOMP_MODE_FILTER, ctypes.addressof(whole))
