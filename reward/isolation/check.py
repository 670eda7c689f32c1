"""What this machine allows of the sandbox, piece by piece."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass

from reward.isolation.executors import namespace_executor
from reward.isolation.types import Limits, Program
from reward.isolation.zygote import python_command
from reward.types import RewardError


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
