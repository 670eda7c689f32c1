"""The models of the sections, the engines that hold them, and what is sampled from them."""

import importlib
import json
import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from align.experience import training_sequence
from align.learner.batch import TrainingSequence, collate
from align.learner.objective import LogProbs
from align.model.policy import (
    load_policy,
    load_tokenizer,
    save_policy,
)
from align.model.sizes import read_config
from align.recipe import ModelOptions
from gpu_check.results import DEVICE, GPU, NANO, TINY, WORK, emit, memory, section_command, timed
from rollout import engine as sampler
from rollout.parts import PartNotes, Parts, compared
from rollout.sync.base import MIB, Bucket, BucketSource, buckets
from rollout.types import EngineOptions, Prompt, SamplingOptions, Trajectory
from rollout.worker import environment

# Layers of the model, and of the one that is trained with adapters; prompts, and the tokens of one: each eighth is so long that it
# goes through vLLM's kernel for prefill, which takes more than 512.
LAYERS, DEEP = (2, 2) if TINY else (4, 27)
PROMPTS, SHORT, LONG = (4, (8, 16), (8, 16)) if TINY else (64, (32, 128), (600, 1200))
NEW_TOKENS, CONTEXT, CACHE_GB = (8, 512, 0.25) if TINY else (128, 2048, 4)


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


def kept_samples() -> list[Trajectory]:
    """What section b sampled; where it did not run, it runs first, in a process of its own."""
    file = WORK / "samples.pickle"
    if not file.exists():
        subprocess.run(section_command("b"), check=True)
    found: list[Trajectory] = pickle.loads(file.read_bytes())
    return found


def training_sequences(trajectories: Sequence[Trajectory]) -> list[TrainingSequence]:
    """The completions as the learner takes them, with advantages of 1 and -1."""
    weight = 1 / sum(len(t.token_ids) for t in trajectories)
    return [training_sequence(t, weight, 1.0 if i % 2 else -1.0) for i, t in enumerate(trajectories)]


@dataclass
class PartsProbe:
    """What the parts of each engine's model computed for one trajectory, and how far they are apart, relative to their size, by engines."""

    trajectory: Trajectory
    noted: dict[str, Parts] = field(default_factory=dict)
    apart: dict[str, dict[str, float]] = field(default_factory=dict)

    def compare(self, module: LogProbs, name: str) -> None:
        """Compare a learner's parts with all that was noted, and note them."""
        inputs = collate(training_sequences([self.trajectory]), 1).to(DEVICE).inputs
        for other, parts in self.noted.items():
            with torch.no_grad(), compared(module.policy, parts) as found:
                module(**inputs, temperature=1.0)
            self.apart[f"{other}, {name}"] = {part: distance.relative for part, distance in found.items()}
        notes = PartNotes(module.policy)
        with torch.no_grad():
            module(**inputs, temperature=1.0)
        self.noted[name] = notes.close()

    def emit(self) -> None:
        """Emit a line for each part, in the order in which they are computed."""
        for part in next(iter(self.apart.values())):
            emit("part", name=part, **{engines: apart[part] for engines, apart in self.apart.items() if part in apart})


def learner_log_probs(
    directory: Path, trajectories: Sequence[Trajectory], dtype: str, probe: PartsProbe | None = None
) -> list[Any]:
    """The trajectories' log-probabilities by transformers, loaded as in the learner; its parts are compared with what `probe` has of others."""
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
    if probe is not None:
        probe.compare(module, f"transformers {dtype}")
    del model, module
    torch.cuda.empty_cache()
    return rows


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


def sleep_and_wake(turn: int, working: str, leave: Callable[[], Any], away: str, come_back: Callable[[], Any]) -> None:
    """Time how an engine leaves the GPU and comes back; emit the memory before and in between."""
    emit(working, turn=turn, **memory())
    with timed(f"from {working} to {away}", turn=turn):
        leave()
    emit(away, turn=turn, **memory())
    with timed(f"from {away} to {working}", turn=turn):
        come_back()
