"""What routing replay and corrections do to a policy with DeepSeek-V2's routing: `make replay-tables`, about an hour on two quiet CPU cores.

A nano policy with 16 experts in 4 groups of which a token goes to 2, scaled by 16 as DeepSeek-V2's are, is trained by SFT. Table 1 says how far a
learner is from each sampler without training, table 2 what comes of GRPO with a sampler whose weights are on the grid of int8. Each result is
written to `results.jsonl` as soon as it is there, and the same command goes on after it. The tables are in `tables.md`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mismatch import CORRECTIONS, SAMPLERS, measure

from align.recipe import ModelOptions
from align.run import read_jsonl, read_status
from align.run.files import write_atomically, write_jsonl
from align.statistics import wilson_interval

NANO = Path(__file__).resolve().parents[1] / "recipes" / "nano"
ROUTING = {
    "topk_method": "group_limited_greedy",
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": False,
}
SCALINGS = (16.0, 2.4)
"""DeepSeek-V2's own, and what is taken where SFT does not learn with it."""
LEARNT = 0.2
"""The held-out accuracy from which on SFT has learnt."""
LAST = 5
"""The steps at the end that load and reward are of."""
REMEDIES = {
    "none": [],
    "tis": ["grpo.correction={kind: tis}"],
    "icepop": ["grpo.correction={kind: icepop}"],
    "geometric": ["grpo.correction={kind: geometric_mask}"],
    "R2": ["grpo.routing_replay=learner"],
    "R3": ["grpo.routing_replay=sampler"],
    "R3 + icepop": ["grpo.routing_replay=sampler", "grpo.correction={kind: icepop}"],
    "frozen router": ["learner.freeze=[router]"],
}
# On a busy machine engines take minutes to start.
PATIENT = ["trackers=[]", "rollout.start_timeout_s=1800", "learner.start_timeout_s=1800"]
# Two policies that are meant to differ: no limit ends a run that is to be measured.
ROUNDED = ["weights.precision=int8", "agreement={warn_mean: 100, stop_mean: 100, stop_routing: 1}"]
COMMON = [
    "init_from=null",
    "model.init=pretrained",
    "rollout.record_experts=true",
    "agreement.stop_routing=1",
    "grpo={steps: 20, prompts_per_step: 32, group_size: 16}",
    "evaluation={limit: 512, samples: 0, before: false}",
    "save_every=5",
    "keep_checkpoints=1",
]
TINY_EVALUATION = "evaluation={limit: 16, samples: 0, before: false}"
TINY_SFT = ["sft.steps=10", "sft.sequences_per_step=16", TINY_EVALUATION]
TINY_GRPO = ["grpo={steps: 2, prompts_per_step: 4, group_size: 4}", TINY_EVALUATION]


@dataclass(frozen=True, slots=True)
class Cell:
    """A run of table 2."""

    updates: int
    remedy: str
    sampler: str = "int8 grid"
    seed: int = 0

    @property
    def name(self) -> str:
        """What its row and its directory are called."""
        return f"{self.updates} updates, {self.sampler}, {self.remedy}, seed {self.seed}"

    @property
    def overrides(self) -> list[str]:
        """The keys of the recipe that make it this one."""
        own = [f"seed={self.seed}", f"grpo.updates_per_step={self.updates}", *REMEDIES[self.remedy]]
        return own + (ROUNDED if self.sampler == "int8 grid" else [])


