"""The check of a machine with a GPU keeps up with the names of what it measures: its dry run on a CPU ends well."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rollout import FinishReason, Prompt, Trajectory

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def dry_run(out: Path, *arguments: str) -> list[str]:
    """The lines of the table at the end of `make gpu-check ARGS=--tiny`."""
    command = [sys.executable, "-m", "gpu_check", "--tiny", *arguments]
    variables = os.environ | {"OUT": str(out), "GPU_CHECK_WORK": str(out), "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.partition("seconds  result\n")[2].splitlines()


def test_the_log_probabilities_of_samples_are_computed_in_two_dtypes_and_compared(tmp_path: Path) -> None:
    sampled = Trajectory.of_one_turn(Prompt("p", [5, 6, 7]), 0, [8, 9], [-1.0, -2.0], FinishReason.LENGTH)
    (tmp_path / "samples.pickle").write_bytes(pickle.dumps([sampled] * 4))
    (row,) = dry_run(tmp_path, "--only", "c")
    assert "done" in row
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    found = {line["what"]: line for line in lines}
    assert found["transformers bfloat16 and float32"]["tokens"] == 8
    parts = [line for line in lines if line["what"] == "part"]
    assert [part["name"] for part in parts][-3:] == ["layer 1, router", "layer 1, experts", "last norm"]
    assert all(0 <= part["transformers bfloat16, transformers float32"] < 0.05 for part in parts)
    assert 0 < found["transformers bfloat16 and float32"]["mean"] < 0.1 < found["vLLM bfloat16 and float32"]["mean"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_sections_that_a_cpu_can_run_end_well(tmp_path: Path) -> None:
    rows = dry_run(tmp_path)
    assert sum("  done " in row for row in rows) == 11
    assert sum("needs a GPU: " in row for row in rows) == 2
