"""DeepSeek-V2-Lite's own layers, a dense one and one with experts, under SFT and GRPO with the real engines.

Every shape is the published one: 1.1 billion parameters, with random weights and the nano policy's tokenizer. Adapters alone are
trained, so that it runs within 20 GB.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align.model.sizes import read_config

NANO = Path(__file__).parents[2] / "recipes" / "nano" / "policy"
BOTH = ["model.dtype=bfloat16", "learner.ranks=1", "learner.micro_batch_tokens=256", "machine.memory_gb=9"]
BOTH += ["learner.lora={rank: 8, alpha: 16, targets: attention+shared}", "learner.optimizer.learning_rate=1e-3"]
BOTH += ["rollout.workers=1", "rollout.threads=2", "learner.threads=2", "rollout.kv_cache_gb=0.25"]
BOTH += ["rollout.batch_sequences=8", "evaluation.limit=2", "evaluation.samples=0", "evaluation.max_new_tokens=8"]
GRPO = ["init_from=null", "grpo.steps=1", "grpo.prompts_per_step=2", "grpo.group_size=2", "sampling.max_new_tokens=8"]
LIMIT_GB = 20


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    """The first two layers of DeepSeek-V2-Lite as a model directory without weights."""
    directory = tmp_path / "two_layers"
    shutil.copytree(NANO, directory)
    config = read_config("deepseek-ai/DeepSeek-V2-Lite") | {
        "num_hidden_layers": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.slow
def test_sft_and_grpo_train_the_real_layers_and_the_engines_agree(
    two_layers: Path, tmp_path: Path, align: Any, read_lines: Any
) -> None:
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    start = [f"model.path={two_layers}", "model.init=random", "sft.steps=1", "sft.sequences_per_step=2"]
    trained = [f"model.path={sft / 'final'}", "model.init=pretrained", *GRPO]
    peak = max(
        align("sft", "recipes/nano/sft.yaml", f"run.dir={sft}", *BOTH, *start, "sft.validation_limit=2").largest(),
        align("grpo", "recipes/nano/grpo.yaml", f"run.dir={grpo}", *BOTH, *trained).largest(),
    )
    found = [line["agreement/mean"] for line in read_lines(grpo / "metrics.jsonl") if "agreement/mean" in line]
    print(f"mean |difference| {found}, peak {peak / 1e9:.1f} GB")
    assert len(found) >= 1
    assert max(found) < 0.03
    assert peak < LIMIT_GB * 1e9