CELLS = [
    Cell(1, "none", "float32"),
    *(Cell(1, remedy) for remedy in ("none", "tis", "icepop", "geometric", "R3", "frozen router", "R3 + icepop")),
    Cell(4, "none", "float32"),
    *(Cell(4, remedy) for remedy in ("none", "R2", "R3", "R3 + icepop", "frozen router")),
    *(Cell(4, remedy, seed=seed) for seed in (1, 2) for remedy in ("none", "R3")),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is not there yet, and the tables. Returns 0, or 1 where a run failed, which the next command tries again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory of the runs and results; runs/replay-tables when not given")
    parser.add_argument("--tiny", action="store_true", help="few steps of three runs, to see that it works: minutes")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs/replay-tables-tiny" if options.tiny else "runs/replay-tables")
    out.mkdir(parents=True, exist_ok=True)
    results, failed = Results(out / "results.jsonl"), []
    policy = trained_policy(out, tiny=options.tiny)
    for sampler in SAMPLERS:
        if f"table 1, {sampler}" not in results.rows:
            sizes = (8, 4) if options.tiny else (32, 8)
            rows = measure(ModelOptions(path=str(policy)), sampler, *sizes)
            results.add(f"table 1, {sampler}", {"rows": rows})
    for cell in (Cell(1, "none", "float32"), Cell(1, "R3 + icepop"), Cell(4, "R2")) if options.tiny else CELLS:
        if cell.name in results.rows:
            continue
        directory = out / cell.name.replace(", ", "-").replace(" ", "_")
        keys = [f"model.path={policy}", *PATIENT, *COMMON, *(TINY_GRPO if options.tiny else []), *cell.overrides]
        if align("grpo", NANO / "grpo.yaml", directory, keys):
            results.add(cell.name, measured(directory))
        else:
            failed.append(cell.name)
    text = f"Policy: {policy}\n\n{table_1(results.rows)}\n\n{table_2(results.rows)}\n"
    write_atomically(out / "tables.md", text)
    print(text)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return bool(failed)


class Results:
    """Rows of a file of JSON lines by name, in which each is kept as soon as it is there."""

    def __init__(self, file: Path):
        self._file = file
        self.rows = {row["name"]: row for row in (read_jsonl(file) if file.exists() else [])}

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        """Keep a row."""
        self.rows[name] = {"name": name, **found}
        write_jsonl(self._file, self.rows.values())


def trained_policy(out: Path, *, tiny: bool) -> Path:
    """The policy after SFT, with the first of `SCALINGS` at which it learns."""
    for scaling in SCALINGS:
        drawn, directory = out / f"policy-{scaling:g}", out / f"sft-{scaling:g}"
        drawn.mkdir(exist_ok=True)
        for file in (NANO / "policy").iterdir():
            write_atomically(drawn / file.name, file.read_bytes())
        config = json.loads((NANO / "policy" / "config.json").read_text())
        config |= ROUTING | {"routed_scaling_factor": scaling}
        write_atomically(drawn / "config.json", json.dumps(config, indent=2))
        keys = [f"model.path={drawn}", *PATIENT, *(TINY_SFT if tiny else [])]
        if not align("sft", NANO / "sft.yaml", directory, keys):
            raise SystemExit(f"SFT with scaling {scaling:g} failed: {directory}.log")
        accuracy = float(read_jsonl(directory / "evaluations.jsonl")[-1]["accuracy"])
        print(f"SFT with scaling {scaling:g}: {accuracy:.1%} of held-out problems", flush=True)
        if accuracy >= LEARNT or tiny:
            return directory.absolute() / "final"
    raise SystemExit("SFT learns with none of the scalings")


def align(stage: str, recipe: Path, directory: Path, keys: Iterable[str]) -> bool:
    """Run a stage, or go on with it, where it has not finished; its output is in a file beside its directory. Returns whether it is done."""
    status = read_status(directory)
    if status is not None and status["state"] == "finished":
        return True
    print(f"{directory.name} ...", flush=True)
    command = [sys.executable, "-m", "align.cli", stage, str(recipe), f"run.dir={directory}", *keys]
    with Path(f"{directory}.log").open("a", encoding="utf-8") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode == 0


def measured(directory: Path) -> dict[str, Any]:
    """The columns of a run's row: means over its steps, the largest difference of all, load and reward of the last steps, and accuracy after it."""
    steps = [row for row in read_jsonl(directory / "metrics.jsonl") if "agreement/mean" in row]
    after = read_jsonl(directory / "evaluations.jsonl")[-1]

    def mean(name: str, of: Sequence[Mapping[str, Any]] = steps) -> float | None:
        values = [float(step[name]) for step in of if name in step]
        return fmean(values) if values else None

    corrected = [float(s["correction/cut"]) + float(s["correction/masked"]) for s in steps if "correction/cut" in s]
    accuracy, problems = float(after["accuracy"]), int(after["problems"])
    return {
        "steps": len(steps),
        "mean": mean("agreement/mean"),
        "max": max(float(step["agreement/max"]) for step in steps),
        "k3": mean("agreement/k3"),
        "changed": mean("routing/changed"),
        "cut": fmean(corrected) if corrected else None,
        "size": mean("correction/effective_sample_size"),
        "cv": mean("experts/cv", steps[-LAST:]),
        "reward": mean("reward", steps[-LAST:]),
        "accuracy": [accuracy, *wilson_interval(accuracy * problems, problems)],
    }


def table_1(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Mismatch by sampler, updates and way of routing; below it the corrections, without replay and with R3."""
    found = [row for sampler in SAMPLERS for row in rows[f"table 1, {sampler}"]["rows"]]
    found.sort(key=lambda row: (SAMPLERS.index(row["sampler"]), row["updates"]))
    mismatch = [[row["sampler"], row["updates"], row["way"], *mismatch_of(row)] for row in found]
    corrected = [
        [row["sampler"], row["updates"], row["way"], *(corrected_of(*row["corrections"][kind]) for kind in CORRECTIONS)]
        for row in found
        if row["way"] in ("none", "R3")
    ]
    head = ["sampler", "updates", "remedy"]
    return (
        markdown([*head, "mean", "max", "k3", "routes changed"], mismatch)
        + "\n\nTokens cut or masked, and the effective sample size:\n\n"
        + markdown([*head, *CORRECTIONS], corrected)
    )


def table_2(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each run."""
    lines = []
    for cell in CELLS:
        if (row := rows.get(cell.name)) is None:
            continue
        correction = "" if row["cut"] is None else corrected_of(row["cut"], row["size"])
        accuracy, low, high = row["accuracy"]
        share = f"{accuracy:.1%} ({low:.1%} to {high:.1%})"
        of_run = [cell.updates, cell.sampler, cell.remedy, cell.seed]
        lines.append([*of_run, *mismatch_of(row), correction, f"{row['cv']:.2f}", f"{row['reward']:.3f}", share])
    head = ["updates", "sampler", "remedy", "seed", "mean", "max", "k3", "routes changed", "cut, effective size"]
    return markdown([*head, "load variation", "reward", "held-out accuracy"], lines)


def mismatch_of(row: Mapping[str, Any]) -> list[str]:
    """Mean, largest difference and k3 in nats, and the share of routes that changed."""
    mean, largest, k3, changed = (float(row[name]) for name in ("mean", "max", "k3", "changed"))
    return [f"{mean:.1e}", f"{largest:.2g}", f"{k3:.1e}", f"{changed:.2%}"]


def corrected_of(share: float, size: float) -> str:
    """The share of tokens that a correction cuts or masks, and the effective sample size."""
    return f"{share:.2%}, {size:.3f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
