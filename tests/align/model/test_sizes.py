"""What is read from a configuration alone: against counting by formula, and against what is published."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.errors import UserError
from align.model.names import from_checkpoint, to_checkpoint
from align.model.policy import attention_sizes
from align.model.sizes import empty_model, model_sizes, read_config

LITE, V2, NANO = "deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2", "recipes/nano/policy"


def counted_by_formula(c: dict[str, Any]) -> int:
    """The parameters of a DeepSeek-V2 (report, sections 2.1 and 2.2), term by term."""
    hidden, heads, latent, rope = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    query = heads * (c["qk_nope_head_dim"] + rope)
    queries = hidden * query if c["q_lora_rank"] is None else c["q_lora_rank"] * (hidden + query + 1)
    keys = hidden * (latent + rope) + latent + latent * heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
    attention = queries + keys + heads * c["v_head_dim"] * hidden
    expert = 3 * hidden * c["moe_intermediate_size"]
    experts = (c["n_routed_experts"] + c["n_shared_experts"]) * expert + c["n_routed_experts"] * hidden
    dense = c["first_k_dense_replace"]
    layers = c["num_hidden_layers"] * (attention + 2 * hidden)
    blocks = dense * 3 * hidden * c["intermediate_size"] + (c["num_hidden_layers"] - dense) * experts
    return 2 * c["vocab_size"] * hidden + layers + blocks + hidden


@pytest.mark.parametrize("name", [LITE, V2, NANO])
def test_the_meta_device_and_the_formula_count_the_same(name: str) -> None:
    config = read_config(name)
    assert model_sizes(empty_model(config)).total == counted_by_formula(config)


def test_deepseek_v2_lite_is_what_was_published() -> None:
    sizes = model_sizes(empty_model(read_config(LITE)))
    assert sizes.total == 15_706_484_224  # its checkpoint
    assert round(sizes.active / 1e9, 1) == 2.5  # the report says 2.4 B; with the head, 2.45
    assert sizes.kv_a_token == 27 * 576


def test_deepseek_v2_is_what_was_published() -> None:
    sizes = model_sizes(empty_model(read_config(V2)))
    assert round(sizes.total / 1e9) == 236
    assert round(sizes.active / 1e9) == 21
    assert sizes.kv_a_token == 60 * 576


@pytest.mark.parametrize("name", [LITE, V2])
def test_the_softmax_scale_has_yarns_factor(name: str) -> None:
    for layer in empty_model(read_config(name)).model.layers:
        assert layer.self_attn.scaling == pytest.approx(0.1147214, abs=1e-7)


def test_every_name_of_deepseek_v2_lite_maps_to_its_checkpoint_and_back() -> None:
    state = {name: p.detach() for name, p in empty_model(read_config(LITE)).named_parameters()}
    split = dict(to_checkpoint(state.items()))
    assert len(split) == 5291  # tensors of the published checkpoint
    assert split["model.layers.26.mlp.experts.63.up_proj.weight"].shape == (1408, 2048)
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in split)
    back = from_checkpoint(split)
    assert {name: tensor.shape for name, tensor in back.items()} == {name: p.shape for name, p in state.items()}


@pytest.mark.slow
def test_vllm_has_a_parameter_for_every_checkpoint_name_of_deepseek_v2_lite() -> None:
    """By the table with which vLLM's own loader renames a checkpoint's experts."""
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe")
    model = empty_model(read_config(LITE))
    names = [name for name, _ in to_checkpoint((n, p.detach()) for n, p in model.named_parameters())]
    table = fused_moe.fused_moe_make_expert_params_mapping(
        model,
        ckpt_gate_proj_name="gate_proj",
        ckpt_down_proj_name="down_proj",
        ckpt_up_proj_name="up_proj",
        num_experts=64,
    )
    written = {f".{checkpoint}" for _, checkpoint, _, _ in table}
    experts = {"." + name.split(".mlp.")[1].removesuffix("weight") for name in names if ".mlp.experts." in name}
    assert experts == written


def test_another_architecture_counts_keys_and_values_of_all_heads() -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 100}
    sizes = model_sizes(empty_model(config))
    assert sizes.kv_a_token == 3 * 2 * 2 * 16
    real = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    assert sizes.total == sum(p.numel() for p in real.parameters())
    assert all(p.device == torch.device("cpu") for p in real.parameters())


def test_a_model_that_is_nowhere_is_refused_with_what_to_say_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"model\.path: runs/none/final .*deepseek-ai/DeepSeek-V2-Lite"):
        read_config("runs/none/final")


def test_a_model_that_reads_images_too_has_the_sizes_of_its_text() -> None:
    text = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "head_dim": 16,
    }
    text |= {"intermediate_size": 96, "vocab_size": 100, "model_type": "gemma3_text"}
    vision = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "image_size": 28,
        "patch_size": 14,
    }
    sizes = model_sizes(empty_model({"model_type": "gemma3", "text_config": text, "vision_config": vision}))
    assert (sizes.layers, sizes.hidden, sizes.kv_a_token) == (3, 64, 3 * 2 * 2 * 16)


GEMMA = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
GEMMA |= {"intermediate_size": 48, "moe_intermediate_size": 16, "vocab_size": 64, "num_experts": 8}


def test_layers_of_gemma_4_have_heads_of_several_widths_and_its_experts_another_key() -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "global_head_dim": 64}
    gemma = empty_model({"model_type": "gemma4_text", "enable_moe_block": True, "top_k_experts": 2, **kinds, **GEMMA})
    sizes = model_sizes(gemma)
    assert (sizes.kv_a_token, sizes.experts_a_token) == (2 * 2 * (16 + 64), 2 / 8)
    assert attention_sizes(gemma.config) == (2, 64, 64)


def test_one_number_of_experts_a_token_is_wanted_of_all_layers() -> None:
    hunyuan = empty_model({"model_type": "hunyuan_v1_moe", "moe_topk": [2, 4], "head_dim": 16, **GEMMA})
    with pytest.raises(UserError, match=r"how many of its 8 experts .*num_experts_per_tok.*, and it has \[2, 4\]"):
        model_sizes(hunyuan)


def test_a_configuration_that_contradicts_itself_is_refused() -> None:
    config = {"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4, "num_hidden_layers": 1}
    with pytest.raises(UserError, match=r"model\.path: "):
        empty_model(config)
