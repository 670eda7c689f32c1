"""A very small model of each architecture, for tests of what the learner does to their layers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from align.learner.experts import routers_of
from align.learner.objective import LogProbs
from align.learner.policy import PolicyRank, Weights, checkpoint_in_every_mode
from align.model.policy import load_tokenizer
from align.recipe import LearnerOptions, ModelOptions, OptimizerOptions

EXPERTS, CHOSEN, LAYERS, GROUPS, GROUPS_A_TOKEN = 8, 3, 2, 4, 2
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
BANK: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 16}
V2: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "topk_method": "group_limited_greedy",
    "n_group": GROUPS,
    "topk_group": GROUPS_A_TOKEN,
    "routed_scaling_factor": 16.0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "DeepSeek-V2": (DeepseekV2Config, V2),
    "Mixtral": (MixtralConfig, {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}),
    "Qwen2-MoE": (Qwen2MoeConfig, {**BANK, "shared_expert_intermediate_size": 16}),
    "Qwen3-MoE": (Qwen3MoeConfig, {**BANK, "head_dim": 16, "norm_topk_prob": True}),
    "OLMoE": (OlmoeConfig, {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN}),
    "Llama": (LlamaConfig, {}),
}
WITH_EXPERTS = [name for name in MODELS if name != "Llama"]


def small_config(name: str, **changed: Any) -> PretrainedConfig:
    """The configuration of an architecture, with some values of its own."""
    kind, own = MODELS[name]
    return kind(**{**SIZES, **own, **changed})


def small_policy(name: str) -> Any:
    """A policy of an architecture, whose routers do not weigh all experts alike."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(small_config(name), dtype=torch.float32, attn_implementation="eager")
    for router in routers_of(policy).values():
        torch.nn.init.normal_(router.weight, std=0.5)
    return policy


def save_llama(directory: Path, *, intermediate_size: int, **saving: Any) -> None:
    """Write a small Llama with random weights and the tokenizer of the nano policy; `saving` goes to `save_pretrained`."""
    tokenizer = load_tokenizer("recipes/nano/policy")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory, **saving)
    tokenizer.save_pretrained(directory)


def rank_of(policy: Any, **options: Any) -> Any:
    """A learner rank of a policy, without Ray and DeepSpeed."""
    rank = object.__new__(PolicyRank)
    rank._model = ModelOptions(path="made here")
    rank._options = LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=1e-3), **options)
    rank._engine, rank._device, rank._pad_id = Weights(LogProbs(policy)), torch.device("cpu"), 0
    rank._reference = rank._teacher = None
    if rank._options.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    rank._checkpointed = checkpoint_in_every_mode(policy)
    rank._watch(policy)
    return rank
