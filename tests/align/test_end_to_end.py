"""The nano recipes at their smallest size, with the real Ray, vLLM and DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
SMALL = ["grpo.steps=2", "grpo.prompts_per_step=8", "grpo.group_size=4", "evaluation.limit=16", "evaluation.samples=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "nano"
    command = [sys.executable, "-m", "align.cli", "grpo", "recipes/nano/grpo.yaml", f"run.dir={directory}", *SMALL]
    done = subprocess.run(
        [*command, "init_from=null"], cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return directory


def test_sampler_and_learner_agree_at_every_step(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "agreement/max" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["agreement/max"] <= 1e-4 for line in steps)


def test_each_sample_carries_the_version_of_the_weights_that_drew_it(run: Path) -> None:
    for step in (1, 2):
        samples = pq.read_table(run / "samples" / f"step_{step:05d}.parquet").to_pylist()
        assert len(samples) == 32
        assert {sample["weight_version"] for sample in samples} == {step - 1}
        assert all(len(sample["token_ids"]) == len(sample["sampler_log_probs"]) for sample in samples)


def test_the_final_policy_is_an_ordinary_checkpoint(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert model.config.model_type == "deepseek_v2"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
