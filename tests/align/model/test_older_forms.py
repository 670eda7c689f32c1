"""A checkpoint that transformers 5 writes is the same model to transformers 4, and to PEFT on top of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from align.model.lora import add_adapter, save_adapter
from align.model.policy import load_policy, load_tokenizer, probe_logits, save_policy
from align.recipe import LoraOptions, ModelOptions

ROOT = Path(__file__).parents[3]
OLDER_PYTHON = ROOT / ".venv-transformers4/bin/python"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts_per_tok": 2}
LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MLA = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
MODELS: dict[str, Any] = {
    "llama": lambda **o: LlamaForCausalLM(
        LlamaConfig(
            rope_theta=5e5,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            **o,
        )
    ),
    "qwen3": lambda **o: Qwen3ForCausalLM(Qwen3Config(head_dim=16, rope_theta=1e6, rope_scaling=YARN, **o)),
    "gemma3": lambda **o: Gemma3ForCausalLM(Gemma3TextConfig(head_dim=16, sliding_window=8, **o)),
    "phi3": lambda **o: Phi3ForCausalLM(
        Phi3Config(rope_scaling=dict(LONG_ROPE), original_max_position_embeddings=128, pad_token_id=0, **o)
    ),
    "olmoe": lambda **o: OlmoeForCausalLM(OlmoeConfig(num_experts=4, **EXPERTS, **o)),
    "mixtral": lambda **o: MixtralForCausalLM(MixtralConfig(num_local_experts=4, rope_theta=1e6, **EXPERTS, **o)),
    "qwen3_moe": lambda **o: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(head_dim=16, num_experts=4, moe_intermediate_size=32, rope_theta=1e6, **EXPERTS, **o)
    ),
    # transformers 4 leaves YaRN's correction of the softmax scale out of DeepSeek-V2, so that this has none (mscale_all_dim).
    "deepseek_v2": lambda **o: DeepseekV2ForCausalLM(
        DeepseekV2Config(rope_theta=5e4, rope_scaling=YARN, **EXPERTS, **(o | MLA))
    ),
}


@pytest.fixture(params=MODELS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A checkpoint, with special tokens that were added, and the logits of the model that was written."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(ROOT / "recipes/nano/policy")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = MODELS[request.param](vocab_size=len(tokenizer), **SMALL)
    save_policy(model, tokenizer, tmp_path / "final")
    return tmp_path / "final", probe_logits(model)


def test_this_transformers_reads_the_same_model(written: tuple[Path, torch.Tensor]) -> None:
    directory, logits = written
    torch.testing.assert_close(probe_logits(load_policy(ModelOptions(path=str(directory)))), logits)
    assert load_tokenizer(directory)("<|im_start|>a", add_special_tokens=False)["input_ids"][0] == 912


def test_names_of_both_versions_are_written(written: tuple[Path, torch.Tensor]) -> None:
    directory, _ = written
    config = json.loads((directory / "config.json").read_text())
    rope = config["rope_parameters"]
    whole = rope.get("full_attention", rope)
    assert config["rope_theta"] == whole["rope_theta"]
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    if config["model_type"] == "phi3":  # of which older versions take three keys alone
        assert scaling == LONG_ROPE
        return
    assert scaling == {key: value for key, value in whole.items() if key != "rope_theta"}
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.slow
def test_transformers_4_and_peft_on_it_compute_the_same(written: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    if not OLDER_PYTHON.exists():
        pytest.fail(f"{OLDER_PYTHON} is missing: `make test-transformers4` installs it")
    directory, logits = written
    base = load_policy(ModelOptions(path=str(directory)))
    first = "qkv_proj" if base.config.model_type == "phi3" else "q_proj"
    adapted = add_adapter(base, LoraOptions(rank=2, targets=[first, "o_proj"]), "CAUSAL_LM", str(directory))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_adapter(
        adapted, tmp_path / "adapter", {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}
    )
    torch.save({"model": logits, "adapted": probe_logits(adapted)}, tmp_path / "expected.pt")
    command = [OLDER_PYTHON, Path(__file__).with_name("read_checkpoint.py"), directory, tmp_path / "adapter"]
    read = subprocess.run(
        [*map(str, command), str(tmp_path / "expected.pt")], capture_output=True, text=True, env={**os.environ}
    )
    assert read.returncode == 0, read.stderr[-3000:]
    assert read.stdout.startswith("transformers 4."), sys.version
