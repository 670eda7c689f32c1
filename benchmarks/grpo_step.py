"""How fast is a GRPO step? This project, TRL and the floor, on one machine in one run. `make bench` runs it.

Every side works on the same policy (the nano one, drawn at random, or `--model`), the same prompts, the same number of completions and
exactly as many tokens. The floor is what the engines themselves need: bare vLLM sampling and bare forward, backward and
AdamW, without weights to send, rewards, log-probabilities or anything written. A step is whole: from the end of one to
the end of the next. The clock is a fair judge on a quiet machine only: the CPU time of everybody else is measured beside
it, and where that is too much, ratios are given and no verdict.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from sides import SEED, SIDES, Result, Task

from align.model.policy import DTYPES, write_random_policy
from align.recipe import ModelOptions
from align.run.machine import environment_record
from rollout.processes import openmp

ROOT = Path(__file__).resolve().parent.parent
POLICY = ROOT / "recipes" / "nano" / "policy"
FLOOR_TARGET = 1.3
DISTURBED = 0.05  # share of the machine that others may use during a side's steps before the clock proves nothing


@dataclass(frozen=True)
class Setting:
    """A length of completions, how many steps are timed, and what we want to need of TRL's time."""

    name: str
    new_tokens: int
    steps: int
    trl_target: float


SETTINGS = (Setting("short", 64, 6, 0.6), Setting("long", 256, 3, 0.5))


def main() -> int:
    """Run the settings, print a table for each and write the JSON."""
    options = arguments()
    report: dict[str, Any] = {"environment": environment_record(), "settings": {}}
    with tempfile.TemporaryDirectory(prefix="grpo-bench-") as scratch:
        policy = options.model or Path(scratch) / "policy"
        if options.model is None:
            write_random_policy(ModelOptions(path=str(POLICY), init="random"), policy, SEED)
        for setting in SETTINGS:
            if setting.name not in options.settings:
                continue
            task = Task(
                policy=str(policy),
                dtype=options.dtype,
                share_prompts=options.share_prompts,
                card=options.card,
                processes=options.processes,
                scratch=scratch,
                prompts=options.prompts,
                group_size=options.group_size,
                new_tokens=setting.new_tokens,
                warmup=options.warmup,
                steps=options.steps or setting.steps,
            )
            results = {side: run_side(side, task, Path(scratch)) for side in options.sides}
            report["settings"][setting.name] = summary(setting, task, results)
            print(table(report["settings"][setting.name]), flush=True)
    out = options.out or ROOT / "runs" / "bench" / f"grpo_step_{datetime.now():%Y%m%d_%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {out}")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--out", type=Path, help="JSON to write; runs/bench/grpo_step_TIME.json when not given")
    parser.add_argument("--settings", nargs="+", choices=names, default=names)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument(
        "--model", type=Path, help="a model directory; the nano policy with random weights when not given"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of every side's weights")
    parser.add_argument("--share-prompts", action="store_true", help="ours: learner.share_prompts")
    parser.add_argument("--card", default="nano_math", help="data card of the prompts")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), default=2, help="workers, and learner ranks, that share two cores"
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not timed, at least 1")
    parser.add_argument("--steps", type=int, help="steps that are timed; 6 short or 3 long when not given")
    return parser.parse_args()


def run_side(side: str, task: Task, scratch: Path) -> Result:
    """Run a side in a process of its own. Raises SystemExit with the end of its output when it fails."""
    directory = scratch / f"{side}-{task.new_tokens}"
    directory.mkdir()
    task_file, result_file, log_file = (directory / name for name in ("task.json", "result.json", "log.txt"))
    task_file.write_text(json.dumps(asdict(task) | {"scratch": str(directory)}))
    print(f"{side}: {task.warmup} + {task.steps} steps of {task.completions} x {task.new_tokens} tokens", flush=True)
    command = [sys.executable, str(Path(__file__).with_name("sides.py")), side, str(task_file), str(result_file)]
    # Threads wait for each other in the same way on every side.
    environment = os.environ | openmp(os.cpu_count() or 1)
    with log_file.open("w") as log:
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        raise SystemExit(f"{log_file.read_text()[-4000:]}\n{side} failed with status {status}")
    result: Result = json.loads(result_file.read_text())
    return result


def summary(setting: Setting, task: Task, results: dict[str, Result]) -> dict[str, Any]:
    """Medians, tokens per second and ratios of one setting, ready for JSON."""
    tokens = task.completions * task.new_tokens
    sides = {}
    for side, result in results.items():
        seconds, cpu = median(result["step_seconds"]), median(result["cpu_seconds"])
        others = sum(result["other_cpu_seconds"]) / sum(result["step_seconds"]) / (os.cpu_count() or 1)
        sides[side] = {
            "seconds": seconds,
            "cpu": cpu,
            "tokens_per_second": tokens / seconds,
            "others": others,
            **result,
        }
    ratios = {}
    for other, target in (("trl", setting.trl_target), ("floor", FLOOR_TARGET)):
        if "ours" in sides and other in sides:
            ratio = sides["ours"]["seconds"] / sides[other]["seconds"]
            disturbed = max(sides[side]["others"] for side in ("ours", other)) > DISTURBED
            ratios[other] = {
                "ratio": ratio,
                "cpu_ratio": sides["ours"]["cpu"] / sides[other]["cpu"],
                "target": target,
                "verdict": "disturbed" if disturbed else "met" if ratio <= target else "not met",
            }
    return {"setting": asdict(setting), "task": asdict(task), "sides": sides, "ours_to": ratios}


def table(found: dict[str, Any]) -> str:
    """The summary of a setting as text."""
    task = found["task"]
    lines = [f"\n{task['prompts']} prompts x {task['group_size']} completions x {task['new_tokens']} tokens"]
    lines.append("          s/step  tokens/s  fastest  slowest   CPU s  others   parts (s)")
    for side, result in found["sides"].items():
        every, parts = result["step_seconds"], ", ".join(f"{k} {v:.2f}" for k, v in result["parts"].items())
        lines.append(
            f"{side:8}{result['seconds']:8.2f}{result['tokens_per_second']:10.0f}{min(every):9.2f}{max(every):9.2f}"
            f"{result['cpu']:8.2f}{result['others']:8.0%}   {parts}"
        )
    lines += [f"{side}: {result['note']}" for side, result in found["sides"].items()]
    for other, value in found["ours_to"].items():
        lines.append(
            f"ours / {other}: {value['ratio']:.2f} by the clock (target {value['target']}: {value['verdict']}), "
            f"{value['cpu_ratio']:.2f} in CPU time"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
