"""The read-only root that every run sees: Python's standard library, four devices, and nothing else."""

from __future__ import annotations

import os
import sysconfig
from functools import cache
from pathlib import Path

from . import kernel

DEVICES = ("null", "zero", "random", "urandom")
NOBODY = 65534
_SHUT = kernel.MS_NOSUID | kernel.MS_NODEV
_RESTRICTIONS = _SHUT | kernel.MS_NOEXEC | kernel.MS_NOATIME | kernel.MS_NODIRATIME
# Libraries of the interpreter's own packages; the launcher shows none of them.
_HIDDEN = ("site-packages", "dist-packages")


def enter(proc: int) -> None:
    """Enter a mount namespace whose root is the read-only one.

    `proc` is a descriptor of /proc. Needs no right but that to user namespaces. With CAP_SYS_ADMIN the caller
    keeps its user, since it may be the only one that can read the Python installation; without, root becomes
    nobody. Raises OSError.
    """
    _own_mounts(proc)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    root = "/tmp" if os.path.isdir("/tmp") else "/mnt"
    libraries = system_folders()
    # Descriptors keep what the new tmpfs may cover within reach.
    sources = {path: os.open(path, os.O_PATH) for path in libraries}
    kernel.mount("tmpfs", root, "tmpfs", _SHUT, "mode=755,size=1m,nr_inodes=1024")
    for path, source in sources.items():
        _bind(f"/proc/self/fd/{source}", root + path)
        os.close(source)
        for name in _HIDDEN:
            if os.path.isdir(f"{root}{path}/{name}"):
                kernel.mount("tmpfs", f"{root}{path}/{name}", "tmpfs", _SHUT | kernel.MS_RDONLY, "size=4k,mode=555")
    _devices(root)
    Path(root + work_folder()).mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    kernel.pivot_root_here()
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _SHUT)


def _own_mounts(proc: int) -> None:
    try:
        kernel.unshare(kernel.CLONE_NEWNS, "mount")
    except PermissionError:
        if os.geteuid() == 0:
            give_up_root()
        kernel.enter_user_namespace(kernel.CLONE_NEWNS, proc, os.geteuid())


def give_up_root() -> None:
    """Become nobody. Raises OSError."""
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        raise OSError(error.errno, f"from root to user {NOBODY}: {error.strerror}") from None


@cache
def system_folders() -> list[str]:
    """Where the standard library lies, outermost folders only; asked first while the machine's root is in sight."""
    named = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.dirname(os.__file__)}
    folders = sorted({os.path.abspath(path) for path in named if os.path.isdir(path)})
    return [path for path in folders if not any(path.startswith(other + "/") for other in folders)]


def work_folder() -> str:
    """Where a case finds its empty folder: /tmp, unless Python itself lies below it."""
    libraries = system_folders()
    free = [path for path in ("/tmp", "/var/tmp") if not any(library.startswith(path + "/") for library in libraries)]
    return [*free, "/work"][0]


def _bind(source: str, target: str) -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    # A mount that comes from another user namespace keeps the restrictions it had there.
    kept = os.statvfs(target).f_flag & _RESTRICTIONS
    kernel.mount("none", target, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _SHUT | kept)


def _devices(root: str) -> None:
    os.mkdir(root + "/dev", 0o755)
    for name in DEVICES:
        target = f"{root}/dev/{name}"
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
        kernel.mount(f"/dev/{name}", target, None, kernel.MS_BIND)
