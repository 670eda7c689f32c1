"""A run that was killed, stopped or has lost a process goes on, and ends as the one that nobody disturbed, to the last bit."""

import json
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from align.model.policy import write_random_policy
from align.recipe import ModelOptions, load_recipe

Lines = Callable[[Path], list[dict[str, Any]]]
SAVE_EVERY = 2
LEARNER = "learner={ranks: 2, zero_stage: 1, optimizer: {learning_rate: 1.0e-3}}"
ROLLOUT = "rollout={workers: 1, max_length: 64, kv_cache_gb: 0.25, batch_sequences: 32}"
EVALUATION = "evaluation={limit: 8, samples: 2, max_new_tokens: 16}"
POLICY = [LEARNER, ROLLOUT, EVALUATION, "machine={}", f"save_every={SAVE_EVERY}", "run.grace_s=120"]
SFT_STEPS, GRPO_STEPS, PAIR_STEPS = 8, 6, 8
SFT = [*POLICY, f"sft={{steps: {SFT_STEPS}, sequences_per_step: 8, validation_limit: 8, validate_every: 3}}"]
GRPO = [
    *POLICY,
    "sampling={max_new_tokens: 16}",
    f"grpo={{steps: {GRPO_STEPS}, prompts_per_step: 4, group_size: 4, kl_coefficient: 0.04, updates_per_step: 2, "
    "refill_rounds: 1, correction: {kind: icepop}}",
    # Of the answers of a policy with random weights some are longer, in some groups none.
    "rewards=[{name: soft_overlong, params: {max_length: 61, cache: 1, unit: characters}}]",
]
PAIRS = [
    "data={card: nano_helpful}",
    "model={path: recipes/nano/policy, init: random}",
    "init_from=null",
    LEARNER,
    "machine={}",
    f"save_every={SAVE_EVERY}",
    f"reward_model={{steps: {PAIR_STEPS}, pairs_per_step: 8, validate_every: 3, validation_limit: 8, test_limit: 16}}",
]
DPO = [
    *PAIRS[:5],
    "rollout={workers: 1, max_length: 160, kv_cache_gb: 0.25}",
    "evaluation={cards: [nano_chat], limit: 4, samples: 0, max_new_tokens: 8}",
    f"save_every={SAVE_EVERY}",
    f"dpo={{steps: {PAIR_STEPS}, pairs_per_step: 8, validate_every: 3, validation_limit: 8}}",
]
COMMANDS = {
    "sft": ["sft", "recipes/nano/sft.yaml", *SFT],
    "grpo": ["grpo", "recipes/nano/grpo.yaml", "init_from=null", *GRPO],
    "reward_model": ["reward-model", "recipes/nano/reward_model.yaml", *PAIRS],
    "dpo": ["dpo", "recipes/nano/dpo.yaml", *DPO],
}
# Routing replay, a correction, refill, rounded weights and a teacher beside the reward.
REMEDIES = [*COMMANDS["grpo"], "grpo.routing_replay=sampler", "weights.precision=int8", "grpo.steps=4"]
REMEDIES += ["learner.ranks=1", "rollout.batch_sequences=8", "evaluation.before=false"]
STEPS = {"sft": SFT_STEPS, "grpo": GRPO_STEPS, "reward_model": PAIR_STEPS, "dpo": PAIR_STEPS}
TIMES = ("time", "seconds", "per_second")


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without what a clock says."""
    return [{key: value for key, value in line.items() if not any(t in key for t in TIMES)} for line in lines]


def state(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text())["state"])


def assert_same(one: Path, other: Path, read_lines: Lines) -> None:
    """Weights, optimizer, samples, metrics and evaluations of two runs."""
    assert state(one) == state(other) == "finished"
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert numbers(read_lines(one / name)) == numbers(read_lines(other / name))
    assert_same_files(one, other)


def assert_same_files(one: Path, other: Path) -> None:
    """Weights, optimizer and samples of two runs."""
    patterns = ("final/*", "checkpoints/*/*.pt", "samples/*")
    # How to call a reward model names its directory.
    files, others = (
        {str(f.relative_to(run)) for p in patterns for f in run.glob(p) if f.name != "README.md"}
        for run in (one, other)
    )
    assert files == others
    for name in files:
        if name.endswith(".parquet"):
            assert pq.read_table(one / name).equals(pq.read_table(other / name)), name
        elif (one / name).is_file():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def steps_done(run: Path, stage: str, read_lines: Lines) -> int:
    return max((r["step"] for r in read_lines(run / "metrics.jsonl") if r["stage"] == stage and "loss" in r), default=0)


def living(family: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are still there after so many seconds; a process that only waits to be collected is not."""
    end = time.monotonic() + seconds
    while left := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return left


