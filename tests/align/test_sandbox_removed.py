"""The sandbox is taken away under a running GRPO: nothing is scored as wrong for it, and the run stops or goes on as told."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

# With `fenced: false` even what an untrained policy writes is run as a program.
RECIPE = ["grpo", "recipes/nano/grpo_reasoning.yaml", "init_from=null", "data=[{card: nano_code}]"]
RECIPE += ["rewards=[{name: code_tests, params: {fenced: false}}]", "grpo.steps=2", "grpo.prompts_per_step=4"]
RECIPE += ["grpo.group_size=4", "sampling.max_new_tokens=16", "evaluation={limit: 4, samples: 0}"]


def run_without_sandbox(command: Any, taken_away: Callable[[], bool]) -> None:
    """Wait for the command's end; its sandbox is killed again and again for as long as `taken_away` says."""
    started = time.monotonic()
    while command.process.poll() is None and time.monotonic() - started < 300:
        if taken_away():
            for zygote in zygotes(command.process.pid):
                zygote.kill()
        time.sleep(0.02)


def zygotes(root: int) -> list[psutil.Process]:
    """The processes below `root` that start sandboxed runs."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if any("import zygote" in argument and "'isolated'" in argument for argument in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def begun(directory: Path) -> bool:
    """Whether the evaluation before the first step is over."""
    return (directory / "evaluations.jsonl").exists()


@pytest.mark.slow
def test_samples_that_nobody_could_run_are_masked_and_the_sandbox_may_come_back(tmp_path: Path, align: Any) -> None:
    run = tmp_path / "run"
    first, second = (run / "samples" / f"step_{step:05d}.parquet" for step in (1, 2))
    command = align(*RECIPE, f"run.dir={run}", "scoring.infra_error_limit=1.0")
    run_without_sandbox(command, lambda: begun(run) and not first.exists())
    command.ends(0, 60)
    masked = [row for row in pq.read_table(first).to_pylist() if row["verdict"] == "infra_error"]
    assert len(masked) >= 8
    assert all(row["reward"] is None and not row["trained_on"] for row in masked)
    assert all(row["reward"] is not None for row in pq.read_table(second).to_pylist())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [step["not_judged"] for step in steps if "not_judged" in step]
    assert shares == [len(masked) / 16, 0.0]


@pytest.mark.slow
def test_above_the_limit_the_run_stops_and_says_why(tmp_path: Path, align: Any) -> None:
    run = tmp_path / "run"
    command = align(*RECIPE, f"run.dir={run}")
    run_without_sandbox(command, lambda: begun(run))
    output = command.ends(1, 60)
    assert (
        "of the samples could not be judged, the limit is 5.0% (infra_error_limit). The first: reward 'code_tests' on sample"
        in output
    )
    assert "Traceback" not in output
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert not list((run / "samples").glob("*.parquet"))
