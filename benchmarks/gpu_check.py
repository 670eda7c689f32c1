"""Does the toolkit work on this machine's GPU, and how fast? `make gpu-check` runs it; docs/gpu.md explains the results.

Each section is a process with a time limit of its own, so that one that fails or hangs does not end the others. The model of most sections
is four layers of DeepSeek-V2-Lite with random weights in bfloat16: real shapes, and nothing to download. Results are lines of JSON in
`$OUT/gpu.jsonl` (OUT is runs/gpu_check when not set), and what the engines print is in `$OUT/log.txt`. `--tiny` goes through the sections on a
CPU with the shapes of the nano policy: it finds mistakes in this file, and measures nothing.
"""

import argparse
import importlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from align.experience import training_sequence
from align.learner import policy, rank
from align.learner.batch import TrainingSequence, collate, plan_micro_batches, share_out, whole_rows
from align.learner.objective import LogProbs, Objective
from align.losses import LossOptions
from align.model.policy import (
    attention_kernel,
    attention_sizes,
    load_policy,
    load_tokenizer,
    save_policy,
    use_fast_experts,
)
from align.model.sizes import read_config, sizes_of
from align.plan.memory import GIB, GPU_PROCESS, Training, learner_memory
from align.recipe import LearnerOptions, ModelOptions
from rollout import engine as sampler
from rollout.sync.base import MIB, Bucket, BucketSource, buckets
from rollout.types import EngineOptions, Prompt, SamplingOptions, Trajectory
from rollout.worker import environment

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "recipes/nano/policy"
OUT = Path(os.environ.get("OUT", ROOT / "runs/gpu_check"))
# Where models and runs are kept for the sections to share: on a machine with a GPU in memory, 24 GB of it.
WORK = Path(os.environ.get("GPU_CHECK_WORK", "/dev/shm/gpu_check" if torch.cuda.is_available() else OUT / "work"))
PARTS = re.compile(r"model\.(embed_tokens|layers\.\d+\.(self_attn|mlp(\.gate)?)|norm)")
"""The modules of a model that `note_parts` looks at: the same names in vLLM and in transformers."""
PEAK_FLOPS = 989e12  # dense bfloat16 of an H100 SXM, by its data sheet
# For a machine without a network: where processes meet, and that no hub is asked.
ENVIRONMENT = {"VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
ENVIRONMENT |= dict.fromkeys(["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"], "lo")

TINY = "--tiny" in sys.argv
# Layers of the model, and of the one that is trained with adapters; prompts, and the tokens of one: each eighth is so long that it
# goes through vLLM's kernel for prefill, which takes more than 512.
LAYERS, DEEP = (2, 2) if TINY else (4, 27)
PROMPTS, SHORT, LONG = (4, (8, 16), (8, 16)) if TINY else (64, (32, 128), (600, 1200))
NEW_TOKENS, CONTEXT, CACHE_GB = (8, 512, 0.25) if TINY else (128, 2048, 4)
# Sequences of a step, and the tokens of one, where all parameters are trained and where adapters are; and of a micro-batch.
WHOLE, ADAPTED, MICRO_BATCH = ((4, 64), (4, 64), 128) if TINY else ((64, 512), (16, 2048), 4096)
SFT_STEPS, GRPO_STEPS = (4, 2) if TINY else (60, 3)
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
synchronize: Callable[[], object] = torch.cuda.synchronize if GPU else lambda: None


# What is measured is written down: a line of JSON each.

section_name = ""


def emit(what: str, **values: Any) -> None:
    """Append a result of this section to gpu.jsonl."""
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
    with (OUT / "gpu.jsonl").open("a") as file:
        file.write(json.dumps({"section": section_name, "what": what} | rounded, default=str) + "\n")


@contextmanager
def timed(what: str, **values: Any) -> Iterator[dict[str, Any]]:
    """Emit the seconds that the block takes, the GPU's work included. Of values `..._tokens` and `..._bytes`, also the rate."""
    synchronize()
    began = time.perf_counter()
    yield values
    synchronize()
    values["seconds"] = seconds = time.perf_counter() - began
    for name, amount in list(values.items()):
        if name.endswith("_tokens"):
            values[f"{name}_per_second"] = round(amount / seconds, 1)
        elif name.endswith("_bytes"):
            values["gb_per_second"] = amount / seconds / 1e9
    emit(what, **values)


def memory() -> dict[str, float]:
    """GiB that the card has in use, by whomever, and that PyTorch holds here now and held at most; nothing on a CPU."""
    if not GPU:
        return {}
    free, total = torch.cuda.mem_get_info()
    ours = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    names = ("card_gib", "now_gib", "peak_gib", "reserved_gib")
    return {name: size / GIB for name, size in zip(names, (total - free, *ours), strict=True)}


# Models, and what is sampled from them.


def lite_config(layers: int) -> dict[str, Any]:
    """The configuration of V2-Lite with so many layers; of the nano policy where all is tiny."""
    config = read_config(str(NANO) if TINY else "deepseek-ai/DeepSeek-V2-Lite")
    return config | {"num_hidden_layers": layers, "bos_token_id": 0, "eos_token_id": 1}


def empty_directory(name: str, config: dict[str, Any]) -> Path:
    """A model directory without weights: a configuration, and the nano policy's tokenizer."""
    directory = WORK / name
    shutil.copytree(NANO, directory, dirs_exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def random_model(directory: Path, seed: int) -> Any:
    """The model of a directory with random weights in bfloat16, made on the GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    with torch.no_grad():
        # The distribution of random weights is nearly flat; a head three times as large gives the samplers something to be wrong about.
        model.get_output_embeddings().weight.mul_(3.0)
    return model


def lite_directory(seed: int = 0) -> Path:
    """Four layers of V2-Lite with weights drawn from `seed`, written once for all sections."""
    directory = WORK / f"lite-{seed}"
    if not (directory / "written").exists():
        empty_directory(directory.name, lite_config(LAYERS))
        with timed("model made", seed=seed) as values:
            model = random_model(directory, seed)
            values["parameters"] = sum(p.numel() for p in model.parameters())
        with timed("model written", seed=seed, weight_bytes=2 * values["parameters"]):
            save_policy(model, load_tokenizer(directory), directory)
        (directory / "written").touch()
        del model
        torch.cuda.empty_cache()
    return directory


def new_engine(directory: Path, dtype: str = "bfloat16", **options: Any) -> sampler.Engine:
    """The project's sampler on the GPU, with these of its options."""
    os.environ |= environment(os.cpu_count() or 1) | {"VLLM_LOGGING_LEVEL": "INFO"}
    given = {"max_length": CONTEXT, "batch_sequences": 64, "kv_cache_gb": CACHE_GB, "gpu_memory_share": 0.5} | options
    with timed("import vllm"):
        importlib.import_module("vllm")
    with timed("engine started", dtype=dtype, **options):
        engine = sampler.Engine(directory, dtype, EngineOptions.model_validate(given), [1])
    chosen = ("VLLM_MLA_DISABLE", "TRITON_F32_DEFAULT", "VLLM_BATCH_INVARIANT")
    emit("environment", **{name: os.environ[name] for name in chosen if name in os.environ})
    emit("memory with engine", **memory())
    emit("backends", **backends(engine))
    return engine


def backends(engine: sampler.Engine) -> dict[str, str]:
    """The kernels that vLLM chose, found in its model; they decide what the other numbers mean."""
    try:
        runner = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        found = {"runner": f"{type(runner).__module__}.{type(runner).__name__}"}
        for module in runner.get_model().modules():
            for name in ("attn_backend", "impl", "quant_method", "prefill_backend"):
                value = getattr(module, name, None)
                if value is not None and not any(word in type(value).__name__ for word in ("Linear", "Embedding")):
                    found[name] = getattr(value, "__name__", type(value).__name__)
            if kernel := getattr(getattr(module, "quant_method", None), "moe_kernel", None):
                parts = (getattr(kernel, name, None) for name in ("fused_experts", "prepare_finalize"))
                found["experts"] = ", ".join(type(part).__name__ for part in parts)
    except AttributeError as error:
        return {"error": repr(error)[:300]}
    return found


def sample(
    engine: sampler.Engine, what: str, seed: int = 0, at_once: int = PROMPTS, vocabulary: int = 0
) -> list[Trajectory]:
    """The same prompts each time, of ids below `vocabulary`, answered from `seed` in engine batches of `at_once`."""
    drawn, vocabulary = random.Random(0), vocabulary or lite_config(LAYERS)["vocab_size"]
    ranges = [LONG if i % 8 == 7 else SHORT for i in range(PROMPTS)]
    ids = [[drawn.randrange(2, vocabulary) for _ in range(drawn.randint(*r))] for r in ranges]
    requests = [sampler.Request(Prompt(f"p{i}", row), 0, seed * 1000 + i) for i, row in enumerate(ids)]
    before = engine.steps
    options = SamplingOptions(temperature=1.0, max_new_tokens=NEW_TOKENS)
    with timed(what) as values:
        batches = [requests[start : start + at_once] for start in range(0, PROMPTS, at_once)]
        found = [trajectory for batch in batches for trajectory in engine.sample(batch, options)]
        values |= {"sampled_tokens": sum(len(c.token_ids) for c in found), "engine_steps": engine.steps - before}
    mean = np.concatenate([c.log_probs for c in found]).mean().item()
    emit("sampled", finite=all(c.is_finite for c in found), mean_log_prob=mean)
    return found


def emit_equal(what: str, one: Sequence[Trajectory], other: Sequence[Trajectory]) -> None:
    """How many trajectories have the same tokens, and bit for bit the same log-probabilities."""
    pairs = list(zip(one, other, strict=True))
    tokens = sum(list(a.token_ids) == list(b.token_ids) for a, b in pairs)
    exact = sum(np.array_equal(a.log_probs, b.log_probs) for a, b in pairs)
    emit(what, same_tokens=tokens, same_log_probs=exact, of=len(pairs))


def kept_samples() -> list[Trajectory]:
    """What section b sampled; where it did not run, it runs first, in a process of its own."""
    file = WORK / "samples.pickle"
    if not file.exists():
        subprocess.run([sys.executable, __file__, "b", "--child", *(["--tiny"] if TINY else [])], check=True)
    found: list[Trajectory] = pickle.loads(file.read_bytes())
    return found


def training_sequences(trajectories: Sequence[Trajectory]) -> list[TrainingSequence]:
    """The completions as the learner takes them, with advantages of 1 and -1."""
    weight = 1 / sum(len(t.token_ids) for t in trajectories)
    return [training_sequence(t, weight, 1.0 if i % 2 else -1.0) for i, t in enumerate(trajectories)]


def note_parts(model: Any) -> dict[str, torch.Tensor]:
    """A mapping that gets, at each forward pass, what PARTS of a model of vLLM or transformers give: [tokens, hidden] float32 by their names."""
    noted: dict[str, torch.Tensor] = {}

    def note(name: str, _: Any, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        noted[name] = first.detach().float().flatten(0, -2).cpu()

    for name, module in model.named_modules():
        if PARTS.fullmatch(name):
            module.register_forward_hook(partial(note, name))
    return noted


def emit_parts(of: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """How far the parts of two runs of one prompt are apart, relative to float32's, in the order in which they are computed."""
    for name in of["float32"]:
        size = of["float32"][name].norm()
        pairs = {f"{a}, {b}": (of[a][name] - of[b][name]).norm() / size for a, b in combinations(of, 2)}
        emit("part", name=name, **{pair: distance.item() for pair, distance in pairs.items()})


def learner_log_probs(
    directory: Path, trajectories: Sequence[Trajectory], dtype: str, parts: dict[str, torch.Tensor] | None = None
) -> list[Any]:
    """The trajectories' log-probabilities by transformers, loaded as in the learner; `parts` gets what PARTS give for the first prompt."""
    with timed("transformers loaded", dtype=dtype):
        model = load_policy(ModelOptions.model_validate({"path": str(directory), "dtype": dtype})).to(DEVICE).eval()
    if dtype == "float32" and GPU:
        model.set_experts_implementation("eager")
    module, sequences, rows = LogProbs(model), training_sequences(trajectories), []
    with timed("log-probabilities", dtype=dtype, scored_tokens=sum(len(s.token_ids) for s in sequences)):
        for start in range(0, len(sequences), 8):
            batch = collate(sequences[start : start + 8], 1).to(DEVICE)
            with torch.no_grad():
                values, _ = module(**batch.inputs, temperature=1.0)
            rows += [row[mask].float().cpu() for row, mask in zip(values, batch.mask, strict=True)]
    emit("memory", dtype=dtype, **memory())
    if parts is not None:
        noted = note_parts(model)
        with torch.no_grad():
            model(torch.tensor([trajectories[0].prompt_token_ids], device=DEVICE))
        parts |= noted
    del model, module
    torch.cuda.empty_cache()
    return rows


def emit_difference(what: str, one: Sequence[Any], other: Sequence[Any]) -> None:
    """How far two sets of log-probabilities are apart, in nats a token; `k3` is an estimate of the KL divergence."""
    a, b = (torch.cat([torch.as_tensor(row).double() for row in rows]) for rows in (one, other))
    d, size = a - b, (a - b).abs()
    values = {"mean": size.mean(), "max": size.max(), "k3": (torch.expm1(d) - d).mean(), "bias": d.mean()}
    values |= {"p99": size.quantile(0.99), "beyond_half": (size > 0.5).double().mean()}
    emit(what, tokens=d.numel(), **{name: value.item() for name, value in values.items()})


@dataclass
class CheckpointWeights(BucketSource):
    """The weights of a checkpoint whose names begin with `below`, as a learner sends them."""

    directory: Path
    below: str = ""

    def buckets(self) -> Iterator[Bucket]:
        return buckets(self._tensors(), 256 * MIB)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in sorted(self.directory.glob("*.safetensors")):
            with safe_open(file, "pt") as content:
                names = list(content.keys())
                yield from ((name, content.get_tensor(name)) for name in names if name.startswith(self.below))


# The sections.


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


def sampling() -> None:
    """b: the sampler answers prompts, twice from one seed"""
    engine = new_engine(lite_directory())
    sample(engine, "first batch (kernels are compiled)", seed=1)
    found = sample(engine, "batch, eager")
    (WORK / "samples.pickle").write_bytes(pickle.dumps(found))
    emit_equal("the same batch again", found, sample(engine, "the same batch"))
    emit("memory at the end", **memory())
    parts = note_parts(engine._llm.collective_rpc(lambda worker: worker.model_runner.get_model())[0])
    engine.sample(
        [sampler.Request(Prompt("parts", found[0].prompt_token_ids), 0, 0)], SamplingOptions(max_new_tokens=1)
    )
    (WORK / "parts.pickle").write_bytes(pickle.dumps(parts))


def agreement() -> None:
    """c: transformers computes the log-probabilities of b, and both beside float32"""
    trajectories, directory = kept_samples(), lite_directory()
    sampled = [c.log_probs for c in trajectories]
    parts: dict[str, dict[str, torch.Tensor]] = {"transformers": {}, "float32": {}}
    learner = learner_log_probs(directory, trajectories, "bfloat16", parts["transformers"])
    exact = learner_log_probs(directory, trajectories, "float32", parts["float32"])
    emit_difference("vLLM and transformers, bfloat16", learner, sampled)
    emit_difference("transformers bfloat16 and float32", learner, exact)
    emit_difference("vLLM bfloat16 and float32", sampled, exact)
    kept = WORK / "parts.pickle"
    emit_parts(({"vLLM": pickle.loads(kept.read_bytes())} if kept.exists() else {}) | parts)


def weight_sync() -> None:
    """d: the sampler takes new weights, whole and in part; it sleeps and wakes"""
    old, new = lite_directory(0), lite_directory(1)
    engine = new_engine(old, sleeps=True)
    first = sample(engine, "batch of the old weights")
    size = sum(f.stat().st_size for f in new.glob("*.safetensors"))
    for version in (1, 2):
        with timed("new weights", version=version, weight_bytes=size):
            engine.load(CheckpointWeights(new), version)
    second = sample(engine, "batch of the new weights")
    emit_equal("old and new weights", first, second)
    name = "model.layers.1.self_attn"
    with timed("weights of one module", module=name):
        engine.load(CheckpointWeights(new, f"{name}."), 3, [name])
    third = sample(engine, "batch after one module")
    emit_equal("before and after one module's same weights", second, third)
    for turn in (1, 2):
        sleep_and_wake(turn, "awake", engine.offload, "asleep", engine.onload)
    emit_equal("before and after sleep", third, sample(engine, "batch after sleep"))
    with timed("new weights after sleep", weight_bytes=size):
        engine.load(CheckpointWeights(old), 4)
    emit_equal("old weights, before and again", first, sample(engine, "batch of the old weights again"))
    engine.offload()
    sampled = [c.log_probs for c in second]
    emit_difference("after the update: vLLM and transformers", learner_log_probs(new, second, "bfloat16"), sampled)
    emit_difference("update left out (must be far)", learner_log_probs(old, second, "bfloat16"), sampled)


def sleep_and_wake(turn: int, working: str, leave: Callable[[], Any], away: str, come_back: Callable[[], Any]) -> None:
    """Time how an engine leaves the GPU and comes back; emit the memory before and in between."""
    emit(working, turn=turn, **memory())
    with timed(f"from {working} to {away}", turn=turn):
        leave()
    emit(away, turn=turn, **memory())
    with timed(f"from {away} to {working}", turn=turn):
        come_back()


def graphs() -> None:
    """h: b with CUDA graphs, before and after an update and a sleep"""
    old, new = lite_directory(0), lite_directory(1)
    engine = new_engine(old, cuda_graphs=True, sleeps=True)
    sample(engine, "first batch, graphs", seed=1)
    first = sample(engine, "batch, graphs")
    emit("memory with graphs", **memory())
    emit_equal("eager and graphs", kept_samples(), first)
    engine.load(CheckpointWeights(new), 1)
    second = sample(engine, "batch of the new weights, graphs")
    emit_equal("graphs: old and new weights (must differ)", first, second)
    sleep_and_wake(1, "awake", engine.offload, "asleep", engine.onload)
    engine.load(CheckpointWeights(old), 2)
    emit_equal("graphs: old weights, before and again", first, sample(engine, "batch of the old weights again"))
    engine.offload()
    sampled, learner = [c.log_probs for c in second], learner_log_probs(new, second, "bfloat16")
    emit_difference("graphs, after the update: vLLM and transformers", learner, sampled)


def float32() -> None:
    """i: b and c in float32, with plain attention"""
    in_float32(lite_directory())


def nano_float32() -> None:
    """n: the nano policy, sampled in float32 and compared with transformers"""
    directory = empty_directory("nano", read_config(str(NANO)))
    if not (directory / "model.safetensors").exists():
        save_policy(random_model(directory, 0), load_tokenizer(directory), directory)
    in_float32(directory)


def in_float32(directory: Path) -> None:
    """Answer prompts in float32, and emit how far transformers is from it: the agreement gate stops at 0.001."""
    engine = new_engine(directory, "float32")
    vocabulary = read_config(str(directory))["vocab_size"]
    sample(engine, "first batch, float32 (kernels are compiled)", seed=1, vocabulary=vocabulary)
    found = sample(engine, "batch, float32", vocabulary=vocabulary)
    sampled = [c.log_probs for c in found]
    emit_difference("float32: vLLM and transformers", learner_log_probs(directory, found, "float32"), sampled)


def invariance() -> None:
    """j: rollout.batch_invariant: the same batch, and in parts"""
    engine = new_engine(lite_directory(), batch_invariant=True)
    whole = sample(engine, "batch, invariant")
    for at_once in (16, 3):
        emit_equal(f"batches of {at_once}", whole, sample(engine, f"in batches of {at_once}", at_once=at_once))


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
    """l: the learner with LoRA on all 27 layers of V2-Lite (31 GB, made on the card), gradient checkpointing"""
    directory = empty_directory("lite-deep", lite_config(DEEP))

    def made_on_the_card(*_: Any) -> Any:
        with timed("random weights made on the card"):
            model = random_model(directory, 0)
        use_fast_experts(model)
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


def new_learner(directory: Path, **options: Any) -> policy.LearnerWorker:
    """A learner rank in this process, alone and without Ray; ZeRO-2, since what ZeRO-1 holds in bfloat16 cannot leave the GPU."""
    threads = os.cpu_count() or 1
    os.environ |= rank.environment(0, 1, threads)
    given = {"ranks": 1, "threads": threads, "zero_stage": 2, "micro_batch_tokens": MICRO_BATCH} | options
    given["optimizer"] = {"learning_rate": 1e-4}
    model = ModelOptions(path=str(directory), dtype="bfloat16")
    with patch.object(rank, "introduce_this_process", lambda: None):
        learner = policy.LearnerWorker(model, LearnerOptions.model_validate(given))
    with timed("learner started") as values:
        values["trained"] = learner.setup("127.0.0.1", learner.free_port(), 0, None).description
    emit("memory with learner", **memory())
    return learner


def emit_plan(learner: policy.LearnerWorker, directory: Path, count: int, length: int) -> int:
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
    learner: policy.LearnerWorker,
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


def send_and_rest(learner: policy.LearnerWorker) -> None:
    """Twice each: give out the weights for the sampler, leave the GPU and come back."""
    for turn in (1, 2):
        with timed("publish", turn=turn) as values:
            sizes = [sum(t.nbytes for t in bucket.values()) for bucket in learner.publish(iter, 256 * MIB)]
            values |= {"published_bytes": sum(sizes), "buckets": len(sizes)}
    for turn in (1, 2):
        sleep_and_wake(turn, "at work", learner.offload, "at rest", learner.onload)


COLOCATED = ["colocate=true", "learner.zero_stage=2", "learner.ranks=1", "rollout.workers=1"]
COLOCATED += ["model.dtype=bfloat16", "evaluation.samples=0"]


def nano_run() -> None:
    """f: `align sft` and `align grpo` of the nano policy, learner and sampler colocated on the GPU, by Ray"""
    try:
        run_both_stages(NANO)
    except RuntimeError as error:
        emit("the nano policy's own heads failed", error=str(error)[:1000])
        # FlashAttention-3 has no kernel for keys of 96 and values of 32.
        config = json.loads((NANO / "config.json").read_text())
        width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        run_both_stages(empty_directory("nano-wide", config | {"v_head_dim": width}))


def run_both_stages(policy: Path) -> None:
    """SFT of a policy with random weights, then GRPO of what came out."""
    shorter = ["evaluation.limit=32", "save_every=null"]
    steps = [f"sft.steps={SFT_STEPS}", "sft.validation_limit=32", "learner.optimizer.warmup_steps=2"]
    first = run_align("sft", *COLOCATED, *shorter, *steps, f"model.path={policy}", "model.init=random")
    small = ["grpo.prompts_per_step=4", "grpo.group_size=4"] if TINY else []
    start = ["init_from=null", f"model.path={first / 'final'}", "model.init=pretrained"]
    run_align("grpo", *COLOCATED, *shorter, *small, *start, f"grpo.steps={GRPO_STEPS}")


def lite_run() -> None:
    """g: `align grpo` of the four layers, colocated, their weights through Ray's object store"""
    given = [f"model.path={lite_directory()}", "model.init=pretrained", "init_from=null", "grpo.steps=2"]
    given += ["grpo.prompts_per_step=4", "grpo.group_size=4", "evaluation.limit=4", "evaluation.before=false"]
    given += ["learner.optimizer.learning_rate=1e-6", f"rollout.kv_cache_gb={CACHE_GB}", "save_every=null"]
    run_align("grpo", *COLOCATED, *given, "sampling.max_new_tokens=32")


def run_align(stage: str, *overrides: str) -> Path:
    """Run a nano recipe and emit its last metrics. Raises RuntimeError where it fails."""
    directory = WORK / "runs" / f"{section_name}-{stage}"
    shutil.rmtree(directory, ignore_errors=True)
    recipe = ROOT / f"recipes/nano/{stage}.yaml"
    command = [sys.executable, "-m", "align.cli", stage, str(recipe), f"run.dir={directory}", *overrides]
    with timed(f"align {stage}") as values:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        values["status"] = done.returncode
    print(" ".join(command), done.stdout[-4000:], done.stderr[-6000:], sep="\n")
    metrics = directory / "metrics.jsonl"
    for line in metrics.read_text().splitlines()[-6:] if metrics.is_file() else []:
        emit("metrics", run=directory.name, values={k: v for k, v in json.loads(line).items() if "experts/" not in k})
    if done.returncode:
        raise RuntimeError(f"align {stage} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return directory


# One process starts the sections and shows what they found.

SECTIONS: dict[str, tuple[Callable[[], None], float]] = {
    "a": (machine, 100),
    "b": (sampling, 170),
    "c": (agreement, 110),
    "d": (weight_sync, 170),
    "e": (training, 150),
    "f": (nano_run, 230),
    "h": (graphs, 170),
    "i": (float32, 130),
    "n": (nano_float32, 110),
    "j": (invariance, 130),
    "l": (lora, 170),
    "g": (lite_run, 230),
}
"""What each letter runs, and how many seconds it may take; six times as many with `--tiny`."""
NEEDS_GPU = {"h": "needs a GPU: CUDA graphs", "j": "needs a GPU: other kernels"}


def main() -> int:
    """Run the sections that were asked for. Returns how many failed."""
    options = arguments()
    for directory in (OUT, WORK):
        directory.mkdir(parents=True, exist_ok=True)
    if options.child:
        return child(options.sections[0])
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    began, rows, failed = time.monotonic(), [], 0
    for letter in options.sections:
        left = options.budget - (time.monotonic() - began)
        limit, start = min(SECTIONS[letter][1] * (6 if TINY else 1), left), time.monotonic()
        if TINY and letter in NEEDS_GPU:
            result = NEEDS_GPU[letter]
        elif left < 20 or (failed and options.stop):
            result = f"not begun: {left:.0f} s left"
        else:
            print(f"== {letter}: at most {limit:.0f} s", flush=True)
            result = run_section(letter, limit)
            failed += result != "done"
        rows.append((f"{time.monotonic() - start:.0f}", result, SECTIONS[letter][0].__doc__))
    print("\nseconds  result")
    for seconds, result, about in rows:
        print(f"{seconds:>7}  {result:32} {about}")
    return failed


def arguments() -> argparse.Namespace:
    """The command line."""
    sections = "\n".join(f"  {function.__doc__}" for function, _ in SECTIONS.values())
    about = f"{__doc__}\nsections:\n{sections}"
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=list(SECTIONS), help="all if not given")
    parser.add_argument("--only", metavar="SECTION", help="one section")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no section is begun")
    parser.add_argument("--stop", action="store_true", help="begin no section after one that failed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sections = [options.only] if options.only else options.sections
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {' '.join(SECTIONS)}")
    return options


def run_section(letter: str, limit: float) -> str:
    """Run a section in a process group of its own, print what it found, and the end of its output where it failed."""
    results, log_file = OUT / "gpu.jsonl", OUT / "log.txt"
    shown = len(results.read_text().splitlines()) if results.exists() else 0
    command = [sys.executable, __file__, letter, "--child", *(["--tiny"] if TINY else [])]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log_file.open("ab") as log:
        began = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)
        try:
            result = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            result = "too slow"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left running, Ray's processes among it
        process.wait()
    for line in results.read_text().splitlines()[shown:] if results.exists() else []:
        values = json.loads(line)
        where = f"{values.pop('section')} {values.pop('what')}:"
        short = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={str(v)[:200]}" for k, v in values.items())
        print(" ".join([where, *short])[:600])
    if result != "done":
        print(log_file.read_bytes()[began:].decode(errors="replace")[-2500:], flush=True)
    return result


def child(letter: str) -> int:
    """Run a section in this process. Does not return: interpreters full of native extensions can hang in their teardown."""
    global section_name
    section_name = letter
    try:
        with timed("done"):
            SECTIONS[letter][0]()
        status = 0
    except BaseException as error:
        traceback.print_exc()
        emit("failed", error=f"{type(error).__name__}: {error}"[:1500])
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
