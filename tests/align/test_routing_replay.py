"""Routing replay in the GRPO loop, with the real engines: in bfloat16 sampler and learner come closer, in float32 nothing changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.model.policy import write_random_policy
from align.recipe import ModelOptions

NANO = Path(__file__).parents[2] / "recipes" / "nano" / "policy"
GROUPED = {
    "topk_method": "group_limited_greedy",
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
}
SMALL = [
    "init_from=null",
    "machine={}",
    "learner={ranks: 1, threads: 2, micro_batch_tokens: 2048, optimizer: {learning_rate: 5.0e-5, schedule: constant}}",
    # Answers of a policy with random weights differ in how many words they repeat.
    "rewards=[{name: repetition, params: {n: 1}}]",
    "sampling.max_new_tokens=32",
    "evaluation={limit: 8, samples: 0, max_new_tokens: 16, before: false}",
    "save_every=null",
]


@pytest.fixture
def steps(align: Callable[..., Any], read_lines: Callable[[Path], Any]) -> Callable[..., list[dict[str, Any]]]:
    """Runs the nano recipe of GRPO on a model; the metrics of its steps."""

    def run(model: Path | str, directory: Path, *overrides: str) -> list[dict[str, Any]]:
        recipe = [
            "grpo",
            "recipes/nano/grpo.yaml",
            f"run.dir={directory}",
            f"model.path={model}",
            "model.init=pretrained",
        ]
        align(*recipe, *SMALL, *overrides).ends(0)
        return [line for line in read_lines(directory / "metrics.jsonl") if "agreement/mean" in line]

    return run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_bfloat16_the_samplers_experts_bring_the_learner_ten_times_nearer(
    tmp_path: Path, steps: Callable[..., list[dict[str, Any]]]
) -> None:
    """DeepSeek-V2's own routing in small, random weights, four steps."""
    for file in NANO.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((NANO / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | GROUPED))
    write_random_policy(ModelOptions(path=str(tmp_path), init="random"), tmp_path / "drawn", seed=0)
    size = ["model.dtype=bfloat16", "grpo={steps: 4, prompts_per_step: 16, group_size: 8}", "rollout.workers=1"]
    runs = {
        replay: steps(
            tmp_path / "drawn", tmp_path / replay, *size, f"grpo.routing_replay={replay}", "rollout.record_experts=true"
        )
        for replay in ("off", "sampler")
    }
    assert [len(run) for run in runs.values()] == [4, 4]
    mean, largest, k3 = (
        {replay: max(step[f"agreement/{name}"] for step in run) for replay, run in runs.items()}
        for name in ("mean", "max", "k3")
    )
    changed = [step["routing/changed"] for run in runs.values() for step in run]
    layers = [v for run in runs.values() for step in run for n, v in step.items() if n.endswith("/changed")]
    print(
        f"{mean}, {largest}, {k3}, routes changed {min(changed):.2%} to {max(changed):.2%}, of a layer {max(layers):.2%}"
    )
    assert min(changed) > 0
    assert k3["off"] >= 10 * k3["sampler"]
    assert largest["off"] >= 5 * largest["sampler"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_float32_a_run_with_replay_ends_in_the_same_file_with_one_worker_or_two(
    tmp_path: Path, policy: ModelOptions, steps: Callable[..., list[dict[str, Any]]]
) -> None:
    size = ["grpo={steps: 2, prompts_per_step: 8, group_size: 4}", "rollout.batch_sequences=16"]
    ways = {
        "plain": ["rollout.workers=1"],
        "replay": ["rollout.workers=1", "grpo.routing_replay=sampler"],
        "two workers": ["rollout.workers=2", "grpo.routing_replay=sampler"],
    }
    for name, overrides in ways.items():
        for step in steps(policy.path, tmp_path / name, *size, *overrides):
            assert step["gradient_norm"] > 0
            assert step.get("routing/changed", 0) == 0
    files = {(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ways}
    assert len(files) == 1
    assert files != {(Path(policy.path) / "model.safetensors").read_bytes()}
