"""A pipeline stopped by Ctrl-C inside each of its stages, and started again every time, ends as one that nobody stopped."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL_LEARNER = "learner={ranks: 1, optimizer: {learning_rate: 1.0e-4}}"
SMALL_ROLLOUT = "rollout={workers: 1, max_length: 64, kv_cache_gb: 0.25, batch_sequences: 32}"
# The nano policy with hardly any training writes 77 characters in 24 tokens, now more, now fewer.
SHORT = "{name: soft_overlong, params: {max_length: 77, cache: 1, unit: characters}}"
SAMPLING = "sampling={max_new_tokens: 24}"
EVALUATION = "evaluation={limit: 16, samples: 2, max_new_tokens: 24}"
POLICY = [SMALL_LEARNER, SMALL_ROLLOUT, EVALUATION, "machine={}"]
STAGES: list[dict[str, Any]] = [
    {
        "name": "sft",
        "recipe": "recipes/nano/sft.yaml",
        "set": [*POLICY, "sft={steps: 30, sequences_per_step: 16, validation_limit: 16, validate_every: 15}"],
    },
    {
        "name": "pairs",
        "recipe": "recipes/nano/preferences.yaml",
        "set": [
            "model.path=${sft}",
            "data={card: nano_math}",
            f"rewards=[{SHORT}]",
            SMALL_ROLLOUT,
            SAMPLING,
            "preferences={prompts: 64, held_out_prompts: 24, samples: 4}",
            "machine={}",
        ],
    },
    {
        "name": "reward",
        "recipe": "recipes/nano/reward_model.yaml",
        "set": [
            "model.path=${sft}",
            "data={card: own_preferences, path: '${pairs}/arithmetic'}",
            SMALL_LEARNER,
            "reward_model={steps: 30, pairs_per_step: 16}",
            "machine={}",
        ],
    },
    {
        "name": "policy",
        "recipe": "recipes/nano/grpo.yaml",
        "set": [
            "model={path: '${sft}'}",
            "init_from=null",
            f"rewards=[{SHORT}, {{name: reward_model, params: {{path: '${{reward}}'}}}}]",
            *POLICY,
            SAMPLING,
            "grpo={steps: 6, prompts_per_step: 8, group_size: 4, kl_coefficient: 0.04}",
        ],
    },
]
# A metric that a stage's first steps write, and not its evaluation before them.
BEGUN = {"sft": '"loss"', "pairs": '"pairs"', "reward": '"loss"', "policy": '"agreement/mean"'}


def state(directory: Path) -> str:
    return str(json.loads((directory / "status.json").read_text())["state"])


def within(directory: Path, name: str) -> Callable[[], bool]:
    """Whether the stage has made its first step."""
    metrics = directory / name / "metrics.jsonl"
    return lambda: metrics.exists() and BEGUN[name] in metrics.read_text() and state(directory / name) == "running"


def products(directory: Path) -> dict[str, bytes]:
    """Weights and preferences of every stage, to the byte."""
    files = [*directory.glob("*/final/*.safetensors"), *directory.glob("*/final/*/*.jsonl")]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def evaluations(directory: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for stage in STAGES
        for file in directory.glob(f"{stage['name']}/evaluations.jsonl")
        for line in file.read_text().splitlines()
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stopped_in_every_stage_it_ends_with_the_same_weights_and_numbers(tmp_path: Path, align: Any) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for run in (whole, stopped):
        (tmp_path / f"{run.name}.yaml").write_text(
            json.dumps({"name": "stopped", "run": {"dir": str(run)}, "stages": STAGES})
        )
    align("pipeline", str(tmp_path / "whole.yaml")).ends(0, 1200)
    for name in BEGUN:
        command = align("pipeline", str(tmp_path / "stopped.yaml"))
        command.until(within(stopped, name), 600)
        command.process.send_signal(signal.SIGINT)
        command.ends(130, 120)
        assert state(stopped / name) == state(stopped) == "interrupted"
    align("pipeline", str(tmp_path / "stopped.yaml")).ends(0, 1200)
    assert state(whole) == state(stopped) == "finished"
    made = products(whole)
    assert {name.partition("/")[0] for name in made} == set(BEGUN)
    assert {name for name, content in products(stopped).items() if content != made[name]} == set()
    assert products(stopped).keys() == made.keys()
    assert len(evaluations(whole)) >= 5
    assert evaluations(stopped) == evaluations(whole)
