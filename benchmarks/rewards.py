"""How fast are the rewards that work in processes of their own? It takes less than a minute:

python benchmarks/rewards.py

Math: the honest pairs of the tests, judged as one batch again and again by warm workers. The first batch is told apart:
sympy remembers what it has computed, as with the many equal answers of a group, and new answers take longer. Code: the
honest programs of the tests, four at once for each core, and beside them a bare `python -I -S` that runs the same programs,
as many at once. What a run takes longer in the sandbox, isolation and report included, is the overhead; it is negative
where the fork of a Python that has started is ready before a new one. The clock is a fair judge on a quiet machine only:
how busy it was before is printed first.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple, TypeVar

import psutil

from reward import Sample, Verdict
from reward.code.answer import code_tests
from reward.isolation import SandboxUnavailable
from reward.math.answer import math_answer
from reward.math.text import compare, tidy

TESTS = Path(__file__).resolve().parent.parent / "tests" / "reward"
MADE_TO_FOOL = {"lookalike", "spray"}  # kinds of pairs
ANSWERS, MATH_SECONDS = 4000, 15.0  # whichever comes first ends the timing
STDIN = "3 1 2\n5 8\n"
CORES = len(os.sched_getaffinity(0))
RUNS_AT_ONCE = 4 * CORES
DISTURBED = 0.2  # share of the machine that others may use before the clock proves nothing
Given = TypeVar("Given")
Found = TypeVar("Found")


class Run(NamedTuple):
    """A program, what it printed in a bare Python, None where it needs more than that, and its wall seconds."""

    source: str
    printed: str | None
    seconds: float


def main() -> int:
    """Measure and print."""
    others = psutil.cpu_percent(interval=2) / 100
    warning = ": the clock proves nothing" if others > DISTURBED else ""
    print(f"{CORES} cores, of which others used {others:.0%} before{warning}", flush=True)
    print(f"math: {math()}", flush=True)
    print(f"code: {code()}", flush=True)
    return 0


def math() -> str:
    """Answers a second of the reward `math`. Raises SystemExit where one is not judged."""
    rows = [json.loads(line) for line in (TESTS / "math" / "pairs.jsonl").read_text().splitlines()]
    pairs = [(row["gold"], row["answer"]) for row in rows if row["kind"] not in MADE_TO_FOOL]
    algebra = sum(compare(tidy(gold), tidy(answer)) is None for gold, answer in pairs)
    batch = [Sample(answer, "", rf"\boxed{{{answer}}}", gold) for gold, answer in pairs]
    math_answer([Sample("starts the workers", "", r"\boxed{1+\sqrt{2}}", r"\sqrt{2}+1")])
    started = time.perf_counter()
    scores = math_answer(batch)
    first_rate = len(batch) / (time.perf_counter() - started)
    if missed := [score.detail for score in scores if score.verdict not in (Verdict.PASS, Verdict.WRONG)]:
        raise SystemExit(f"{len(missed)} honest answers were not judged. The first: {missed[0]}")
    judged, started = 0, time.perf_counter()
    while judged < ANSWERS and time.perf_counter() - started < MATH_SECONDS:
        judged += len(math_answer(batch))
    rate = judged / (time.perf_counter() - started)
    return (
        f"{rate:.0f} answers a second ({judged} in batches of {len(batch)}, {algebra / len(batch):.0%} take algebra), "
        f"{first_rate:.0f} in the first batch"
    )


def code() -> str:
    """Runs a second of the reward `code_tests`, and its overhead. Raises SystemExit where a program does not pass."""
    bare, _ = at_once(run_bare, honest_programs())
    runs = [run for run in bare if run.printed is not None]
    try:
        code_tests([])  # starts the zygote
    except SandboxUnavailable as error:
        return str(error)
    seconds, total = at_once(run_sandboxed, runs)
    overhead = quantiles((1000 * (mine - run.seconds) for mine, run in zip(seconds, runs, strict=True)), n=20)
    return (
        f"{len(runs) / total:.1f} runs a second ({len(runs)} programs, {RUNS_AT_ONCE} at once); the sandbox adds "
        f"{overhead[9]:.0f} ms to a bare Python at the 50th percentile, {overhead[18]:.0f} ms at the 95th"
    )


def honest_programs() -> list[str]:
    """The honest programs of the corpus."""
    sys.path.append(str(TESTS / "corpus"))
    from code_corpus import honest

    return [program.source for program in honest()]


def run_bare(source: str) -> Run:
    """One run as a process without `site`, which some programs need for `exit`."""
    command = [sys.executable, "-I", "-S", "-c", source]
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        ended = subprocess.run(command, input=STDIN, capture_output=True, text=True, cwd=directory)
        seconds = time.perf_counter() - started
    return Run(source, ended.stdout if ended.returncode == 0 else None, seconds)


def run_sandboxed(run: Run) -> float:
    """Wall seconds of the reward for the same program."""
    tests = {"kind": "stdio", "cases": [{"input": STDIN, "output": run.printed}]}
    started = time.perf_counter()
    [score] = code_tests([Sample("program", "", run.source, None, "code", metadata={"tests": tests})], fenced=False)
    seconds = time.perf_counter() - started
    if score.verdict is not Verdict.PASS:
        raise SystemExit(f"an honest program did not pass: {score.detail}\n{run.source}")
    return seconds


def at_once(run: Callable[[Given], Found], given: Iterable[Given]) -> tuple[list[Found], float]:
    """What came of the runs, in order, and how many seconds all of them took."""
    started = time.perf_counter()
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        found = list(pool.map(run, given))
    return found, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
