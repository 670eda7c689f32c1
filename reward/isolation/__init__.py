"""Running a model's code where it can do no harm; `pool` runs trusted work on a model's text in processes of the same kind.

    from reward.isolation import Limits, Program, namespace_executor

    executor = namespace_executor()
    execution = executor.run(Program("print(int(input()) * 2)", ("21",)), Limits(cpu_seconds=2))
    assert execution.cases[0].stdout == "42\\n"

Linux only, without root: each run has namespaces of its own (user, mount, process, network, IPC, UTS), an empty
network, a read-only root with the standard library and the packages that were named, one empty /tmp for each case,
an empty environment, no capability, no descriptor but its own, limits, and a seccomp filter. `child` has the
parts, `types` the interface for another executor. Where a machine forbids it nothing is run: `check()` says what is missing.

What it does not do: it limits the memory of each process, and not that of the machine, which takes control groups;
and it trusts the kernel.
"""

from reward.isolation.executors import Capability, LocalExecutor, check, namespace_executor, unsafe_executor
from reward.isolation.types import (
    Call,
    Calls,
    CaseReport,
    Dialogue,
    Execution,
    Executor,
    Job,
    Limits,
    Program,
    SandboxFailure,
    SandboxUnavailable,
)

__all__ = [
    "Call",
    "Calls",
    "Capability",
    "CaseReport",
    "Dialogue",
    "Execution",
    "Executor",
    "Job",
    "Limits",
    "LocalExecutor",
    "Program",
    "SandboxFailure",
    "SandboxUnavailable",
    "check",
    "namespace_executor",
    "unsafe_executor",
]
