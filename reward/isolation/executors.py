"""The executors that run candidates on this machine, isolated by namespaces or, if the user insists, not; what the machine allows."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from reward.isolation.child import plain
from reward.isolation.types import (
    Calls,
    CaseReport,
    Dialogue,
    Execution,
    Job,
    Limits,
    Program,
    SandboxFailure,
    SandboxUnavailable,
)
from reward.isolation.zygote import Handle, Keeper, Refused, Zygote, close_all, gather, installed, python_command
from reward.types import RewardError

Part = tuple[Mapping[str, Any], Sequence[int]]
"""The message of one run to its process 1, and the descriptors that go with it."""


class LocalExecutor:
    """Runs candidates below a zygote of its own, which starts with the first run."""

    def __init__(self, name: str, isolated: bool, packages: Sequence[str] = ()) -> None:
        self.name, self.isolated, self.packages = name, isolated, tuple(packages)
        self._keeper = Keeper(self._make_zygote)

    def run(self, job: Job, limits: Limits, *, stop: bool = False) -> Execution:
        """See `Executor.run`."""
        started = time.monotonic()
        if isinstance(job, Dialogue):
            (served, _), (tested, ended) = self._report(_sides(job), limits)
            execution = Execution(tuple(served), tester=tested[0] if tested else None, timed_out=not tested)
            why = f"the test code's sandbox did not report: {ended}"
        else:
            message = {"stop": stop, "source": job.source, **_cases(job)}
            [(reports, ended)] = self._report([(message, ())], limits)
            stopped = stop and bool(reports) and reports[-1].ended != "exit"
            count = len(message["cases"])
            execution = Execution(tuple(reports), timed_out=len(reports) < count and not stopped)
            why = f"{len(reports)} of {count} cases reported: {ended}"
        if execution.timed_out and time.monotonic() - started < limits.total_seconds:
            raise SandboxFailure(why)
        return execution

    def close(self) -> None:
        """See `Executor.close`."""
        self._keeper.close()

    def zygote(self) -> Zygote:
        """The running zygote. Raises SandboxUnavailable, SandboxFailure, or RewardError for a package."""
        return self._keeper.zygote()

    def _make_zygote(self) -> Zygote:
        try:
            shown = {"names": self.packages, "paths": installed(self.packages)}
            return Zygote("isolated" if self.isolated else "unsafe", shown)
        except Refused as refusal:
            raise SandboxUnavailable(missing() or str(refusal)) from None

    def _report(self, parts: Sequence[Part], limits: Limits) -> list[tuple[list[CaseReport], Any]]:
        """What the cases of each part reported, and its supervisor's last word. The parts' descriptors are closed.

        When the second of two parts is done, the first gets a moment.
        """
        nonces = [secrets.token_hex(16) for _ in parts]
        jobs = [({**message, "nonce": nonce}, pipes) for (message, pipes), nonce in zip(parts, nonces, strict=True)]
        try:
            handles = self._keeper.use(lambda zygote: zygote.start_runs(jobs, limits))
        finally:
            for number in chain.from_iterable(pipes for _, pipes in parts):
                os.close(number)
        try:
            gather(handles, limits.total_seconds, first=handles[1] if len(handles) > 1 else None)
            return [(_reports(handle, nonce), handle.ended) for handle, nonce in zip(handles, nonces, strict=True)]
        finally:
            close_all(handles)


def _sides(job: Dialogue) -> list[Part]:
    """The candidate and its tests, joined by two pipes."""
    shared = {"entry_point": job.entry_point, "stop": False, "cases": [{}]}
    server = {**shared, "role": "server", "source": job.source}
    tester = {**shared, "role": "tester", "setup": job.setup, "tests": job.tests}
    calls_out, calls_in = os.pipe()
    replies_out, replies_in = os.pipe()
    return [(server, (calls_out, replies_in)), (tester, (replies_out, calls_in))]


def _cases(job: Program | Calls) -> dict[str, Any]:
    if isinstance(job, Program):
        return {"role": "program", "cases": [{"stdin": text} for text in job.stdin]}
    cases = [{"args": plain.encode(list(call.args)), "kwargs": plain.encode(dict(call.kwargs))} for call in job.calls]
    return {"role": "function", "entry_point": job.entry_point, "cases": cases}


def _reports(handle: Handle, nonce: str) -> list[CaseReport]:
    """What process 1 reported. Raises SandboxFailure where it, and not the candidate, went wrong."""
    if handle.ended is not None and "failed" in handle.ended:
        raise SandboxFailure(str(handle.ended["failed"]))
    reports = []
    for index, line in enumerate(handle.lines()):
        message = plain.loads(line)
        if message.get("nonce") != nonce or message.get("case") != index:
            raise SandboxFailure("a report of another run")
        if message["failure"]:
            raise SandboxFailure(f"a case could not be started: {message['failure']}")
        names = ("ended", "status", "cpu_seconds", "wall_seconds", "stdout", "stderr")
        reports.append(CaseReport(**{name: message[name] for name in names}, result=_result(message["result"], nonce)))
    return reports


def _result(text: str, nonce: str) -> Mapping[str, Any] | None:
    try:
        content = plain.loads(text)
    except plain.Malformed:
        return None
    return content if isinstance(content, dict) and content.get("nonce") == nonce else None


def namespace_executor(packages: Sequence[str] = ()) -> LocalExecutor:
    """The sandbox: see `reward.isolation`. Candidates can import the `packages` too, named as an import does."""
    return LocalExecutor("namespaces", isolated=True, packages=packages)


def unsafe_executor(packages: Sequence[str] = ()) -> LocalExecutor:
    """No isolation: limits of time, memory and output, and the seccomp filter where there is one, nothing else.

    A candidate reads every file and kills every process that this user can; `packages` are all that it can import
    besides the standard library, as long as it does not look for others itself.
    """
    return LocalExecutor("unsafe", isolated=False, packages=packages)


@dataclass(frozen=True)
class Capability:
    """One piece: whether this machine has it, whether no run is possible without it, and what to do if not."""

    name: str
    ok: bool
    detail: str
    needed: bool = True


def check() -> list[Capability]:
    """Every piece that the sandbox uses, and a trial run with all of them together."""
    pieces = probe()
    if all(piece.ok for piece in pieces if piece.needed):
        pieces.append(_trial())
    return pieces


def missing() -> str:
    """The first piece without which no run is possible, with its cure; empty if there is none."""
    return next((f"{piece.name} ({piece.detail})" for piece in probe() if piece.needed and not piece.ok), "")


def probe() -> list[Capability]:
    """Every piece, tried by itself."""
    if sys.platform != "linux":
        return [Capability("Linux", False, f"namespaces are Linux's, and this is {sys.platform}")]
    command = python_command("probe")
    ended = subprocess.run(command, capture_output=True, env={}, cwd="/", timeout=60, check=False)
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return [Capability("probe", False, f"ended with status {ended.returncode}: {lines[-1]}")]
    return [Capability(name, ok, detail, needed) for name, ok, needed, detail in json.loads(ended.stdout)]


def _trial() -> Capability:
    executor = namespace_executor()
    try:
        executor.zygote()
        started = time.perf_counter()
        execution = executor.run(Program("print(input())", ("hello",)), Limits())
        seconds = time.perf_counter() - started
    except RewardError as error:
        return Capability("trial run", False, str(error))
    finally:
        executor.close()
    said = execution.cases[0].stdout
    return Capability("trial run", said == "hello\n", f"{seconds * 1000:.0f} ms, printed {said!r}")
