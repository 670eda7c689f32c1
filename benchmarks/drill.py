"""Faults at nano size with the real engines, on this machine: what each must lead to, and what was seen.

Exits with 1 when a promise is broken. With `--random-kills SECONDS` a worker is killed every 20 seconds for so long, and
the speed of sampling is compared with that of a fleet left alone.
"""

import argparse
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import cloudpickle
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from align.evaluate.agreement import AgreementError, AgreementGate, Disagreement, probe
from align.experience import training_sequence
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerError, LearnerGroup
from align.learner.objective import Objective
from align.model.names import to_checkpoint
from align.model.policy import write_random_policy
from align.recipe import AgreementOptions, GrpoOptions, LearnerOptions, ModelOptions, OptimizerOptions
from align.session.ray import local_ray
from rollout import RolloutError, SamplingOptions, State, Trajectory, stored

sys.path.append(str(Path(__file__).parents[1] / "tests" / "rollout"))
import injuries
from injuries import OPTIONS, PROMPTS, Injury, WitnessedFleet

# Workers do not have the module.
cloudpickle.register_pickle_by_value(injuries)

NANO = Path(__file__).parents[1] / "recipes" / "nano" / "policy"
GRPO = Objective(GrpoOptions(steps=1, prompts_per_step=1, group_size=2))


@dataclass(frozen=True, slots=True)
class Finding:
    """A row of the table."""

    fault: str
    promise: str
    seen: str
    kept: bool


def drill(random_kills_s: float) -> Iterator[Finding]:
    """Inject every fault, one after the other."""
    with tempfile.TemporaryDirectory() as name, local_ray():
        policy = ModelOptions(path=name)
        write_random_policy(ModelOptions(path=str(NANO), init="random"), Path(name), seed=0)
        with fleet_of(policy) as witnessed:
            yield from fleet_findings(witnessed, policy)
            if random_kills_s:
                yield random_kills(witnessed, random_kills_s)
            yield from learner_findings(witnessed, policy)
        yield all_dead(policy)


@contextmanager
def fleet_of(policy: ModelOptions, max_restarts: int = OPTIONS.max_restarts) -> Iterator[WitnessedFleet]:
    witnessed = WitnessedFleet(policy.path, OPTIONS.model_copy(update={"max_restarts": max_restarts}))
    with closing(witnessed.fleet):
        witnessed.fleet.wait_until_ready()
        witnessed.until_healthy()
        yield witnessed


def weights(policy: ModelOptions, noise: float) -> dict[str, torch.Tensor]:
    """The policy's checkpoint, with as much noise on each weight."""
    generator = torch.Generator().manual_seed(1)
    checkpoint = to_checkpoint(AutoModelForCausalLM.from_pretrained(policy.path).state_dict().items())
    return {name: tensor + noise * torch.randn(tensor.shape, generator=generator) for name, tensor in checkpoint}


def fleet_findings(witnessed: WitnessedFleet, policy: ModelOptions) -> Iterator[Finding]:
    witnessed.fleet.load(stored(weights(policy, 0.02)), version=1)
    unbroken = witnessed.sample()
    for injury in Injury:
        yield hurt_while_sampling(witnessed, injury, unbroken)
    yield hurt_while_idle(witnessed, unbroken)
    yield hurt_while_loading(witnessed, policy)


def hurt_while_sampling(witnessed: WitnessedFleet, injury: Injury, unbroken: list[Trajectory]) -> Finding:
    witnessed.until_healthy()
    witnessed.faults.clear()
    began = time.monotonic()
    drawn = witnessed.sample(lambda: witnessed.injure_a_busy_one(injury))
    witnessed.until_healthy()
    witnessed.fleet.wait_until_ready()
    again = any("sampled again" in fault.message for fault in witnessed.faults)
    seen = f"{'the same' if drawn == unbroken else 'others'}; all workers serve after {time.monotonic() - began:.1f} s"
    return Finding(
        f"worker {injury}, sampling", "same trajectories, worker replaced", seen, drawn == unbroken and again
    )


def hurt_while_idle(witnessed: WitnessedFleet, unbroken: list[Trajectory]) -> Finding:
    witnessed.until_healthy()
    witnessed.faults.clear()
    began = time.monotonic()
    witnessed.injure(0, Injury.STOP)
    witnessed.until(lambda: witnessed.fleet.workers[0].state is State.RESTARTING)
    noticed = time.monotonic() - began
    same = witnessed.sample() == unbroken
    seen = f"noticed after {noticed:.1f} s; {'the same' if same else 'others'}"
    return Finding("worker stopped, idle", "noticed within three probes, same trajectories", seen, same)


def hurt_while_loading(witnessed: WitnessedFleet, policy: ModelOptions) -> Finding:
    witnessed.until_healthy()
    witnessed.injure(0, Injury.STOP)
    witnessed.fleet.load(stored(weights(policy, 0.01)), version=2)
    first = witnessed.sample()
    witnessed.until_healthy()
    new = {run.version for drawn in [*first, *witnessed.sample()] for run in drawn.weight_versions} == {2}
    seen = "all samples from version 2" if new else "samples from old weights"
    return Finding("worker stopped, taking new weights", "no sample from old weights", seen, new)


def all_dead(policy: ModelOptions) -> Finding:
    with fleet_of(policy, max_restarts=0) as witnessed:
        began = time.monotonic()
        for member in witnessed.fleet.workers:
            witnessed.injure(member.number, Injury.KILL)
        try:
            witnessed.sample()
            seen, kept = "no error", False
        except RolloutError:
            took = time.monotonic() - began
            seen, kept = f"RolloutError after {took:.1f} s", took < 30
    return Finding("all workers dead, no restart left", "RolloutError within 30 s", seen, kept)


