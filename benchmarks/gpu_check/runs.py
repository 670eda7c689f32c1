"""Sections f and g: whole runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_check import results
from gpu_check.models import CACHE_GB, empty_directory, lite_directory
from gpu_check.results import NANO, ROOT, TINY, WORK, emit, timed

SFT_STEPS, GRPO_STEPS = (4, 2) if TINY else (60, 3)
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
    directory = WORK / "runs" / f"{results.section_name}-{stage}"
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
