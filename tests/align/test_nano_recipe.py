"""What the README promises of the nano recipes, at full size."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from align.run import read_samples

GB = 10**9


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sft_learns_some_of_it_and_grpo_nearly_all(seed: int, tmp_path: Path, align: Any) -> None:
    run = tmp_path / "run"
    largest = align(*grpo("recipes/nano/grpo.yaml", run, seed)).largest()
    accuracy = {name: record["accuracy"] for name, record in evaluations(run).items()}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    disagreement = max(step["agreement/max"] for step in steps if "agreement/max" in step)
    print(f"seed {seed}: {accuracy}, disagreement at most {disagreement:.1e}, {largest / GB:.2f} GB")
    assert accuracy["before SFT"] < 0.05
    assert 0.25 <= accuracy["after SFT"] <= 0.75
    assert accuracy["after GRPO"] >= 0.92
    assert disagreement <= 1e-4
    assert largest < 8 * GB


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reasoning_alignment_raises_arithmetic_and_code_together(seed: int, tmp_path: Path, align: Any) -> None:
    run = tmp_path / "run"
    align(*grpo("recipes/nano/grpo_reasoning.yaml", run, seed)).ends(0, 3600)
    after = evaluations(run)
    for domain in ("arithmetic", "code"):
        sft, rl = (after[f"after {stage}"][f"accuracy/{domain}"] for stage in ("SFT", "GRPO"))
        print(f"seed {seed}: {domain} {sft:.1%} after SFT, {rl:.1%} after GRPO")
        assert rl - sft >= 0.15


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_grpo_on_adapters_learns_nearly_all_and_leaves_the_base_alone(tmp_path: Path, align: Any) -> None:
    run = tmp_path / "run"
    align(*grpo("recipes/nano/grpo_lora.yaml", run, 0)).ends(0, 3600)
    accuracy = evaluations(run)["after GRPO"]["accuracy"]
    print(f"{accuracy:.1%} after GRPO on adapters")
    assert accuracy >= 0.9
    assert (run / "final" / "adapter" / "adapter_model.safetensors").stat().st_size < 10**6
    before, after = (load_file(run / part / "model.safetensors") for part in ("sft/final", "final"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = re.compile(r"(q_proj|kv_a_proj_with_mqa|o_proj|shared_experts\.\w+|layers\.0\.mlp\.\w+)\.weight$")
    assert changed == {name for name in before if adapted.search(name)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_student_closes_most_of_the_gap_to_its_teacher(tmp_path: Path, align: Any) -> None:
    align("pipeline", "recipes/nano/pipeline_distill.yaml", f"run.dir={tmp_path / 'run'}").ends(0, 3600)
    answers = {"sft": "after SFT", "teacher": "after GRPO", "student": "after GRPO"}
    right = [
        {
            row["id"]: row["verdict"] == "pass"
            for row in read_samples(tmp_path / "run" / stage / "evaluations" / f"{name}.parquet")
        }
        for stage, name in answers.items()
    ]
    start, teacher, student = (np.array([found[id_] for id_ in right[0]]) for found in right)
    drawn = np.random.default_rng(0).integers(0, len(start), (10_000, len(start)))
    closed = (student[drawn].mean(1) - start[drawn].mean(1)) / (teacher[drawn].mean(1) - start[drawn].mean(1))
    low, high = np.quantile(closed, [0.025, 0.975])
    shares = f"{start.mean():.1%} before, {student.mean():.1%} after, {teacher.mean():.1%} the teacher"
    print(f"of {len(start)} problems {shares}: {low:.0%} to {high:.0%} of the gap is closed")
    assert len(start) >= 950
    assert teacher.mean() - start.mean() >= 0.25
    assert low >= 0.5


def grpo(recipe: str, run: Path, seed: int) -> list[str]:
    return ["grpo", recipe, f"seed={seed}", f"run.dir={run}"]


def evaluations(run: Path) -> dict[str, Any]:
    """The evaluations of a run and of the SFT inside it, by name."""
    lines = [line for part in (run / "sft", run) for line in (part / "evaluations.jsonl").read_text().splitlines()]
    return {record["name"]: record for record in map(json.loads, lines)}
