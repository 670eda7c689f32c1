"""The memory that `align plan` foresees for a recipe on the CPU, beside what its processes take: peak resident memory.

`python benchmarks/plan_memory.py [RECIPE] [key=value ...]` runs the recipe (recipes/nano/grpo.yaml without its SFT stage when not
given), watches its learner ranks and rollout workers, and prints both. A few steps are enough: give `grpo.steps=3`.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from align.model.sizes import sizes_of
from align.plan.memory import GIB
from align.plan.placement import cluster_of
from align.plan.plan import make_plan
from align.recipe import load_recipe

ROLES = {"PolicyRank": "learner rank", "RolloutWorker": "rollout worker"}


def foreseen(recipe: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Bytes of a process of each role, by the plan."""
    read = load_recipe(recipe, overrides)
    plan = make_plan(read, sizes_of(read.model.path), cluster_of(1, 0, 0))
    return {role.name: role.total for role in plan.roles if role.name in ROLES.values()}


def measured(recipe: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Bytes that the largest process of each role had in memory at its peak, in a run of the recipe."""
    peaks: dict[str, float] = dict.fromkeys(ROLES.values(), 0.0)
    with tempfile.TemporaryDirectory() as directory:
        stage = load_recipe(recipe, overrides).stage.replace("_", "-")
        command = [sys.executable, "-m", "align.cli", stage, str(recipe), f"run.dir={directory}/run", *overrides]
        run = subprocess.Popen(command, env=os.environ | {"NO_COLOR": "1"}, stdout=sys.stderr)
        while run.poll() is None:
            for role, peak in resident(psutil.Process(run.pid)):
                peaks[role] = max(peaks[role], peak)
            time.sleep(0.3)
    if run.returncode:
        raise SystemExit(f"the run failed with exit status {run.returncode}")
    return peaks


def resident(run: psutil.Process) -> Iterator[tuple[str, float]]:
    """The roles of a run's Ray actors, each with the most that the kernel ever saw it hold (VmHWM)."""
    try:
        for child in run.children(recursive=True):
            actor = re.match(r"ray::(\w+)", " ".join(child.cmdline()))
            status = Path(f"/proc/{child.pid}/status").read_text()
            peak = re.search(r"VmHWM:\s+(\d+) kB", status)
            if actor and peak and actor[1] in ROLES:
                yield ROLES[actor[1]], int(peak[1]) * 1024
    except (psutil.Error, OSError):
        return


def main() -> None:
    """Print both, role by role."""
    named = [a for a in sys.argv[1:] if "=" not in a]
    recipe = Path(named[0] if named else "recipes/nano/grpo.yaml")
    overrides = [a for a in sys.argv[1:] if "=" in a] + ([] if named else ["init_from=null"])
    before, after = foreseen(recipe, overrides), measured(recipe, overrides)
    for role, bytes_ in before.items():
        off = bytes_ / after[role] - 1
        print(f"{role}: foreseen {bytes_ / GIB:.2f} GiB, measured {after[role] / GIB:.2f} GiB ({off:+.0%})")


if __name__ == "__main__":
    main()
