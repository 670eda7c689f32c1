"""The experts that the sampler records are those that its routers chose: transformers' routers choose the same for the same tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from align.model.policy import load_tokenizer
from align.recipe import ModelOptions
from rollout import Fleet, FleetOptions, Prompt, SamplingOptions, Trajectory
from rollout.routing import returned_experts
from rollout.types import RolloutError, expert_dtype, not_routed

NANO = Path(__file__).parents[2] / "recipes" / "nano" / "policy"
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, PretrainedConfig] = {
    "Qwen3-MoE": Qwen3MoeConfig(**SIZES, **EIGHT, head_dim=32),
    "Qwen2-MoE": Qwen2MoeConfig(**SIZES, **EIGHT, shared_expert_intermediate_size=64),
    "OLMoE": OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2),
    "Mixtral": MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
}
SAMPLING = SamplingOptions(max_new_tokens=48)
# Of each group one prompt, longer than two blocks of the prefix cache.
PROMPTS = [Prompt(f"p{i}", [0, *((7 * i + 3 * j) % 90 + 5 for j in range(70))]) for i in range(12)]
LITTLE = 0.012
"""GiB of KV cache that do not hold all sequences at once: some are preempted."""


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


def test_what_vllm_returns_on_a_gpu_loses_the_layers_without_experts() -> None:
    returned = np.arange(3 * 4 * 2, dtype=np.uint8).reshape(3, 4, 2)  # 3 tokens, 4 layers, the first of which is dense
    found = returned_experts(returned, [1, 2, 3], 256, tokens=3)
    assert found.dtype == np.uint16, "255 marks a token without experts in uint8"
    assert found.tolist() == returned[:, 1:].tolist()
    assert returned_experts(returned, [1, 2, 3], 64, tokens=3).dtype == np.uint8
    for wrong in (returned, None):
        with pytest.raises(RolloutError, match="not of 4"):
            returned_experts(wrong, [1, 2, 3], 64, tokens=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, deepseek_v2: ModelOptions) -> Callable[[str], str]:
    """A function of a name: the directory of that model, with random weights."""

    def written(name: str) -> str:
        if name == "DeepSeek-V2":
            return deepseek_v2.path
        directory = tmp_path_factory.mktemp("routed")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32).save_pretrained(directory)
        load_tokenizer(str(NANO)).save_pretrained(directory)
        return str(directory)

    return written


@pytest.mark.parametrize(
    ("name", "cache_gb", "prompts"),
    [
        ("DeepSeek-V2", LITTLE, 6),
        ("Qwen3-MoE", 0.5, 6),
        *(
            pytest.param(name, gb, 12, marks=pytest.mark.slow)
            for name in ("DeepSeek-V2", *MODELS)
            for gb in (0.5, LITTLE if name == "DeepSeek-V2" else LITTLE / 3)
        ),
    ],
)
def test_every_token_has_the_experts_that_its_routers_chose(
    name: str, cache_gb: float, prompts: int, models: Callable[[str], str], ray_session: None
) -> None:
    """Also those of requests that were preempted, and of prompts that are in the cache of another request."""
    path = models(name)
    options = FleetOptions(workers=1, max_length=128, kv_cache_gb=cache_gb, record_experts=True)
    fleet = Fleet(path, "float32", options, stop_token_ids=[1])
    try:
        fleet.wait_until_ready()
        groups = list(fleet.sample(PROMPTS[:prompts], 7, SAMPLING, seed=0, step=0))
    finally:
        fleet.close()
    routers, compared = Routers(path), 0
    for trajectory in (trajectory for group in groups for trajectory in group.trajectories):
        assert trajectory.experts is not None
        assert trajectory.experts.dtype == np.uint8
        expected = routers.choose(trajectory)
        assert np.array_equal(np.sort(trajectory.experts), expected)
        compared += expected.shape[0] * expected.shape[1]
    assert compared >= 1_250 * prompts
