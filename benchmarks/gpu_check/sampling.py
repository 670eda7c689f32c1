"""Sections b, c, d, h, i, n and j: the sampler, by itself and beside transformers."""

import pickle
from pathlib import Path

from align.model.policy import (
    load_tokenizer,
    save_policy,
)
from align.model.sizes import read_config
from gpu_check.models import (
    CheckpointWeights,
    PartsProbe,
    empty_directory,
    kept_samples,
    learner_log_probs,
    lite_directory,
    new_engine,
    random_model,
    sample,
    sleep_and_wake,
)
from gpu_check.results import NANO, WORK, emit, emit_difference, emit_equal, memory, timed
from rollout import engine as sampler
from rollout.parts import NotedTrajectory
from rollout.types import Prompt, SamplingOptions


def sampling() -> None:
    """b: the sampler answers prompts, twice from one seed"""
    engine = new_engine(lite_directory())
    sample(engine, "first batch (kernels are compiled)", seed=1)
    found = sample(engine, "batch, eager")
    (WORK / "samples.pickle").write_bytes(pickle.dumps(found))
    emit_equal("the same batch again", found, sample(engine, "the same batch"))
    emit("memory at the end", **memory())
    request = sampler.Request(Prompt("parts", found[0].prompt_token_ids), 0, 0)
    (noted,) = engine.sample_parts([request], SamplingOptions(max_new_tokens=8))
    (WORK / "parts.pickle").write_bytes(pickle.dumps(noted))


def agreement() -> None:
    """c: transformers computes the log-probabilities of b, and both beside float32"""
    trajectories, directory = kept_samples(), lite_directory()
    sampled = [c.log_probs for c in trajectories]
    probe, kept = PartsProbe(trajectories[0]), WORK / "parts.pickle"
    if kept.exists():
        noted: NotedTrajectory = pickle.loads(kept.read_bytes())
        probe = PartsProbe(noted.trajectory, {"vLLM": noted.parts})
    learner = learner_log_probs(directory, trajectories, "bfloat16", probe)
    exact = learner_log_probs(directory, trajectories, "float32", probe)
    emit_difference("vLLM and transformers, bfloat16", learner, sampled)
    emit_difference("transformers bfloat16 and float32", learner, exact)
    emit_difference("vLLM bfloat16 and float32", sampled, exact)
    probe.emit()


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
