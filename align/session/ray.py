"""Ray for the time of a run: a cluster of this machine alone that is watched, or one that others have started."""

import ipaddress
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import torch

from align.errors import RayDiedError, UserError
from align.run.machine import (
    GIB,
    SPILLS_AT,
    check_cuda,
    gpu_records,
    memory_bytes,
    object_store_bytes,
    shared_memory_bytes,
    threads_available,
)
from align.run.watcher import watched
from align.session.signals import SIGNALS
from rollout.processes import HIDDEN, cluster_address, on_gpus, usable_gpus

HEAD = ("gcs_server", "raylet")
"""Ray's processes without which nothing goes on."""
LOOK_S = 1.0
PATIENCE_S = 10.0
LONGEST_ADDRESS = 107
LONGEST_SOCKET = "/ray/session_2026-11-30_12-00-00_000000_{}/sockets/plasma_store"
"""The bytes of a socket's path on Linux, and what Ray puts behind its directory, of a process."""
_log = logging.getLogger(__name__)
DEAD = "Ray itself died: its process {name} ended with status {status}; `align resume RUN` goes on from the last checkpoint"


@contextmanager
def local_ray(sent: int = 0, gpus: float = 0) -> Iterator[None]:
    """Ray for the time of a run: the cluster of RAY_ADDRESS where that is set, else one of this machine on loopback.

    So many bytes of weights are `sent` through its object store at a time, and the run takes so many `gpus` where there are any: a cluster
    that has fewer now may grow, and is waited for. Raises UserError for a cluster that may not be used, where torch cannot
    use the GPUs that it is built for, and where the machine has no room for the object store.
    """
    import ray

    if address := cluster_address():
        # In a cluster of others Ray itself ends the actors of a driver that is gone.
        with _joined(address, sent):
            if on_gpus() and (free := ray.available_resources().get("GPU", 0.0)) < gpus:
                _log.warning(
                    "the run takes %g GPUs, and of the %g of the cluster %g are free: it waits for the others until its time limits",
                    *(gpus, usable_gpus(), free),
                )
            yield
    else:
        check_gpus(has_gpu := torch.cuda.is_available(), [] if has_gpu else gpu_records())
        store, told = object_store_bytes(sent, shared_memory_bytes(), memory_bytes()[1])
        if told:
            _log.warning(told)
        with watched(), _started(store):
            yield


