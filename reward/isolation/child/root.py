"""The read-only root that every run sees: Python's standard library, named packages, four devices, nothing else."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from . import kernel

DEVICES = ("null", "zero", "random", "urandom")
NOBODY = 65534
_SHUT = kernel.MS_NOSUID | kernel.MS_NODEV
_RESTRICTIONS = _SHUT | kernel.MS_NOEXEC | kernel.MS_NOATIME | kernel.MS_NODIRATIME
# Libraries of the interpreter's own packages; the zygote shows none of them.
_HIDDEN = ("site-packages", "dist-packages")


def enter(proc: int, packages: Sequence[str] = ()) -> None:
    """Enter a mount namespace whose root is the read-only one, with the files and folders `packages` in their places.

    `proc` is a descriptor of /proc. Needs no right but that to user namespaces. With CAP_SYS_ADMIN the caller
    keeps its user, since it may be the only one that can read the Python installation; without, root becomes
    nobody. Raises OSError.
    """
    _own_mounts(proc)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    root = "/tmp" if os.path.isdir("/tmp") else "/mnt"
    libraries = system_folders()
    # Descriptors keep what the new tmpfs may cover within reach.
    sources = {path: os.open(path, os.O_PATH) for path in (*libraries, *packages)}
    kernel.mount("tmpfs", root, "tmpfs", _SHUT, "mode=755,size=1m,nr_inodes=1024")
    hidden = []
    for path in libraries:
        _bind(sources[path], root + path)
        for folder in (f"{root}{path}/{name}" for name in _HIDDEN):
            if os.path.isdir(folder):
                kernel.mount("tmpfs", folder, "tmpfs", _SHUT, "size=64k,mode=555")
                hidden.append(folder)
    for path in packages:
        _bind(sources[path], root + path)
    for folder in hidden:
        kernel.mount("none", folder, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _SHUT)
    _devices(root)
    Path(root + work_folder(packages)).mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    kernel.pivot_root_here()
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _SHUT)


def _own_mounts(proc: int) -> None:
    try:
        kernel.unshare(kernel.CLONE_NEWNS, "mount")
    except PermissionError:
        give_up_root()
        kernel.enter_user_namespace(kernel.CLONE_NEWNS, proc, os.geteuid())


def give_up_root() -> None:
    """Become nobody, if this is root. Raises OSError."""
    if os.geteuid() != 0:
        return
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


def work_folder(packages: Sequence[str] = ()) -> str:
    """Where a case finds its empty folder: /tmp, unless Python itself or one of the packages lies below it."""
    libraries = [*system_folders(), *packages]
    free = [path for path in ("/tmp", "/var/tmp") if not any(library.startswith(path + "/") for library in libraries)]
    return [*free, "/work"][0]


def _bind(source: int, target: str) -> None:
    """Show what the descriptor `source`, which is closed, stands for at `target`, read-only."""
    path = f"/proc/self/fd/{source}"
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        Path(target).touch()
    kernel.mount(path, target, None, kernel.MS_BIND | kernel.MS_REC)
    os.close(source)
    # A mount that comes from another user namespace keeps the restrictions it had there.
    kept = os.statvfs(target).f_flag & _RESTRICTIONS
    kernel.mount("none", target, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _SHUT | kept)


def _devices(root: str) -> None:
    os.mkdir(root + "/dev", 0o755)
    for name in DEVICES:
        target = f"{root}/dev/{name}"
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
        kernel.mount(f"/dev/{name}", target, None, kernel.MS_BIND)
