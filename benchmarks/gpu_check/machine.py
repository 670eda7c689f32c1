"""Section a: the machine."""

import importlib
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from gpu_check.results import GPU, TINY, emit, memory, timed


def machine() -> None:
    """a: versions, imports, the kernels that vLLM brings, the rates of the card"""
    packages = "numpy torch triton transformers peft accelerate ray deepspeed pydantic datasets math_verify vllm"
    ours = "align.cli align.learner.policy align.stages.grpo rollout.engine reward"
    of_vllm = "v1.worker.gpu.model_runner v1.worker.gpu_worker model_executor.models.deepseek_v2 device_allocator.cumem"
    of_vllm += " v1.attention.backends.mla.flashattn_mla v1.attention.backends.flash_attn"
    on_gpu = [] if TINY else [f"vllm.{name}" for name in of_vllm.split()]
    for name in [*packages.split(), *ours.split(), *on_gpu]:
        with timed("import", name=name) as values:
            try:
                values["version"] = getattr(importlib.import_module(name), "__version__", None)
            except Exception as error:
                if name in ours.split():
                    raise
                values["error"] = repr(error)[:400]
    if GPU:
        card = torch.cuda.get_device_properties(0)
        chip, nccl = f"{card.major}.{card.minor}", torch.cuda.nccl.version()
        emit("card", name=card.name, chip=chip, sms=card.multi_processor_count, nccl=nccl, **memory())
        card_rates()
        vllm_kernels()
    else:
        emit("card, its rates, vLLM's kernels", skipped="there is no GPU")


def card_rates() -> None:
    """A matrix product's floating-point operations, and copies from and to pageable and pinned memory."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    with timed("matrix product 8192, ten times") as values:
        for _ in range(10):
            a @ a
    emit("bf16 rate", tflops=10 * 2 * 8192**3 / values["seconds"] / 1e12)
    size = 2 * 10**9
    card, pageable = torch.empty(size, dtype=torch.uint8, device="cuda"), torch.ones(size, dtype=torch.uint8)
    with timed("pin 2 GB", pinned_bytes=size):
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for name, host in (("pageable", pageable), ("pinned", pinned)):
        with timed(f"to the card, {name}", moved_bytes=size):
            card.copy_(host)
        with timed(f"from the card, {name}", moved_bytes=size):
            host.copy_(card)


def vllm_kernels() -> None:
    """vLLM's RMS norm and FlashAttention-3 against PyTorch; it refuses the nano policy's heads of 96 and 32."""
    from torch.nn.functional import rms_norm
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, weight = torch.randn(64, 2048, **bf16), torch.ones(2048, **bf16)
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, 1e-6)
    emit("kernel rms_norm", error=(out.float() - rms_norm(x.float(), (2048,), eps=1e-6)).abs().max().item())
    ends = torch.tensor([0, 96], device="cuda", dtype=torch.int32)
    for dims in ((128, 128), (192, 128), (96, 96), (96, 32)):
        q, k, v = (torch.randn(96, 16, dim, **bf16) for dim in (dims[0], *dims))
        try:
            got = flash_attn_varlen_func(q, k, v, 96, ends, 96, ends, causal=True, fa_version=3)
            heads = [t.float().transpose(0, 1)[None] for t in (q, k, v)]
            want = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)[0].transpose(0, 1)
            emit("kernel FA3", dims=dims, error=(got.float() - want).abs().max().item())
        except Exception as error:
            emit("kernel FA3", dims=dims, failed=repr(error)[:300])
