"""What the README promises of `make grpo`, at full size."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
GB = 10**9


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sft_learns_some_of_it_and_grpo_nearly_all(seed: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "align.cli", "grpo", "recipes/nano/grpo.yaml", f"seed={seed}", f"run.dir={run}"]
    largest = watch_memory(command)
    accuracy = {}
    for line in (run / "evaluations.jsonl", run / "sft" / "evaluations.jsonl"):
        accuracy |= {record["name"]: record["accuracy"] for record in map(json.loads, line.read_text().splitlines())}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    disagreement = max(step["agreement/max"] for step in steps if "agreement/max" in step)
    print(f"seed {seed}: {accuracy}, disagreement at most {disagreement:.1e}, {largest / GB:.2f} GB")
    assert accuracy["before SFT"] < 0.05
    assert 0.25 <= accuracy["after SFT"] <= 0.75
    assert accuracy["after GRPO"] >= 0.92
    assert disagreement <= 1e-4
    assert largest < 8 * GB


def watch_memory(command: list[str]) -> float:
    """Run a command; returns the largest sum of its processes' proportional set sizes, in bytes."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, stdout=subprocess.DEVNULL)
    largest = 0.0
    while process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        largest = max(largest, sum(map(proportional_set_size, family)))
        time.sleep(2)
    assert process.returncode == 0
    return largest


def proportional_set_size(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0.0
