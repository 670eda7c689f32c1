"""Ray actors and their processes: typed calls, ending a process for certain, and what its threads are doing."""

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import psutil

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_S = 15.0
SLOW_READ = 100 * 10**6
"""Bytes a second of a network disk that many read from."""
UNSEEN_BYTES = 500 * 10**9
"""What a model on the hub may have: DeepSeek-V2 has 472 GB. It has to come from there first, and for how long nobody knows."""
WEIGHT_FILES = ("*.safetensors", "*.bin")
STACKS_SIGNAL = signal.SIGUSR2
HIDDEN = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs."""
_HAD_GPUS: set[tuple[str, str]] = set()
"""Addresses of clusters, and jobs in them, in which there have been GPUs."""


def openmp(threads: int) -> dict[str, str]:
    """The environment of a process that computes with `threads` threads.

    A thread that waits for the others spins for a fraction of a millisecond, then sleeps: one that sleeps at once is woken for every
    operation, and one that spins for longer takes the core from whoever has work.
    """
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


def start_limit_s(given: float | None, least: float, *models: str) -> float:
    """How many seconds a process that loads `models`, directories or hub names, may take to start: as given, or `least` and the time to read
    their files at SLOW_READ. A model that is on the hub counts as UNSEEN_BYTES.
    """
    if given is not None:
        return given
    sizes = [
        sum(file.stat().st_size for kind in WEIGHT_FILES for file in Path(model).glob(kind))
        if Path(model).is_dir()
        else UNSEEN_BYTES
        for model in models
    ]
    return least + sum(sizes) // SLOW_READ


def cluster_address() -> str | None:
    """The Ray cluster of others that RAY_ADDRESS names; None where a run starts a Ray of its own."""
    return os.environ.get("RAY_ADDRESS") or None


def usable_gpus() -> float:
    """GPUs of the Ray cluster, whoever has them now; 0 where this process hides its own on purpose, or torch is built for CPUs alone.

    The driver decides by it what its actors get, wherever they run: it may be on a node without GPUs itself.
    """
    import ray
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN or not torch.backends.cuda.is_built():
        return 0.0
    return float(ray.cluster_resources().get("GPU", 0.0))


def on_gpus() -> bool:
    """Whether the processes of the run are on GPUs: where its cluster has some, or had some before, of which it may lose all for a while."""
    if usable_gpus():
        _HAD_GPUS.add(_this_job())
        return True
    return bool(_HAD_GPUS) and _this_job() in _HAD_GPUS


def _this_job() -> tuple[str, str]:
    import ray

    context = ray.get_runtime_context()
    return context.gcs_address, context.get_job_id()


def free_gpus() -> float:
    """The GPUs that are free on the node of the Ray cluster that has most."""
    from ray._private.state import available_resources_per_node

    return max((node.get("GPU", 0.0) for node in available_resources_per_node().values()), default=0.0)


def samples_on_cpus() -> bool:
    """Whether the vLLM that is installed computes on CPUs: one that is built for GPUs does not, even where they are hidden."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:  # its build for CPUs is a package of another name
        return True


def visibility(gpus: float) -> dict[str, str]:
    """The environment of an actor with so many GPUs: of one with none Ray would leave all GPUs of its node to be seen."""
    return {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process of the cluster; `started` tells it from a later one of the same number.

    On STACKS_SIGNAL it writes its stacks to its file descriptor `stacks_fd`.
    """

    node: str
    pid: int
    started: float
    stacks_fd: int


def introduce_this_process() -> ProcessId:
    """Who this process, a Ray actor's, is. From now on it writes its stacks when asked to; call it once."""
    import ray

    file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
    process = psutil.Process()
    return ProcessId(ray.get_runtime_context().get_node_id(), process.pid, process.create_time(), os.dup(file.fileno()))


class Pending(Protocol[R]):
    """A Ray reference to a result of type R."""

    def future(self) -> Future[R]:
        """A future that is done when the result, or the call's error, is there."""


class Actor(Generic[T]):
    """A typed handle of a Ray actor of class T: `actor.call(T.method, argument)` calls the method in the actor's process.

    `options` go to Ray with each call, such as `concurrency_group` or `num_returns`.
    """

    def __init__(self, handle: Any, **options: Any):
        self.handle = handle
        self._options = options

    def options(self, **options: Any) -> "Actor[T]":
        """The same actor, called with these options."""
        return Actor(self.handle, **options)

    def call(self, method: Callable[Concatenate[T, P], R], *arguments: P.args, **named: P.kwargs) -> Pending[R]:
        """Start a method; returns a reference to its result, for `ray.get`."""
        remote = getattr(self.handle, method.__name__).options(**self._options)
        pending: Pending[R] = remote.remote(*arguments, **named)
        return pending

    def kill(self) -> None:
        """Tell Ray to end the process. One that is stopped or hung may take seconds."""
        import ray

        ray.kill(self.handle)


def in_placement_group(group: Any, bundle: int) -> dict[str, Any]:
    """Options that put a Ray actor into a bundle of a placement group; none where `group` is None."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    if group is None:
        return {}
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)}


def kill(process: ProcessId, grace_s: float = 0) -> None:
    """End the process and its children, stopped or hung as it may be. Returns when it is gone, or its node is.

    One that has been told to end already has `grace_s` to do so.
    """
    import ray

    with suppress(ray.exceptions.RayError):
        _on_its_node(_kill_here, process, grace_s)


def stacks(process: ProcessId) -> str:
    """What each thread of the process is doing, as text; where that cannot be had, why."""
    import ray

    try:
        return _on_its_node(_stacks_here, process)
    except ray.exceptions.RayError as error:
        return f"process {process.pid}: its node did not tell its stacks ({type(error).__name__})"


def _on_its_node(function: Callable[..., T], process: ProcessId, *arguments: Any) -> T:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if process.node == ray.get_runtime_context().get_node_id():
        return function(process, *arguments)
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)
    result: T = ray.get(task.remote(process, *arguments), timeout=PATIENCE_S)
    return result


def _find(process: ProcessId) -> psutil.Process | None:
    try:
        found = psutil.Process(process.pid)
        return found if found.create_time() == process.started else None
    except psutil.NoSuchProcess:
        return None


def _kill_here(process: ProcessId, grace_s: float) -> None:
    found = _find(process)
    if found is None:
        return
    with suppress(psutil.NoSuchProcess):
        _, family = psutil.wait_procs([*found.children(recursive=True), found], timeout=grace_s)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=PATIENCE_S)


def _stacks_here(process: ProcessId) -> str:
    found = _find(process)
    if found is None:
        return f"process {process.pid} is gone"
    head = f"process {process.pid} ({found.status()})\n"
    # Without pausing the process: one that is stopped would never be seen to pause.
    command = [str(Path(sys.executable).parent / "py-spy"), "dump", "--nonblocking", "--pid", str(process.pid)]
    try:
        seen = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return head + _stacks_by_signal(process)
    return head + (seen.stdout if seen.returncode == 0 else _stacks_by_signal(process))


def _stacks_by_signal(process: ProcessId) -> str:
    """For where py-spy is missing or not permitted to look into other processes."""
    file = Path(f"/proc/{process.pid}/fd/{process.stacks_fd}")
    try:
        before = file.stat().st_size
        os.kill(process.pid, STACKS_SIGNAL)
        end = time.monotonic() + 2
        while file.stat().st_size == before and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.1)
        return file.read_bytes()[before:].decode(errors="replace") or "it did not answer the signal for its stacks\n"
    except OSError as error:
        return f"its stacks could not be read ({error.strerror})\n"
