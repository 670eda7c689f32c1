"""The executors that run candidates on this machine: isolated by namespaces, and, if the user insists, not."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
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
from reward.isolation.zygote import Handle, Keeper, Refused, Zygote, close_all, gather, installed


class LocalExecutor:
    """Runs candidates below a zygote of its own, which starts with the first run."""

    def __init__(self, name: str, isolated: bool, packages: Sequence[str] = ()) -> None:
        self.name, self.isolated, self.packages = name, isolated, tuple(packages)
        self._keeper = Keeper(self._make_zygote)

    def run(self, job: Job, limits: Limits, *, stop: bool = False) -> Execution:
        """See `Executor.run`."""
        if isinstance(job, Dialogue):
            return self._dialogue(job, limits)
        nonce = secrets.token_hex(16)
        message = {"nonce": nonce, "stop": stop, "source": job.source, **_cases(job)}
        started = time.monotonic()
        [handle] = self._start([(message, ())], limits)
        try:
            gather([handle], limits.total_seconds)
            reports = _reports(handle, nonce)
        finally:
            handle.close()
        complete = len(reports) == len(message["cases"])
        stopped = stop and bool(reports) and reports[-1].ended != "exit"
        timed_out = not complete and not stopped
        if timed_out and time.monotonic() - started < limits.total_seconds:
            raise SandboxFailure(f"{len(reports)} of {len(message['cases'])} cases reported: {handle.ended}")
        return Execution(tuple(reports), timed_out=timed_out)

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
            raise SandboxUnavailable(_named(refusal)) from None

    def _start(self, parts: Sequence[tuple[Mapping[str, Any], Sequence[int]]], limits: Limits) -> list[Handle]:
        """Start a run for each (message, pipes)."""

        def start_all(zygote: Zygote) -> list[Handle]:
            handles: list[Handle] = []
            try:
                for message, pipes in parts:
                    handles.append(zygote.start_run(message, limits, pipes))
            except OSError:
                close_all(handles)
                raise
            return handles

        return self._keeper.use(start_all)

    def _dialogue(self, job: Dialogue, limits: Limits) -> Execution:
        nonces = secrets.token_hex(16), secrets.token_hex(16)
        shared = {"entry_point": job.entry_point, "stop": False, "cases": [{}]}
        server = {**shared, "nonce": nonces[0], "role": "server", "source": job.source}
        tester = {**shared, "nonce": nonces[1], "role": "tester", "setup": job.setup, "tests": job.tests}
        calls_out, calls_in = os.pipe()
        replies_out, replies_in = os.pipe()
        try:
            parts = [(server, (calls_out, replies_in)), (tester, (replies_out, calls_in))]
            handles = self._start(parts, limits)
        finally:
            for number in (calls_out, calls_in, replies_out, replies_in):
                os.close(number)
        started = time.monotonic()
        try:
            gather(handles, limits.total_seconds, first=handles[1])
            served, tested = (_reports(handle, nonce) for handle, nonce in zip(handles, nonces, strict=True))
        finally:
            close_all(handles)
        if not tested and time.monotonic() - started < limits.total_seconds:
            raise SandboxFailure(f"the test code's sandbox did not report: {handles[1].ended}")
        return Execution(tuple(served), tester=tested[0] if tested else None, timed_out=not tested)


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
    for index, line in enumerate(handle.lines):
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


def _named(refusal: Refused) -> str:
    from reward.isolation.check import missing

    return missing() or str(refusal)


def namespace_executor(packages: Sequence[str] = ()) -> LocalExecutor:
    """The sandbox: see `reward.isolation`. Candidates can import the `packages` too, named as an import does."""
    return LocalExecutor("namespaces", isolated=True, packages=packages)


def unsafe_executor(packages: Sequence[str] = ()) -> LocalExecutor:
    """No isolation: limits of time, memory and output, and the seccomp filter where there is one, nothing else.

    A candidate reads every file and kills every process that this user can; `packages` are all that it can import
    besides the standard library, as long as it does not look for others itself.
    """
    return LocalExecutor("unsafe", isolated=False, packages=packages)
