"""Policies of other architectures, and in bfloat16: SFT and GRPO with the real engines, which agree about them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from align.evaluate.doctor import CheckStatus, examine
from align.learner.loading import follow, layout
from align.model.lora import chosen_parts, left_out, parts_of
from align.model.names import from_checkpoint, layout_of, to_checkpoint
from align.model.policy import load_policy, load_tokenizer, persistent_buffers, write_random_policy
from align.model.sizes import model_sizes, sent_bytes
from align.plan.memory import adapted_parameters
from align.recipe import ModelOptions

NANO = Path(__file__).parents[2] / "recipes" / "nano" / "policy"
Agreements = Callable[..., list[float]]
SHORT = ["evaluation={limit: 8, samples: 0, max_new_tokens: 16}", "save_every=null"]
SFT = [*SHORT, "sft={steps: 2, sequences_per_step: 16, validation_limit: 8}"]
GRPO = [
    *SHORT,
    "init_from=null",
    "grpo={steps: 3, prompts_per_step: 8, group_size: 4}",
    "learner.optimizer.learning_rate=1e-3",
]
SIZES: dict[str, Any] = {
    "vocab_size": 912,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
BIASED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}
"""Routers with a bias, which a checkpoint has as a buffer."""
ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama, tied embeddings": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "Qwen2": lambda: Qwen2Config(**SIZES),
    "Qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "Qwen2-MoE": lambda: Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=128),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32),
    "OLMoE": lambda: OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2),
    "Gemma 2": lambda: Gemma2Config(
        **SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=64, attn_logit_softcapping=0.5
    ),
    "Gemma 3": lambda: Gemma3TextConfig(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=64),
    "Mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
    "GLM-4-MoE": lambda: Glm4MoeConfig(**SIZES, **BIASED, head_dim=32),
    # vLLM on a CPU takes the published sizes of the latent alone.
    "DeepSeek-V3": lambda: DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        **BIASED | {"n_group": 4, "topk_group": 2},
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        q_lora_rank=32,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
    ),
}
LIMITS = dict.fromkeys(ARCHITECTURES, 1e-4) | {"Llama, tied embeddings": 1e-5}
"""Nats a token, on average, in float32."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_its_parameters_have_the_names_that_transformers_saves(name: str) -> None:
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32)
    layout = layout_of(model.config.model_type)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = revert_weight_conversion(model, dict(own))
    found = dict(to_checkpoint(own.items(), layout))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    back = from_checkpoint(found, layout)
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)


ROUTED = ("mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LEFT_OUT = dict.fromkeys(ARCHITECTURES, ()) | {
    "Qwen2-MoE": (*ROUTED, "mlp.shared_expert_gate"),
    "Qwen3-MoE": ROUTED,
    "OLMoE": ROUTED,
    "Mixtral": ROUTED,
    "GLM-4-MoE": ROUTED,
    "DeepSeek-V2": ("self_attn.kv_b_proj", *ROUTED),
    "DeepSeek-V3": ("self_attn.kv_b_proj", *ROUTED),
    "Phi-MoE": ("mlp.router", *ROUTED[1:]),
}
MORE: dict[str, Callable[[], PretrainedConfig]] = {
    "DeepSeek-V2": lambda: DeepseekV2Config(
        **SIZES | {"num_key_value_heads": 4},
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=16,
        kv_lora_rank=16,
    ),
    "Phi-MoE": lambda: PhimoeConfig(**SIZES, num_local_experts=4),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_all_linear_means_the_layers_that_it_means_to_peft_without_routers_and_what_vllm_cannot_serve(
    name: str,
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config((ARCHITECTURES | MORE)[name]())
    by_peft = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model).target_modules
    chosen = {part.module for part in chosen_parts(model, ["all-linear"])}
    assert chosen == {layer for layer in by_peft if not layer.endswith(LEFT_OUT[name] or "?")}
    said = left_out(parts_of(model), ["all-linear"])
    assert [part.split(" (")[0] for part in said.split(", ")[1:]] == [*LEFT_OUT[name]]
    assert said.startswith("all-linear leaves out the head")
    # The plan counts the same layers by their shapes alone.
    assert adapted_parameters(model_sizes(model), ["all-linear"]).keys() == {f"{layer}.weight" for layer in chosen}


def write_model(config: PretrainedConfig, directory: Path) -> dict[str, torch.Tensor]:
    """A model with random weights and the nano policy's tokenizer; its weights."""
    tokenizer = load_tokenizer(NANO)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for _, bias in persistent_buffers(model):
        torch.nn.init.normal_(bias, std=0.05)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return dict(model.state_dict())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_doctor_finds_nothing_wrong_with_it(name: str, tmp_path: Path) -> None:
    write_model(ARCHITECTURES[name](), tmp_path)
    checks = examine(ModelOptions(path=str(tmp_path)), load_tokenizer(tmp_path))
    assert [check for check in checks if check.status is CheckStatus.FAILED] == []


def assert_same_without_content(model: ModelOptions) -> None:
    """A rank that reads no weights makes the same model: names, shapes, dtypes, buffers, and what is tied."""
    whole, empty = load_policy(model), load_policy(model, empty=True)
    assert type(whole) is type(empty)
    follow(empty, layout(whole))  # some buffers stay float32 where they are read
    assert layout(whole) == layout(empty)
    buffers, read = dict(empty.named_buffers()), dict(persistent_buffers(whole))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.named_buffers() if name not in read)
    assert whole.training is empty.training is False
    tied = [[m.get_input_embeddings().weight is m.get_output_embeddings().weight] for m in (whole, empty)]
    assert tied[0] == tied[1]
    assert whole.config.to_dict() == empty.config.to_dict()


