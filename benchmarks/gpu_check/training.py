"""Sections e and l: the learner."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from align.learner import engine, policy, rank
from align.learner.batch import TrainingSequence, plan_micro_batches, share_out, whole_rows
from align.learner.objective import Objective
from align.losses import LossOptions
from align.model.policy import (
    attention_kernel,
    attention_sizes,
)
from align.model.sizes import sizes_of
from align.plan.memory import GIB, GPU_PROCESS, Training, learner_memory
from align.recipe import LearnerOptions, ModelOptions
from gpu_check.models import (
    DEEP,
    LAYERS,
    empty_directory,
    kept_samples,
    lite_config,
    lite_directory,
    random_model,
    sleep_and_wake,
    training_sequences,
)
from gpu_check.results import DEVICE, GPU, TINY, WORK, emit, memory, timed
from reward.learned.model import choose_kernels
from rollout.sync.base import MIB

PEAK_FLOPS = 989e12  # dense bfloat16 of an H100 SXM, by its data sheet
# Sequences of a step, and the tokens of one, where all parameters are trained and where adapters are; and of a micro-batch.
WHOLE, ADAPTED, MICRO_BATCH = ((4, 64), (4, 64), 128) if TINY else ((64, 512), (16, 2048), 4096)


def training() -> None:
    """e: the learner trains all parameters under ZeRO-2: SFT, GRPO on b's samples, weights to send, leaving the GPU"""
    directory = lite_directory()
    learner = new_learner(directory)
    flops = 6 * emit_plan(learner, directory, *WHOLE)
    if (WORK / "samples.pickle").exists():
        train(learner, "GRPO on b's samples", training_sequences(kept_samples()), flops, LossOptions())
    for turn in range(4):
        train(learner, f"SFT step {turn}", sft_sequences(*WHOLE, turn), flops)
    send_and_rest(learner)
    train(learner, "SFT step after rest", sft_sequences(*WHOLE, 3), flops)
    emit("expert load", layers=len(learner.take_expert_load()[0]), missing=len(learner.missing_gradients()))
    emit("attention by itself", kernel=attention_kernel(learner._network, DEVICE))
    for rows, length in ((8, MICRO_BATCH // 8), (1, MICRO_BATCH)):
        attention_kernels(attention_sizes(learner._network.config), rows, length)


def attention_kernels(sizes: tuple[int, int, int], rows: int, length: int) -> None:
    """Causal attention, forward and backward, by each kernel of torch that takes the heads; FlashAttention wants values as wide as keys."""
    heads, keys, values = sizes
    shapes = [(rows, heads, length, width) for width in (keys, keys, values)]
    q, k, v = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for s in shapes)
    given = torch.randn(shapes[2], device=DEVICE, dtype=torch.bfloat16)

    def gradients(kernel: SDPBackend, padding: int) -> Any:
        with sdpa_kernel(kernel):
            out = scaled_dot_product_attention(q, k, pad(v, (0, padding)), is_causal=True)[..., :values]
            return torch.autograd.grad(out, (q, k, v), given)

    wanted = gradients(SDPBackend.MATH, 0)
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        padding = keys - values if kernel is SDPBackend.FLASH_ATTENTION else 0
        what = {"kernel": kernel.name.lower(), "rows": rows, "length": length, "padding": padding}
        try:
            found = gradients(kernel, padding)
            gradients(kernel, padding)
        except RuntimeError as error:
            emit("attention", **what, failed=repr(error)[:200])
            continue
        with timed("attention, ten times", **what) as took:
            for _ in range(10):
                gradients(kernel, padding)
        # Forward two products, backward five, half of each under the causal mask.
        tflops = 10 * 3.5 * rows * heads * length**2 * (keys + values) / took["seconds"] / 1e12
        apart = max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
        emit("attention", **what, tflops=tflops, error=apart)


def lora() -> None:
    """l: the learner with LoRA on all 27 layers of V2-Lite (31 GB, made on the card), gradient checkpointing; it rests, and resumes"""
    directory = empty_directory("lite-deep", lite_config(DEEP))

    def made_on_the_card(*_: Any) -> Any:
        with timed("random weights made on the card"):
            model = random_model(directory, 0)
        choose_kernels(model)
        return model

    adapter = {"rank": 4 if TINY else 32, "alpha": 32, "targets": "attention+shared"}
    tokens = {"gradient_checkpointing": True, "micro_batch_tokens": 2 * MICRO_BATCH}
    with patch.object(policy, "load_policy", made_on_the_card):
        learner = new_learner(directory, lora=adapter, **tokens)
    flops = 4 * emit_plan(learner, directory, *ADAPTED)
    for turn in range(3):
        train(learner, f"LoRA step {turn}", sft_sequences(*ADAPTED, turn), flops)
    send_and_rest(learner)
    train(learner, "LoRA step after rest", sft_sequences(*ADAPTED, 2), flops)
    state = WORK / "lora-state"
    state.mkdir(exist_ok=True)
    with timed("state saved and read back"):
        learner.save_state(state)
        learner.load_state(state)
    train(learner, "LoRA step after resuming", sft_sequences(*ADAPTED, 2), flops)


def new_learner(directory: Path, **options: Any) -> policy.PolicyRank:
    """A learner rank in this process, alone and without Ray."""
    threads = os.cpu_count() or 1
    os.environ |= engine.environment(0, 1, threads)
    given = {"ranks": 1, "threads": threads, "zero_stage": 2, "micro_batch_tokens": MICRO_BATCH} | options
    given["optimizer"] = {"learning_rate": 1e-4}
    model = ModelOptions(path=str(directory), dtype="bfloat16")
    with patch.object(rank, "introduce_this_process", lambda: None):
        learner = policy.PolicyRank(model, LearnerOptions.model_validate(given))
    with timed("learner started") as values:
        values["trained"] = learner.setup("127.0.0.1", learner.free_port(), 0, None).description
    emit("memory with learner", **memory())
    return learner


def emit_plan(learner: policy.PolicyRank, directory: Path, count: int, length: int) -> int:
    """Emit what `align plan` foresees for this rank. Returns the parameters that a token is multiplied with."""
    sizes = sizes_of(str(directory))
    trained = sum(p.numel() for p in learner._network.parameters() if p.requires_grad)
    parts = learner_memory(
        Training(sizes, learner._options, trained, count * length, length, 2, False), on_gpu=not TINY
    )
    gib = {name: size / GIB for name, size in parts.items()}
    total = (sum(parts.values()) + GPU_PROCESS) / GIB
    emit("align plan", total_gib=total, **gib, active=sizes.active, total=sizes.total)
    return sizes.active


def sft_sequences(count: int, length: int, seed: int) -> list[TrainingSequence]:
    """Random conversations of `length` tokens, the first 32 of them a prompt."""
    drawn, vocabulary = random.Random(seed), lite_config(LAYERS)["vocab_size"]
    rows = ([drawn.randrange(2, vocabulary) for _ in range(length)] for _ in range(count))
    return [TrainingSequence.of_completion(row, 32, 1 / (count * (length - 32))) for row in rows]


def train(
    learner: policy.PolicyRank,
    what: str,
    sequences: Sequence[TrainingSequence],
    flops: float,
    grpo: LossOptions | None = None,
) -> None:
    """One update. `flops` are of a token; `mfu` is the share of the card's peak that they come to."""
    lengths = [len(s.token_ids) for s in sequences]
    plan = plan_micro_batches(*whole_rows(lengths), learner._options.micro_batch_tokens, 1)
    micro_batches = share_out(sequences, plan, sequences[0])[0]
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    with timed(what, micro_batches=len(micro_batches)) as values:
        with timed(f"{what}: gradients"):
            sums = learner.accumulate(micro_batches, Objective(grpo))
        norm = learner.apply(1e-5)
        values["trained_tokens"] = sums.padded_tokens
    mfu = sums.padded_tokens / values["seconds"] * flops / PEAK_FLOPS
    emit(f"{what}: results", loss=sums.loss, norm=norm, entropy=sums.entropy / max(sums.tokens, 1), mfu=mfu)
    if sums.compared:
        mean, k3 = sums.difference / sums.compared, sums.sampler_kl / sums.compared
        emit(f"{what}: agreement", mean=mean, max=sums.max_difference, k3=k3)
    emit(f"{what}: memory", **memory())


def send_and_rest(learner: policy.PolicyRank) -> None:
    """Twice each: give out the weights for the sampler, leave the GPU and come back."""
    for turn in (1, 2):
        with timed("publish", turn=turn) as values:
            sizes = [sum(t.nbytes for t in bucket.values()) for bucket in learner.publish(iter, 256 * MIB)]
            values |= {"published_bytes": sum(sizes), "buckets": len(sizes)}
    for turn in (1, 2):
        sleep_and_wake(turn, "at work", learner.offload, "at rest", learner.onload)