def killed_at(
    step: int, stage: str, run: Path, align: Callable[..., Any], read_lines: Lines, command_line: Sequence[str] = ()
) -> None:
    """A run whose driver is killed when it has made so many steps, maybe in the middle of the next; no process of it stays."""
    command = align(*(command_line or COMMANDS[stage]), f"run.dir={run}")
    of_stage = run / "sft" if command_line and stage == "sft" else run
    command.until(lambda: steps_done(of_stage, stage, read_lines) >= step)
    family = command.family()
    command.process.kill()
    command.process.wait()
    assert living(family, 30) == []
    assert state(run) == "running"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The undisturbed run of a stage, made once."""
    made: dict[str, Path] = {}

    def of(stage: str, align: Callable[..., Any]) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("whole") / stage
            align(*COMMANDS[stage], f"run.dir={made[stage]}").ends(0)
        return made[stage]

    return of


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", COMMANDS)
def test_killed_at_five_places_it_ends_as_the_undisturbed_run(
    stage: str, whole: Any, align: Any, read_lines: Lines, tmp_path: Path
) -> None:
    expected = whole(stage, align)
    for number, step in enumerate(random.sample(range(1, STEPS[stage]), 5)):
        run = tmp_path / f"{stage}_{number}"
        killed_at(step, stage, run, align, read_lines)
        output = align(*COMMANDS[stage], f"run.dir={run}").ends(0)
        resumed = re.search(r"(?:resuming from|begins at) step (\d+)", output)
        assert resumed, output
        assert int(resumed[1]) >= step - SAVE_EVERY, output
        assert_same(expected, run, read_lines)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", COMMANDS)
def test_a_finished_run_made_longer_ends_as_one_that_was_as_long_from_the_start(
    stage: str, align: Any, read_lines: Lines, tmp_path: Path
) -> None:
    key, constant = f"{stage}.steps", "learner.optimizer.schedule=constant"
    whole, run = tmp_path / "whole", tmp_path / "run"
    align(*COMMANDS[stage], constant, f"run.dir={whole}").ends(0)
    align(*COMMANDS[stage], constant, f"run.dir={run}", f"{key}=4").ends(0)
    earlier = read_lines(run / "metrics.jsonl")
    output = align("resume", str(run), f"{key}={STEPS[stage]}").ends(0)
    assert "resuming from step 4" in output
    assert f"the run now has {STEPS[stage]} steps in place of 4" in output
    assert read_lines(run / "metrics.jsonl")[: len(earlier)] == earlier
    assert_same_files(whole, run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_with_sft_before_grpo_goes_on_in_the_stage_where_it_was(
    align: Any, read_lines: Lines, tmp_path: Path
) -> None:
    first = tmp_path / "sft.yaml"
    sft = load_recipe(Path("recipes/nano/sft.yaml"), SFT)
    first.write_text(yaml.safe_dump(sft.model_dump(mode="json", exclude_unset=True)))
    both = ["grpo", "recipes/nano/grpo.yaml", f"init_from={first}", *GRPO]
    whole, run = tmp_path / "whole", tmp_path / "run"
    align(*both, f"run.dir={whole}").ends(0)
    killed_at(5, "sft", run, align, read_lines, both)
    killed_at(3, "grpo", run, align, read_lines, both)
    assert "SFT: done before" in align(*both, f"run.dir={run}").ends(0)
    assert_same(whole / "sft", run / "sft", read_lines)
    assert_same(whole, run, read_lines)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_sigterm_lets_the_step_end_writes_a_checkpoint_and_exits_with_75(
    stage: str, whole: Any, align: Any, read_lines: Lines, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = align(*COMMANDS[stage], f"run.dir={run}", "save_every=null")
    command.until(lambda: steps_done(run, stage, read_lines) >= 3)
    family = command.family()
    command.process.send_signal(signal.SIGTERM)
    assert "interrupted: everything was stopped" in command.ends(75)
    assert state(run) == "interrupted"
    done = steps_done(run, stage, read_lines)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{done:05d}"]
    assert living(family, 20) == []
    output = align("resume", str(run), "save_every=2").ends(0)
    assert f"resuming from step {done}" in output
    assert_same(whole(stage, align), run, read_lines)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("head", ["gcs_server", "raylet"])
def test_without_ray_the_run_ends_at_once_and_goes_on_when_it_is_resumed(
    head: str, whole: Any, align: Any, read_lines: Lines, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = align(*COMMANDS["grpo"], f"run.dir={run}")
    command.until(lambda: steps_done(run, "grpo", read_lines) >= 3)
    family = command.family()
    next(process for process in family if process.name() == head).kill()
    killed = time.monotonic()
    assert f"stopped: Ray itself died: its process {head} ended" in command.ends(1)
    assert living(family, killed + 30 - time.monotonic()) == []
    assert "resuming from step 2" in align("resume", str(run)).ends(0)
    assert_same(whole("grpo", align), run, read_lines)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_learner_that_is_killed_is_started_again_and_the_end_is_the_same(
    stage: str, whole: Any, align: Any, read_lines: Lines, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = align(*COMMANDS[stage], f"run.dir={run}")
    command.until(lambda: steps_done(run, stage, read_lines) >= 3)
    learners = [process for process in command.family() if "PolicyRank" in "".join(process.cmdline())]
    assert len(learners) == 2
    learners[1].kill()
    output = command.ends(0)
    assert "the learners were started again (1 of 3 times from this checkpoint)" in output
    assert "resuming from step" in output
    assert_same(whole(stage, align), run, read_lines)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_with_all_remedies_a_worker_dead_of_two_and_killed_it_ends_as_undisturbed_with_one(
    align: Any, read_lines: Lines, tmp_path: Path
) -> None:
    whole, run, teacher = (tmp_path / name for name in ("whole", "run", "teacher"))
    write_random_policy(ModelOptions(path="recipes/nano/policy", init="random"), teacher, seed=1)
    remedies = [*REMEDIES, f"grpo.distill={{teacher: {teacher}}}"]
    align(*remedies, f"run.dir={whole}").ends(0)

    line = [*remedies, "rollout.workers=2", f"run.dir={run}"]
    command = align(*line)
    command.until(lambda: steps_done(run, "grpo", read_lines) >= 1)
    next(process for process in command.family() if "RolloutWorker" in "".join(process.cmdline())).kill()
    command.until(lambda: steps_done(run, "grpo", read_lines) >= 3)
    family = command.family()
    command.process.kill()
    command.process.wait()
    assert living(family, 30) == []
    assert "resuming from step 2" in align(*line).ends(0)

    assert_same(whole, run, read_lines)
    steps = [step for step in read_lines(whole / "metrics.jsonl") if "loss" in step]
    for name in ("reward_std", "refill/replaced", "routing/changed", "sync/mean", "distill/kl"):
        assert max(step[name] for step in steps) > 0, f"{name}: without it nothing is proved of it"
    assert min(step["correction/effective_sample_size"] for step in steps) < 1
