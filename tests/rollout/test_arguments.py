"""What vLLM is started with on each kind of device; its own rules are asked whether they would take it."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from align.model.sizes import read_config
from rollout.arguments import Device, engine_arguments, engine_environment, refusal
from rollout.types import EngineOptions, FleetOptions, SamplingOptions

NANO = Path(__file__).parents[2] / "recipes/nano/policy"
MODELS: dict[str, PretrainedConfig] = {
    "nano": AutoConfig.from_pretrained(NANO),
    "V2-Lite": AutoConfig.for_model(**read_config("deepseek-ai/DeepSeek-V2-Lite")),
    "dense": LlamaConfig(hidden_size=1024, num_attention_heads=16, num_key_value_heads=4),
}
CPU = Device()
T4, A100, H100 = Device((7, 5), "a T4"), Device((8, 0), "an A100"), Device((9, 0), "an H100")
ON_ALL = {
    "max_model_len": 512,
    "max_num_seqs": 128,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "logprobs_mode": "processed_logprobs",
    "disable_log_stats": True,
    "seed": 0,
    "tensor_parallel_size": 1,
    "distributed_executor_backend": "uni",
}
ON_CPU = ON_ALL | {
    "kv_cache_memory_bytes": 2**30,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 4096,
    "compilation_config": {"custom_ops": ["-rotary_embedding"]},
}
ON_GPU = ON_ALL | {"gpu_memory_utilization": 0.85, "enable_sleep_mode": False, "max_num_batched_tokens": 8192}
ROUTER = {"hf_overrides": {"moe_router_dtype": "float32"}}
LATENT_CPU = {"attention_backend": "CPU_MLA", "enable_prefix_caching": False}
PLAIN_CPU = {"block_size": 32, "enable_prefix_caching": True}


def arguments(device: Device, model: str = "V2-Lite", dtype: str = "bfloat16", **options: Any) -> dict[str, Any]:
    return engine_arguments(MODELS[model], dtype, EngineOptions(**options), device)


def environment(device: Device, model: str = "V2-Lite", dtype: str = "bfloat16", **options: Any) -> dict[str, str]:
    return engine_environment(MODELS[model], dtype, EngineOptions(**options), device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "device", "expected"),
    [
        ("nano", CPU, ON_CPU | ROUTER | LATENT_CPU),
        ("V2-Lite", CPU, ON_CPU | ROUTER | LATENT_CPU),
        ("dense", CPU, ON_CPU | PLAIN_CPU),
        ("nano", A100, ON_GPU | ROUTER),
        ("V2-Lite", H100, ON_GPU | ROUTER),
        ("dense", H100, ON_GPU),
    ],
)
def test_without_options_the_arguments_are_those_of_the_device_and_the_model(
    model: str, device: Device, expected: dict[str, Any], dtype: str
) -> None:
    assert arguments(device, model, dtype) == expected


@pytest.mark.parametrize(
    ("device", "options", "changed"),
    [
        (CPU, {"tensor_parallel": 2}, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}),
        (CPU, {"gpus": 0.4, "sleeps": True, "gpu_memory_share": 0.3}, {}),
        (H100, {"tensor_parallel": 8}, {"tensor_parallel_size": 8, "distributed_executor_backend": "mp"}),
        (H100, {"adapter_rank": 9}, {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}),
        (
            H100,
            {"gpus": 0.4, "gpu_memory_share": 0.45, "kv_cache_gb": 2},
            {"gpu_memory_utilization": 0.45, "kv_cache_memory_bytes": 2**31},
        ),
        (
            H100,
            {"gpus": 0.4, "sleeps": True, "kv_cache_gb": 8},
            {"gpu_memory_utilization": 0.01, "enable_sleep_mode": True, "kv_cache_memory_bytes": 2**33},
        ),
        (H100, {"batch_sequences": 1024, "concurrent_sequences": 500}, {"max_num_seqs": 500}),
        (H100, {"batch_sequences": 16384}, {"max_num_seqs": 8192, "max_num_batched_tokens": 8192}),
        (H100, {"max_length": 16384}, {"max_model_len": 16384, "max_num_batched_tokens": 16384}),
        (
            H100,
            {"cuda_graphs": True},
            {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
        ),
        (H100, {"batch_invariant": True}, {"enable_prefix_caching": False, "enable_chunked_prefill": False}),
        (
            H100,
            {"record_experts": True},
            {"enable_return_routed_experts": True, "enable_prefix_caching": True, "async_scheduling": False},
        ),
        (CPU, {"record_experts": True}, {}),
    ],
)
def test_an_option_changes_its_own_arguments_alone(
    device: Device, options: dict[str, Any], changed: dict[str, Any]
) -> None:
    assert arguments(device, **options) == arguments(device) | changed


@pytest.mark.parametrize(
    ("device", "model", "dtype", "options", "expected"),
    [
        (CPU, "nano", "float32", {}, {}),
        (CPU, "V2-Lite", "bfloat16", {}, {}),
        (A100, "dense", "bfloat16", {}, {}),
        (H100, "V2-Lite", "bfloat16", {}, {}),
        (H100, "dense", "float32", {}, {"TRITON_F32_DEFAULT": "ieee"}),
        (A100, "V2-Lite", "float32", {}, {"TRITON_F32_DEFAULT": "ieee", "VLLM_MLA_DISABLE": "1"}),
        (H100, "nano", "bfloat16", {}, {"VLLM_MLA_DISABLE": "1"}),
        (H100, "V2-Lite", "bfloat16", {"batch_invariant": True}, {"VLLM_BATCH_INVARIANT": "1"}),
        (H100, "V2-Lite", "bfloat16", {"record_experts": True}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}),
        (CPU, "V2-Lite", "bfloat16", {"record_experts": True}, {}),
    ],
)
def test_the_environment_follows_from_device_model_and_dtype(
    device: Device, model: str, dtype: str, options: dict[str, Any], expected: dict[str, str]
) -> None:
    assert environment(device, model, dtype, **options) == expected


@pytest.mark.parametrize(
    ("device", "dtype", "options", "said"),
    [
        (CPU, "float32", {"cuda_graphs": True}, "rollout.cuda_graphs: a CPU has none; leave it out"),
        (CPU, "bfloat16", {"batch_invariant": True}, "rollout.batch_invariant: vLLM has no kernels for it on a CPU"),
        (T4, "bfloat16", {}, "and a T4 has 7.5; set model.dtype=float32"),
        (T4, "float32", {"batch_invariant": True}, "rollout.batch_invariant takes a GPU of compute capability 8.0"),
        (H100, "float32", {"adapter_rank": 8}, "weights.transport: adapter: "),
        (
            H100,
            "bfloat16",
            {"record_experts": True, "batch_invariant": True},
            "rollout.record_experts, which grpo.routing_replay: sampler sets: on a GPU vLLM tells experts from its prefix cache",
        ),
        (CPU, "bfloat16", {"record_experts": True}, ""),
        (CPU, "bfloat16", {}, ""),
        (CPU, "float32", {"adapter_rank": 8}, ""),
        (T4, "float32", {}, ""),
        (A100, "bfloat16", {"batch_invariant": True, "adapter_rank": 8}, ""),
        (H100, "float32", {"cuda_graphs": True}, ""),
        (H100, "bfloat16", {"record_experts": True}, ""),
    ],
)
def test_what_a_device_cannot_do_is_refused_with_its_key(
    device: Device, dtype: str, options: dict[str, Any], said: str
) -> None:
    why = refusal(dtype, EngineOptions(**options), device)
    assert said in why
    assert bool(why) == bool(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_sequences": 8, "concurrent_sequences": 9}, "raise batch_sequences"),
        ({"cuda_graphs": True, "batch_invariant": True}, "leave cuda_graphs out"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineOptions(**options)


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """vLLM's rules for CUDA, without its kernels: the backends that compute attention of a kind, the one it chooses first."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
    for name in ("flash_attn_varlen_func", "get_scheduler_metadata", "compile_flash_attn_varlen_func_from_specs"):
        monkeypatch.setattr(f"vllm.v1.attention.backends.fa_utils.{name}", None, raising=False)
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.mla.prefill.base import MLADimensions
    from vllm.v1.attention.backends.mla.prefill.flash_attn import FlashAttnPrefillBackend
    from vllm.v1.attention.selector import AttentionSelectorConfig

    def names(config: Any, dtype: str, device: Device, *, latent: bool, invariant: bool = False) -> list[str]:
        kind = getattr(torch, dtype)
        if getattr(config, "kv_lora_rank", None) is None:
            size = config.head_dim
        elif latent:
            size = config.kv_lora_rank + config.qk_rope_head_dim
            dimensions = MLADimensions(
                qk_nope_head_dim=config.qk_nope_head_dim,
                qk_rope_head_dim=config.qk_rope_head_dim,
                v_head_dim=config.v_head_dim,
            )
            prefill = FlashAttnPrefillBackend
            if not (prefill.supports_mla_dimensions(dimensions) and prefill.supports_dtype(kind)):
                return []
        else:
            size = config.qk_nope_head_dim + config.qk_rope_head_dim
        assert device.capability is not None
        wanted = AttentionSelectorConfig(size, kind, "auto", None, use_mla=latent, use_batch_invariant=invariant)
        found, _ = CudaPlatformBase.get_valid_backends(DeviceCapability(*device.capability), wanted, num_heads=16)
        return [candidate.backend.name for candidate in found]

    return names


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
def test_vllms_rules_take_the_attention_of_every_model_as_it_is_started(
    takes: Callable[..., list[str]], device: Device, dtype: str, invariant: bool
) -> None:
    plain = "TRITON_ATTN" if dtype == "float32" else "FLASH_ATTN"
    assert takes(MODELS["dense"], dtype, device, latent=False, invariant=invariant)[0] == plain
    for model in ("nano", "V2-Lite"):
        config = MODELS[model]
        is_latent = "VLLM_MLA_DISABLE" not in environment(device, model, dtype)
        assert is_latent == bool(takes(config, dtype, device, latent=True, invariant=invariant))
        if not is_latent:
            assert takes(config, dtype, device, latent=False, invariant=invariant)[0] == plain


def test_a_kernel_that_triton_kept_of_another_precision_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    libtriton = pytest.importorskip("triton._C.libtriton")
    ((name, value),) = environment(H100, "dense", "float32").items()
    monkeypatch.setenv(name, value)
    assert libtriton.get_cache_invalidating_env_vars()[name] == value


def test_a_temperature_that_would_be_another_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"vLLM samples at 0\.01 where less is given"):
        SamplingOptions(temperature=0.005)
    with pytest.raises(ValidationError, match="less than or equal to 2"):
        SamplingOptions(temperature=2.1)  # vLLM's own limit
    assert (SamplingOptions(temperature=0).temperature, SamplingOptions(temperature=0.01).temperature) == (0, 0.01)


@pytest.mark.parametrize("resources", [{"CPU": 4}, {"GPU": 1}, {"rollout": 0}, {"rollout": -1}])
def test_resources_are_those_that_nodes_are_given(resources: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="is none of the resources that nodes are given"):
        FleetOptions(resources=resources)
    assert FleetOptions(resources={"rollout": 1}).resources == {"rollout": 1}
