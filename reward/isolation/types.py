"""What an executor is asked (a job, limits), what it answers (an execution), and how it fails.

An executor runs a candidate's program where it can do no harm. It is given no expected output of a program or a
function, and judges nothing: it reports what the candidate's processes did, and the parent compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from reward.types import RewardError


@dataclass(frozen=True)
class Limits:
    """What a run may use. Every limit ends in a verdict of its own, none in an error of ours.

    `cpu_seconds` (whole seconds, rounded up) and `wall_seconds` are for one case, `total_seconds` of wall time for
    the run; time spent waiting for a core counts only towards the wall. `memory_mb` is the address space of a
    case, of which Python itself takes about 40; `disk_mb` the size of its /tmp, which is memory too;
    `output_kb` what it may print, and `result_kb` what it may return.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 20.0
    total_seconds: float = 120.0
    memory_mb: float = 512.0
    disk_mb: float = 32.0
    threads: int = 16
    output_kb: float = 1024.0
    result_kb: float = 1024.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < 1e9:
                raise RewardError(f"limit {field.name} must be a positive number, not {value!r}")


@dataclass(frozen=True)
class Program:
    """A program run once for each text of `stdin`, as `python candidate.py` would run it."""

    source: str
    stdin: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """The arguments of one call: plain data."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Calls:
    """A function called once, in a process of its own, for each of `calls`."""

    source: str
    entry_point: str
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Dialogue:
    """Test code that calls a function: each in an isolated process of its own, joined by pipes.

    `setup` is trusted code that the test code builds on, such as the helpers of a HumanEval prompt.
    """

    source: str
    entry_point: str
    tests: str
    setup: str = ""


Job = Program | Calls | Dialogue

Ended = Literal["exit", "wall", "output"]


@dataclass(frozen=True)
class CaseReport:
    """How one process ended: by itself or a signal ("exit"), at the wall limit, or for saying too much.

    `status` is the exit status, or the negative number of the signal. `result` is the one JSON object that the
    process sent with the run's nonce: the candidate may have forged it, so its content is data to compare and
    nothing else. It is None where the process sent none, or anything besides. A function's is {"value": tree} as in
    `child.plain`, or {"error": …} as `child.case` describes an exception; a tester's is {"cases", "calls",
    "unusable"} as in `child.tester`.
    """

    ended: Ended
    status: int
    cpu_seconds: float
    wall_seconds: float
    stdout: str
    stderr: str
    result: Mapping[str, Any] | None


@dataclass(frozen=True)
class Execution:
    """What came of a job.

    `cases` are the candidate's processes in order: fewer than asked for where time ran out or `stop` cut the run
    short; for a Dialogue one, or none where it had to be killed after the tests were over. `tester` is the process
    of a Dialogue's test code, None where it did not get to report in time. `timed_out` tells that the run used up
    `total_seconds`.
    """

    cases: tuple[CaseReport, ...]
    tester: CaseReport | None = None
    timed_out: bool = False


class Executor(Protocol):
    """Where candidates run. A container runtime or a remote service is another class with these members.

    Jobs and executions are plain data and can be pickled: the least that a container needs is to run
    `unsafe_executor()` in it, one container for each job, and one for each of the two sides of a Dialogue if the
    candidate is not to share a user with its tests. Safe to call from several threads. `name` is for the record of a run; `isolated` is False only where the user
    asked for no isolation.
    """

    name: str
    isolated: bool

    def run(self, job: Job, limits: Limits, *, stop: bool = False) -> Execution:
        """Run the job; with `stop`, no further case after one that was killed.

        Raises SandboxUnavailable where this machine cannot isolate, before anything of the candidate runs, and
        SandboxFailure where our own machinery failed.
        """

    def close(self) -> None:
        """Leave no process behind. A later `run` may start them again."""


class SandboxUnavailable(RewardError):  # noqa: N818
    """This machine cannot isolate a candidate, so none is run."""

    def __init__(self, missing: str) -> None:
        super().__init__(missing)
        self.missing = missing

    def __str__(self) -> str:
        return (
            f"refusing to run a model's code: this machine cannot isolate it. Missing: {self.missing}. "
            "`align sandbox check` says what it allows. Provide what is missing, plug in another executor, or "
            "accept that the code can do whatever this user can, with the parameter unsafe_no_isolation: true"
        )

    def __repr__(self) -> str:
        return f"SandboxUnavailable: {self}"  # a mixture shows this of what a reward raises


class SandboxFailure(RewardError):  # noqa: N818
    """The sandbox itself failed, which says nothing about the candidate."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the sandbox failed: {self.why}"
