"""Policies other than the nano one in fp32: another architecture with tied embeddings, and bfloat16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from align.config import ModelOptions
from align.model.policy import load_tokenizer

ROOT = Path(__file__).parents[2]
NANO = ROOT / "recipes" / "nano" / "policy"
SMALL = ["grpo.steps=3", "grpo.prompts_per_step=8", "grpo.group_size=4", "evaluation.limit=8", "evaluation.samples=0"]


def agreement_of_steps(model: Path, directory: Path, *overrides: str) -> list[float]:
    command = [sys.executable, "-m", "align.cli", "grpo", "recipes/nano/grpo.yaml", f"run.dir={directory}", *SMALL]
    command += ["init_from=null", f"model.path={model}", "learner.optimizer.learning_rate=1e-3", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["agreement/mean"] for line in lines if "agreement/mean" in line]


@pytest.mark.slow
def test_a_llama_with_tied_embeddings(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(NANO)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    assert max(agreement_of_steps(tmp_path / "llama", tmp_path / "run")) < 1e-5


@pytest.mark.slow
def test_bfloat16(tmp_path: Path, policy: ModelOptions) -> None:
    found = agreement_of_steps(Path(policy.path), tmp_path / "run", "model.init=pretrained", "model.dtype=bfloat16")
    assert 1e-5 < max(found) < 0.03
