"""The experts that the sampler records are those that its routers chose: transformers' routers choose the same for the same tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from rollout import SamplingOptions, Trajectory
from rollout.types import expert_dtype, not_routed

NANO = Path(__file__).parents[2] / "recipes" / "nano" / "policy"
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, PretrainedConfig] = {
    "Qwen3-MoE": Qwen3MoeConfig(**SIZES, **EIGHT, head_dim=32),
    "Qwen2-MoE": Qwen2MoeConfig(**SIZES, **EIGHT, shared_expert_intermediate_size=64),
    "OLMoE": OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2),
    "Mixtral": MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
}
SAMPLING = SamplingOptions(max_new_tokens=48)


class Routers:
    """What the routers of a model choose in transformers."""

    def __init__(self, path: str):
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._found: list[torch.Tensor] = []
        for module in self._model.modules():
            if hasattr(module, "experts"):
                module.gate.register_forward_hook(lambda _, __, output: self._found.append(output[-1]))

    def choose(self, trajectory: Trajectory) -> npt.NDArray[np.int64]:
        """[P+T-1, layers, k], of the whole sequence computed at once, sorted."""
        self._found.clear()
        with torch.no_grad():
            self._model(torch.tensor([[*trajectory.prompt_token_ids, *trajectory.token_ids]]))
        return np.sort(torch.stack(self._found, dim=1)[:-1].numpy())


def test_ids_have_room_for_every_expert_and_for_a_mark() -> None:
    assert (expert_dtype(255), not_routed(expert_dtype(255))) == (np.uint8, 255)
    assert (expert_dtype(256), not_routed(expert_dtype(256))) == (np.uint16, 65535)
