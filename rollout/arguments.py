"""What vLLM is started with: its arguments and its environment, from the device, the model, the dtype and the options."""

import os
from dataclasses import dataclass
from typing import Any, get_args

import torch

from rollout.types import EngineOptions, RolloutError

LATENT_HEADS = {(128, 64, 128), (192, 64, 256), (64, 64, 128), (256, 0, 256)}
"""Heads (nope, rope, value) that vLLM's FlashAttention takes in the prefill of latent attention."""
AMPERE = (8, 0)
"""The least compute capability that has bfloat16, and for which vLLM has kernels whose results do not depend on the batch."""
BATCHED_TOKENS = 8192
"""Tokens of an engine step on a GPU, where vLLM would take 8,192 or 16,384 by the card; `align plan` counts with it too."""


@dataclass(frozen=True, slots=True)
class Device:
    """What an engine runs on: a GPU of a compute capability, or a CPU, which has none."""

    capability: tuple[int, int] | None = None
    name: str = "a CPU"

    @classmethod
    def here(cls) -> "Device":
        """The device that vLLM computes on in this process. Makes no CUDA context."""
        if not torch.cuda.is_available():
            return cls()
        from vllm.platforms import current_platform

        capability = current_platform.get_device_capability()
        return cls((capability.major, capability.minor), current_platform.get_device_name()) if capability else cls()


def prepare(config: Any, dtype: str, options: EngineOptions) -> dict[str, Any]:
    """The arguments of vLLM's `LLM` in this process, whose environment is changed for it: call it before vLLM is imported.

    Raises RolloutError where vLLM cannot compute the model, or an option would have no effect, on this device.
    """
    device = Device.here()
    if why := refusal(dtype, options, device):
        raise RolloutError(why)
    os.environ |= engine_environment(config, dtype, options, device)
    return engine_arguments(config, dtype, options, device)


def refusal(dtype: str, options: EngineOptions, device: Device) -> str:
    """Why vLLM cannot compute in this dtype with these options on this device, and what to do; empty where it can."""
    if device.capability is None:
        reasons = {"cuda_graphs": "a CPU has none", "batch_invariant": "vLLM has no kernels for it on a CPU"}
        return next(
            (f"rollout.{key}: {why}; leave it out" for key, why in reasons.items() if getattr(options, key)), ""
        )
    major, minor = device.capability
    if device.capability < AMPERE and (dtype == "bfloat16" or options.batch_invariant):
        key = "model.dtype: bfloat16" if dtype == "bfloat16" else "rollout.batch_invariant"
        cure = "set model.dtype=float32" if dtype == "bfloat16" else "leave it out"
        return f"{key} takes a GPU of compute capability 8.0 or above, and {device.name} has {major}.{minor}; {cure}"
    if options.record_experts and options.batch_invariant:
        return (
            "rollout.record_experts, which grpo.routing_replay: sampler sets: on a GPU vLLM tells experts from its prefix cache, which "
            "rollout.batch_invariant turns off; leave one of them out, or set grpo.routing_replay=learner"
        )
    if options.adapter_rank and dtype == "float32":
        return (
            "weights.transport: adapter: vLLM's kernels for adapters compute in half precision on a GPU; leave it out, or set "
            "model.dtype=bfloat16"
        )
    return ""


def engine_environment(config: Any, dtype: str, options: EngineOptions, device: Device) -> dict[str, str]:
    """What must be in the environment of the process before it imports vLLM, besides `rollout.worker.environment`."""
    if device.capability is None:
        return {}
    variables = {}
    if has_latent_attention(config) and not is_computed_latent(config, dtype):
        # Plain attention, with keys and values of every head in the cache.
        variables["VLLM_MLA_DISABLE"] = "1"
    if dtype == "float32":
        # Triton's products of float32, in attention and experts, have 10 bits of mantissa otherwise.
        variables["TRITON_F32_DEFAULT"] = "ieee"
    if options.batch_invariant:
        variables["VLLM_BATCH_INVARIANT"] = "1"
    if options.record_experts:
        # The engine that returns them.
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return variables


