"""DeepSeek-V2-Lite's own layers, a dense one and one with experts, under SFT and GRPO with the real engines.

Every shape is the published one: 1.1 billion parameters, with random weights and the nano policy's tokenizer. Adapters alone are
trained, so that it runs within 20 GB.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from align.model.sizes import read_config

ROOT = Path(__file__).parents[2]
NANO = ROOT / "recipes" / "nano" / "policy"
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


class Watch(threading.Thread):
    """The most memory that this process's children hold together, in bytes; shared pages are counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            total = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    total += child.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)
            time.sleep(1)


def align(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def agreement_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["agreement/mean"] for line in lines if "agreement/mean" in line]


@pytest.mark.slow
def test_sft_and_grpo_train_the_real_layers_and_the_engines_agree(two_layers: Path, tmp_path: Path) -> None:
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    watch = Watch()
    watch.start()
    start = [f"model.path={two_layers}", "model.init=random", "sft.steps=1", "sft.sequences_per_step=2"]
    align("sft", "recipes/nano/sft.yaml", f"run.dir={sft}", *BOTH, *start, "sft.validation_limit=2")
    trained = [f"model.path={sft / 'final'}", "model.init=pretrained", *GRPO]
    align("grpo", "recipes/nano/grpo.yaml", f"run.dir={grpo}", *BOTH, *trained)
    watch.ended.set()
    watch.join()
    found = agreement_of(grpo)
    print(f"mean |difference| {found}, peak {watch.peak / 1e9:.1f} GB")
    assert len(found) >= 1
    assert max(found) < 0.03
    assert watch.peak < LIMIT_GB * 1e9
