"""What is random in training alone is off in GRPO, where the policy that is trained must be the one that sampled."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, PhiConfig, PretrainedConfig
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from align.learner.batch import TrainingSequence, collate, collate_after_prompts
from align.learner.objective import LogProbs, Objective
from align.recipe import GrpoOptions

from ..small_models import rank_of, small_config

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DROPPING: dict[str, Callable[[], PretrainedConfig]] = {
    "GPT-2": lambda: GPT2Config(**SIZES, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "OPT": lambda: OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5),
    "Phi": lambda: PhiConfig(**SIZES, intermediate_size=64, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
    "Mixtral, noise in the router": lambda: small_config("Mixtral", vocab_size=512, router_jitter_noise=0.5),
}
GRPO = Objective(GrpoOptions(steps=1, prompts_per_step=1, group_size=2))


def network_of(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", DROPPING)
def test_grpo_trains_on_the_log_probabilities_of_the_policy_that_samples(
    name: str, checkpointing: bool, sequences: Any
) -> None:
    network = network_of(DROPPING[name]())
    rank = rank_of(network, gradient_checkpointing=checkpointing)
    (values,) = rank.log_probs([sequences(0)], 1.0)
    sampled = [replace(s, sampler_log_probs=v) for s, v in zip(sequences(0), values, strict=True)]
    for _ in range(2):
        assert rank.accumulate([sampled], GRPO).max_difference < 1e-5
    losses = {rank.accumulate([sampled], Objective()).loss for _ in range(4)}
    assert len(losses) > 1, "supervised training keeps what its model's configuration says"
    assert rank.accumulate([sampled], GRPO).max_difference < 1e-5


@pytest.mark.parametrize("name", DROPPING)
def test_layers_are_computed_again_in_grpo_too_and_the_gradient_is_the_same(name: str, sequences: Any) -> None:
    sampled = [replace(s, advantage=(-1.0) ** i) for i, s in enumerate(sequences(0))]
    passes, gradients = [], []
    for checkpointing in (False, True):
        network = network_of(DROPPING[name]())
        rank = rank_of(network, gradient_checkpointing=checkpointing)
        part = next(m for n, m in network.named_modules() if n.endswith(("0.attn", "0.self_attn")))
        seen: list[int] = []
        part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        rank.accumulate([sampled], GRPO)
        passes.append(len(seen))
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert passes == [1, 2]
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "modeling"), [("Mixtral", modeling_mixtral), ("Qwen3-MoE", modeling_qwen3_moe)])
def test_a_checkpoint_s_auxiliary_loss_is_not_computed_with_prompts_apart_or_shared(
    name: str, modeling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: Any) -> None:
        raise AssertionError("the auxiliary loss was computed")

    monkeypatch.setattr(modeling, "load_balancing_loss_func", computed)
    module = LogProbs(network_of(small_config(name, output_router_logits=True)))
    group = [TrainingSequence.of_completion([5, 6, 7, 8, *tail], 4, 1.0) for tail in ([9, 10], [11], [12, 13, 14])]
    found = []
    for together in (collate, collate_after_prompts):
        batch = together(group, 0)
        found.append(module(**batch.inputs, temperature=1.0)[0][batch.mask])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert module.policy.config.output_router_logits, "the checkpoint that is saved says what the base said"