def engine_arguments(config: Any, dtype: str, options: EngineOptions, device: Device) -> dict[str, Any]:
    """The arguments of vLLM's `LLM`, but for the model and its dtype, for a model with this transformers configuration."""
    arguments: dict[str, Any] = {
        "max_model_len": options.max_length,
        "enforce_eager": not options.cuda_graphs,
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "seed": 0,
        "tensor_parallel_size": options.tensor_parallel,
        "distributed_executor_backend": "uni" if options.tensor_parallel == 1 else "mp",
    }
    if config.model_type.startswith("deepseek"):
        arguments["hf_overrides"] = {"moe_router_dtype": "float32"}
    if options.adapter_rank:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": served_rank(options.adapter_rank)}
    arguments |= cpu_arguments(config, options) if device.capability is None else gpu_arguments(options)
    # No more than tokens of a forward pass, each of which is another sequence's where they are sampled.
    at_once = min(options.concurrent_sequences or options.batch_sequences, arguments["max_num_batched_tokens"])
    return arguments | {"max_num_seqs": at_once}


def gpu_arguments(options: EngineOptions) -> dict[str, Any]:
    """What a GPU's engine takes besides."""
    arguments: dict[str, Any] = {
        "gpu_memory_utilization": options.gpu_memory_share,
        "enable_sleep_mode": options.sleeps,
        "max_num_batched_tokens": max(options.max_length, BATCHED_TOKENS),
    }
    if options.gpus < 1:
        # What is free of a GPU that others load their models to, at the same time, cannot be measured.
        arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gb * 2**30)
    if options.gpus < 1 and options.sleeps:
        # vLLM wants that share free when it starts, and uses it for nothing else then: a learner rank may have begun to load there.
        arguments["gpu_memory_utilization"] = 0.01
    if options.cuda_graphs:
        # Without torch.compile: the kernels are those of the eager engine, and the start takes seconds more, not minutes.
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if options.record_experts:
        # Scheduled ahead, a batch leaves experts of a step that nobody reads any more, and the next one finds them (vLLM 0.32).
        arguments |= {"enable_return_routed_experts": True, "enable_prefix_caching": True, "async_scheduling": False}
    if options.batch_invariant:
        # A prompt that is computed in parts, or whose beginning is cached, is computed by other kernels.
        arguments |= {"enable_prefix_caching": False, "enable_chunked_prefill": False}
    return arguments


def cpu_arguments(config: Any, options: EngineOptions) -> dict[str, Any]:
    """What a CPU's engine takes besides."""
    arguments: dict[str, Any] = {
        "kv_cache_memory_bytes": int(options.kv_cache_gb * 2**30),
        # A seeded request cannot be prefilled in chunks on a CPU: its generator has no offset.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(options.max_length, 4096),
    }
    if options.native_rotary:
        arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    if has_latent_attention(config):
        # The backend that vLLM prefers on CPUs with AMX is for bfloat16 only and cannot take new weights.
        return arguments | {"attention_backend": "CPU_MLA", "enable_prefix_caching": False}
    # A group's prompt is computed once, by whole blocks of the smallest size that there is.
    return arguments | {"enable_prefix_caching": True, "block_size": 32}


def has_latent_attention(config: Any) -> bool:
    """Whether the model has DeepSeek's multi-head latent attention."""
    return bool(getattr(config, "kv_lora_rank", None))


def is_computed_latent(config: Any, dtype: str) -> bool:
    """Whether vLLM computes the model's latent attention as such on a GPU: in half precision, for heads of some sizes."""
    heads = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return dtype != "float32" and heads in LATENT_HEADS


def served_rank(rank: int) -> int:
    """The smallest rank that vLLM has room for, and that `rank` fits in."""
    from vllm.config.lora import MaxLoRARanks

    return min((r for r in get_args(MaxLoRARanks) if r >= rank), default=rank)
