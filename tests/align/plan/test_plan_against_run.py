"""The plan's memory against a run of the nano recipe."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_nano_recipe_takes_the_memory_that_was_foreseen() -> None:
    command = [sys.executable, "benchmarks/plan_memory.py", "grpo.steps=3", "evaluation.limit=64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    off = [int(percent) for percent in re.findall(r"\(([+-]\d+)%\)", done.stdout)]
    assert len(off) == 2
    assert all(abs(percent) <= 20 for percent in off)