@pytest.mark.parametrize("name", ARCHITECTURES | MORE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_that_reads_no_weights_makes_the_same_model(name: str, dtype: Any, tmp_path: Path) -> None:
    write_model((ARCHITECTURES | MORE)[name](), tmp_path)
    assert_same_without_content(ModelOptions(path=str(tmp_path), dtype=dtype))


OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.added = torch.nn.Linear(8, 8)
        torch.nn.init.ones_(self.added.weight)
"""


def test_so_too_of_a_model_that_brings_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_model(LlamaConfig(**SIZES), tmp_path)
    (tmp_path / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    model = ModelOptions(path=str(tmp_path), trust_remote_code=True)
    assert_same_without_content(model)
    own = sum(p.numel() for p in AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).parameters()) + 8 * 8 + 8
    assert sent_bytes(model, None) == 4 * own
    drawn = model.model_copy(update={"init": "random"})
    write_random_policy(drawn, tmp_path / "drawn", seed=0)
    assert sent_bytes(drawn.model_copy(update={"path": str(tmp_path / "drawn")}), None) == 4 * own


@pytest.mark.slow
@pytest.mark.architectures
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sft_and_grpo_run_on_it_and_transformers_loads_the_result(
    name: str, tmp_path: Path, agreements: Agreements
) -> None:
    before = write_model(ARCHITECTURES[name](), tmp_path / "model")
    found = agreements("sft", tmp_path / "model", tmp_path / "sft", *SFT)
    found += agreements("grpo", tmp_path / "sft" / "final", tmp_path / "grpo", *GRPO)
    print(f"{name}: agreement {max(found):.1e}")
    assert len(found) >= 3
    assert max(found) < LIMITS[name]
    trained, told = AutoModelForCausalLM.from_pretrained(tmp_path / "grpo" / "final", output_loading_info=True)
    assert not any(told.values()), told
    after = trained.state_dict()
    assert after.keys() == before.keys()
    stays = {n for n in before if torch.equal(before[n], after[n])}
    assert stays == dict(persistent_buffers(trained)).keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bfloat16(tmp_path: Path, policy: ModelOptions, agreements: Agreements) -> None:
    bfloat16 = ["model.dtype=bfloat16", *GRPO]
    found = agreements("grpo", policy.path, tmp_path / "run", *bfloat16)
    assert 1e-5 < max(found) < 0.03


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_that_a_checkpoint_calls_otherwise_may_have_an_adapter(tmp_path: Path, agreements: Agreements) -> None:
    write_model(ARCHITECTURES["Mixtral"](), tmp_path / "model")
    lora = ["learner.lora={rank: 4, targets: [all-linear, experts]}"]
    assert max(agreements("grpo", tmp_path / "model", tmp_path / "run", *GRPO, *lora)) < LIMITS["Mixtral"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adapter_may_travel_alone(tmp_path: Path, agreements: Agreements) -> None:
    write_model(ARCHITECTURES["Qwen3"](), tmp_path / "model")
    lora = ["learner.lora={rank: 4, targets: attention+shared}", "weights.transport=adapter"]
    found = agreements("grpo", tmp_path / "model", tmp_path / "run", *GRPO, *lora)
    assert max(found) < 1e-5
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    adapter = tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors"
    assert {line["weight_bytes"] for line in steps if "weight_bytes" in line} == {adapter.stat().st_size}
    assert list((tmp_path / "run" / "weights").iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rollout_worker_may_be_two_processes(tmp_path: Path, policy: ModelOptions, agreements: Agreements) -> None:
    found = agreements("grpo", policy.path, tmp_path, *GRPO, "rollout.workers=1", "rollout.tensor_parallel=2")
    assert max(found) < 1e-5