def random_kills(witnessed: WitnessedFleet, seconds: float, every_s: float = 20) -> Finding:
    witnessed.until_healthy()
    unbroken, began = witnessed.sample(), time.monotonic()
    for _ in range(5):
        witnessed.sample()
    alone = 5 / (time.monotonic() - began)
    kills, done, same, over = 0, 0, True, threading.Event()

    def kill() -> None:
        nonlocal kills
        draw = random.Random(0)
        while not over.wait(every_s):
            alive = [m for m in witnessed.fleet.workers if m.process and m.state is not State.RESTARTING]
            if alive:
                witnessed.injure(draw.choice(alive).number, Injury.KILL)
                kills += 1

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        same &= witnessed.sample() == unbroken
        done += 1
    ratio = done / (time.monotonic() - began) / alone
    over.set()
    killer.join()
    seen = f"{kills} kills, {done} calls {'all the same' if same else 'NOT all the same'}, {ratio:.0%} of the speed"
    return Finding(f"a worker killed every {every_s:g} s", "same trajectories", seen, same and kills > 0)


def learner_findings(witnessed: WitnessedFleet, policy: ModelOptions) -> Iterator[Finding]:
    options = LearnerOptions(ranks=2, optimizer=OptimizerOptions(learning_rate=1e-3))
    with closing(LearnerGroup(policy, options, seed=0)) as learner:
        learner.wait_until_ready()
        yield from disagreements(witnessed, learner)
        for name in ("advantage", "weight", "old_log_probs"):
            yield bad_number(learner, name)
        yield stopped_rank(learner)


def batch() -> list[TrainingSequence]:
    return [
        TrainingSequence.of_completion([*p.token_ids, 5, 6, 7], len(p.token_ids), 0.02, advantage=1.0) for p in PROMPTS
    ]


def disagreements(witnessed: WitnessedFleet, learner: LearnerGroup) -> Iterator[Finding]:
    gate = AgreementGate(AgreementOptions(), "float32", lambda text: None)

    def finding(fault: str, found: Disagreement) -> Finding:
        seen = f"{found.mean:.1e} nats a token"
        try:
            gate.check(found, "drill")
            return Finding(fault, "AgreementError at the first step", seen + ", let through", False)
        except AgreementError:
            return Finding(fault, "AgreementError at the first step", seen + ", stopped", True)

    learner.sync_weights(witnessed.fleet, version=3)
    right = probe(witnessed.fleet, learner, PROMPTS)
    gate.check(right, "drill")
    yield Finding("none", "sampler and learner agree", f"{right.mean:.1e} nats a token", True)
    yield finding("log-probabilities shifted by 0.2", of_step(witnessed, learner, shift=0.2))
    yield finding("sampled at temperature 0.8, trained at 1", of_step(witnessed, learner, temperature=0.8))
    learner.accumulate(batch(), Objective())
    learner.apply(1e-3)
    yield finding("weights one version old", of_step(witnessed, learner))


def of_step(
    witnessed: WitnessedFleet, learner: LearnerGroup, shift: float = 0.0, temperature: float = 1.0
) -> Disagreement:
    """What a GRPO step finds before its update. The gradient waits in vain: no update is made of it."""
    sampling = SamplingOptions(temperature=temperature, max_new_tokens=16)
    sequences = [
        replace(drawn, sampler_log_probs=np.asarray(drawn.sampler_log_probs) + np.float32(shift))
        for group in witnessed.fleet.sample(PROMPTS, 1, sampling, seed=0, step=0)
        for drawn in [training_sequence(group.trajectories[0], weight=1e-3)]
    ]
    found = Disagreement.of(learner.accumulate(sequences, GRPO))
    learner.apply(0.0)
    return found


def bad_number(learner: LearnerGroup, name: str) -> Finding:
    """One sequence of a batch has a number that is none."""
    first, *others = batch()
    value: Any = math.nan if name != "weight" else math.inf
    if name == "old_log_probs":
        others = [replace(s, old_log_probs=torch.zeros(3).numpy()) for s in others]
        value = torch.full((3,), math.nan).numpy()
    before = learner.weights()
    learner.accumulate([replace(first, **{name: value}), *others], GRPO)
    norm, after = learner.apply(1e-3), learner.weights()
    same = all(torch.equal(before[key], after[key]) for key in before)
    seen = f"norm {norm}, weights {'as before' if same else 'CHANGED'}"
    learner.accumulate(batch(), Objective())
    learner.apply(1e-3)
    return Finding(f"not a number: {name}", "no update, weights unchanged to the byte", seen, same)


def stopped_rank(learner: LearnerGroup) -> Finding:
    learner._options = learner._options.model_copy(update={"step_timeout_s": 10})
    os.kill(learner._processes[1].pid, signal.SIGSTOP)
    try:
        learner.accumulate(batch(), Objective())
        learner.apply(0.0)
        seen, kept = "no error", False
    except LearnerError as error:
        seen, kept = f"LearnerError, {len(error.stacks.splitlines())} lines of stacks", "stopped" in error.stacks
    return Finding("learner rank stopped", "LearnerError after the time-out, with stacks", seen, kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-kills", type=float, default=0, metavar="SECONDS")
    options = parser.parse_args()
    console = Console(width=140 if not sys.stdout.isatty() else None)
    findings = []
    for finding in drill(options.random_kills):
        console.print(f"{'ok    ' if finding.kept else 'BROKEN'} {finding.fault}: {finding.seen}", highlight=False)
        findings.append(finding)
    table = Table("fault", "promise", "seen", "ok")
    for finding in findings:
        table.add_row(finding.fault, finding.promise, finding.seen, "yes" if finding.kept else "NO")
    console.print(table)
    return 0 if all(finding.kept for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