@contextmanager
def _joined(address: str, sent: int) -> Iterator[None]:
    import ray

    check_address(address, os.environ.get("RAY_AUTH_MODE"))
    try:
        with kept_signal_handlers():
            keep_environment()
            ray.init(log_to_driver=False, job_config=job_config())
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        told = ": ".join(" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None)
        raise UserError(f"RAY_ADDRESS={address}: the cluster cannot be joined: {told}") from error
    try:
        check_gpus(usable_gpus(), [])
        check_stores([node for node in ray.nodes() if node["Alive"]], sent)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _started(store: int) -> Iterator[None]:
    import ray
    from ray._private import ray_constants

    # Where Ray knows no clusters it listens on loopback alone; asked for 127.0.0.1 it would take the host's address.
    # The variable tells the processes it starts; this one has read it already.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    give_token(os.environ)
    keep_environment()
    with kept_signal_handlers():
        start_node(store)
    head = _Head()
    try:
        with head.watched():
            yield
    finally:
        ray.shutdown()
        head.over.set()


class _Head:
    """The processes of this machine's own Ray."""

    def __init__(self) -> None:
        from ray._private import worker

        started = worker._global_node.all_processes
        self._processes = {name: started[name][0].process for name in HEAD}
        self._died: str | None = None
        self.over = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise RayDiedError in the main thread when one of them ends: Ray's calls would wait for a minute, or for ever.

        Unless `over` is set soon after that, the main thread waits for what is gone, and the process ends with status 1.
        """
        before = signal.signal(signal.SIGUSR1, self._raise)
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        except Exception:
            # What fails for want of Ray is no news; and native code makes another error of one that is raised while it runs.
            if self._died is not None:
                raise RayDiedError(self._died) from None
            raise
        finally:
            if self._died is None:
                self.over.set()
                thread.join()
            signal.signal(signal.SIGUSR1, before)

    def _watch(self) -> None:
        while self._died is None:
            if self.over.wait(LOOK_S):
                return
            for name, process in self._processes.items():
                if process.poll() is not None:
                    self._died = DEAD.format(name=name, status=process.returncode)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        if not self.over.wait(PATIENCE_S):
            print(f"stopped: {self._died}", file=sys.stderr, flush=True)
            os._exit(1)

    def _raise(self, *_: object) -> None:
        if self._died is None:  # sent from outside
            signal.raise_signal(signal.SIGTERM)
        else:
            raise RayDiedError(self._died)


def check_gpus(usable: float, there: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where a run would go on without the GPUs that torch is built for: none of those that are there is usable."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN
    if not usable and (told := check_cuda(torch.version.cuda, there, hidden)):
        _log.warning(told)


def check_stores(nodes: Sequence[Mapping[str, Any]], sent: int) -> None:
    """Warn where learners may be on a node whose object store would write weights of `sent` bytes to the disk."""
    with_gpus = [node for node in nodes if node["Resources"].get("GPU")]
    need = 2 * sent / SPILLS_AT
    for node in with_gpus or nodes:
        if (store := node["Resources"].get("object_store_memory", 0.0)) < need:
            _log.warning(
                f"the object store of node {node['NodeManagerAddress']} has {store / GIB:.1f} GiB, and {sent / GIB:.1f} GiB of weights take one of "
                f"{need / GIB:.1f} GiB: what is more goes over the disk at each step. Start the node with `ray start "
                f"--object-store-memory={int(need) + 1}`, or take weights.transport=directory, or =broadcast where each process has a GPU of its own"
            )
            return


def check_address(address: str, auth_mode: str | None) -> None:
    """Raise UserError for a cluster that others can reach and that asks for no token: whoever reaches it runs what he likes. And for the address
    of a dashboard, which is where jobs are submitted."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is the dashboard of a cluster, where `ray job submit --address` hands in jobs, and not its head node: name that "
            "(HOST:6379), or unset it"
        )
    if address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS={address}: weights cannot be sent through Ray's client. Start the run on a node of the cluster and name its head (HOST:6379), or "
            "hand it in with `ray job submit`"
        )
    if address == "local" or (auth_mode or "").lower() == "token":
        return
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise UserError(
            f"RAY_ADDRESS={address} is a cluster on a network and RAY_AUTH_MODE is not 'token': anyone who reaches it could run "
            "code there. Start its nodes with RAY_AUTH_MODE=token and set the same here; docs/cluster.md has the commands"
        )


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts; a run has to hear of it.

    What is started in the block never hears SIGHUP: all processes of a terminal have it when that is closed, and the run still needs these to save.
    The run itself hears of it at the end of the block, whichever of its threads took the signal.
    """
    put_off: list[int] = []
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    if before[signal.SIGHUP] != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, _: put_off.append(number))
    try:
        yield
    finally:
        try:
            for number, handler in before.items():
                signal.signal(number, handler)
        finally:  # a Ctrl-C is raised from any of these calls
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if put_off:
        signal.raise_signal(signal.SIGHUP)


def keep_environment() -> None:
    """Let Ray's workers run in the environment of this process below `uv run` too, where Ray would make them another of the working directory."""
    from ray._private import ray_constants

    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def give_token(environment: MutableMapping[str, str]) -> None:
    """Let Ray ask for a token that only this process and those it starts know, unless there is one already: Ray would write it into the home
    directory, which need not be writable."""
    given = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(map(environment.get, given)) and not os.path.exists(os.path.expanduser("~/.ray/auth_token")):
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


class _Importable(list[str]):
    """Directories that Ray puts in front of where workers look for modules: those alone in which the run itself looks."""

    def extend(self, places: Iterable[str]) -> None:
        super().extend(place for place in places if place in map(os.path.abspath, sys.path))


def job_config() -> Any:
    """The run as a job of Ray whose workers find what the run imports: Ray would add the working directory, where a reward.py hides our package."""
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _Importable()
    return config


def short_places() -> dict[str, str]:
    """Where Ray keeps its sockets, and spills to, in place of a TMPDIR in which their paths would be longer than Linux takes; empty where they fit.

    Raises UserError for such a RAY_TMPDIR.
    """
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    place = os.environ.get(variable, "/tmp")
    if len(os.fsencode(place)) + len(LONGEST_SOCKET.format(os.getpid())) <= LONGEST_ADDRESS:
        return {}
    if variable == "RAY_TMPDIR":
        raise UserError(
            f"RAY_TMPDIR={place} is too long for the sockets of Ray below it: take a shorter one, such as /tmp"
        )
    _log.warning("TMPDIR=%s is too long for the sockets of Ray below it: they are in /tmp/ray", place)
    return {"_temp_dir": "/tmp/ray", "object_spilling_directory": place}


def start_node(store: int, attempts: int = 5) -> None:
    """Start Ray on this machine, with an object store of so many bytes. It gives itself 30 seconds, which are too few on a busy one: then it is tried again."""
    import ray

    for attempt in range(1, attempts + 1):
        try:
            ray.init(
                address="local",  # whatever cluster others have started here
                # Ray starts a worker for each at once: what the job may use, and not what the host has.
                num_cpus=threads_available(),
                num_gpus=torch.cuda.device_count(),
                object_store_memory=store,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                job_config=job_config(),
                **short_places(),
            )
            return
        except Exception as error:  # Ray raises nothing more specific
            ray.shutdown()
            if attempt == attempts or "timed out during startup" not in str(error):
                raise
