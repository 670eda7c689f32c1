"""What the sandbox needs of this machine, tried one by one, each in a process of its own that then ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import kernel, root, seccomp, supervisor

_NAMESPACES = {
    "user namespaces": 0,
    "mount namespace": kernel.CLONE_NEWNS,
    "pid namespace": kernel.CLONE_NEWPID,
    "net namespace": kernel.CLONE_NEWNET,
    "ipc namespace": kernel.CLONE_NEWIPC,
    "uts namespace": kernel.CLONE_NEWUTS,
}
Finding = tuple[str, bool, bool, str]
"""Name, whether it is there, whether no run is possible without it, detail."""


def main() -> None:
    """Print the findings as JSON."""
    sys.stdout.write(json.dumps(findings()))


def findings() -> list[Finding]:
    """Everything that was tried, in the order in which a run needs it."""
    proc, hint = os.open("/proc", os.O_PATH | os.O_DIRECTORY), _user_namespace_hint()
    tried = [_needed(name, partial(_enter, flag, proc), hint) for name, flag in _NAMESPACES.items()]
    folders = ", ".join(root.system_folders())
    tried.append(_needed("read-only root", lambda: root.enter(proc), f"it shows {folders}, which must be readable"))
    tried.append(_needed("whole run", lambda: _whole(proc), hint))
    tried.append(_needed("no-new-privileges", lambda: kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1), "needs Linux 3.5"))
    missing = seccomp.unavailable()
    detail = missing + "; runs go on without: processes are then limited, not forbidden" if missing else ""
    tried.append(("seccomp filter", not missing, False, detail))
    tried.append(_thread_limit())
    return tried


def _whole(proc: int) -> None:
    root.enter(proc)
    supervisor.enter_namespaces(proc)
    kernel.mount("tmpfs", root.work_folder(), "tmpfs", 0, "size=4k")
    kernel.drop_capabilities()


def _enter(flag: int, proc: int) -> None:
    root.give_up_root()
    kernel.enter_user_namespace(flag, proc, supervisor.CHILD_ID)


def _needed(name: str, action: Callable[[], None], hint: str) -> Finding:
    reason = supervisor.tried(action)
    return (name, not reason, True, f"{reason}; {hint}" if reason and hint else reason)


def _user_namespace_hint() -> str:
    if kernel.setting("user/max_user_namespaces") == "0":
        return "user.max_user_namespaces is 0: an administrator can raise it with sysctl"
    if kernel.setting("kernel/unprivileged_userns_clone") == "0":
        return "kernel.unprivileged_userns_clone is 0: an administrator can set it to 1 with sysctl"
    if kernel.setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "kernel.apparmor_restrict_unprivileged_userns is 1: an administrator can set it to 0 with sysctl, "
            "or give this Python an AppArmor profile with userns"
        )
    if "\nSeccomp:\t2" in Path("/proc/self/status").read_text():
        return (
            "a seccomp filter is on this process, as in a container: start the container with a profile that "
            "allows unshare and mount (docker run --security-opt seccomp=unconfined), or plug in an executor "
            "that uses the container's runtime"
        )
    return ""


def _thread_limit() -> Finding:
    detail = f"Linux {os.uname().release} counts all processes of the user, from 5.14 those of the run: not limited"
    per_run = kernel.counts_threads_per_run()
    return ("thread limit per run", per_run, False, "" if per_run else detail)
