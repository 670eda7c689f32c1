"""What goes wrong in silence is told once, with the samples that show it."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from align.data.types import Example
from align.errors import AlarmError, NonFiniteError
from align.experience import Problem, ScoredGroup, ScoredTrajectory
from align.habits import Answer, Found
from align.recipe import AlarmOptions, GrpoOptions, GuardOptions
from align.run import MetricsLog, Progress, RunDirectory
from align.run.checkpoints import CheckpointDirectory
from align.session.run import Run
from align.session.signals import StopRequest
from align.stages.advantages import compare
from align.stages.guards import Alarms, HabitGuard, NonFiniteGuard, OverOptimisationGuard, SeenSample, no_history
from reward import SampleReward, Score, Verdict
from rollout import FinishReason, Prompt, Trajectory

FINE = {"entropy": 1.0, "zero_variance_groups": 0.2, "reward": 0.5, "reward_std": 0.4, "experts/layer_1/dead": 0.0}
FINE |= {"experts/layer_1/max_over_mean": 1.8, "experts/layer_2/max_over_mean": 3.2}
PROBLEM = Problem(Example("p", ({"role": "user", "content": "?"},), None, None, "math"), Prompt("p", [1]))
SAMPLES = [SeenSample("a#0", 0.0, -1.0, False), SeenSample("a#1", 1.0, -0.1, False), SeenSample("b#0", 1.0, -0.5, True)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    directory = RunDirectory.create(tmp_path / "run")
    with Progress(log=directory.log_file) as progress:
        yield Run(
            directory,
            MetricsLog(directory),
            CheckpointDirectory(directory.checkpoints_directory),
            progress,
            StopRequest(),
        )


def told(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.directory.events_file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("change", "kind", "samples"),
    [
        ({"entropy": 0.05}, "entropy", ["a#1", "b#0", "a#0"]),
        ({"zero_variance_groups": 1.0}, "variance", ["b#0"]),
        ({"reward": 1.0}, "reward", ["a#1", "b#0", "a#0"]),
        ({"reward": 0.0}, "reward", ["a#0", "a#1", "b#0"]),
        ({"experts/layer_1/dead": 0.75}, "experts", []),
        ({"experts/layer_1/max_over_mean": 3.1}, "collapse", []),
    ],
)
def test_an_alarm_is_told_when_it_begins(run: Run, change: dict[str, float], kind: str, samples: Sequence[str]) -> None:
    history = no_history()
    alarms = Alarms(AlarmOptions(), run.warn, history)
    for step in range(1, 11):
        alarms.observe(step, FINE, SAMPLES)
    assert told(run) == []
    alarms.observe(11, FINE | change, SAMPLES)
    # As after an interruption: what the alarms remember comes out of a checkpoint.
    resumed = Alarms(AlarmOptions(), run.warn, json.loads(json.dumps(history)))
    resumed.observe(12, FINE | change, SAMPLES)
    [event] = told(run)
    assert (event["alarm"], event["samples"]) == (kind, samples)
    assert "GRPO step 11" in event["message"]


@pytest.mark.parametrize(
    ("usual", "then"),
    [(0.0, [1 / 64, 5 / 64]), (1.0, [63 / 64, 60 / 64]), (0.1, [float(np.mean([0.1] * 81)), (9.5 + 1.1) / 96])],
)
def test_the_first_successes_of_a_sparse_reward_are_no_jump_and_another_constant_is(
    run: Run, usual: float, then: Sequence[float]
) -> None:
    alarms = Alarms(AlarmOptions(), run.warn, no_history())
    for step in range(1, 11):
        alarms.observe(step, FINE | {"reward": usual, "reward_std": float(np.std([usual] * 82))}, SAMPLES)
    for step, reward in enumerate(then, 11):
        share = abs(reward - usual)
        alarms.observe(step, FINE | {"reward": reward, "reward_std": math.sqrt(share * (1 - share))}, SAMPLES)
    assert told(run) == []
    alarms = Alarms(AlarmOptions(), run.warn, no_history())
    for step in range(1, 12):
        reward = usual if step < 11 else 0.5
        alarms.observe(step, FINE | {"reward": reward, "reward_std": float(np.std([reward] * 82))}, SAMPLES)
    assert [event["alarm"] for event in told(run)] == ["reward"]


@pytest.mark.parametrize("change", [{"experts/layer_1/max_over_mean": 2.9}, {"experts/layer_2/max_over_mean": 4.5}])
def test_a_load_that_is_not_large_or_was_about_as_large_at_first_is_no_collapse(
    run: Run, change: dict[str, float]
) -> None:
    alarms = Alarms(AlarmOptions(), run.warn, no_history())
    for step in range(1, 12):
        alarms.observe(step, FINE | (change if step == 11 else {}), SAMPLES)
    assert told(run) == []


def test_a_run_that_an_earlier_version_began_goes_on_without_loads_of_its_first_steps(run: Run) -> None:
    alarms = Alarms(AlarmOptions(), run.warn, {"entropies": [1.0] * 5, "rewards": [(0.5, 0.4)] * 5, "on": []})
    alarms.observe(11, FINE | {"experts/layer_1/max_over_mean": 3.1}, SAMPLES)
    assert told(run) == []


def answer(index: int, log_prob: float = -1.0, reward: float | None = 1.0) -> ScoredTrajectory:
    drawn = Trajectory.of_one_turn(PROBLEM.prompt, index, [5, 6], [-1.0, log_prob], FinishReason.STOP)
    return ScoredTrajectory(drawn, "", SampleReward(reward, Verdict.PASS, {}))


def test_a_sample_with_a_number_that_is_not_finite_is_named_and_left_out_of_its_group() -> None:
    answers = [answer(0), answer(1, log_prob=math.nan), answer(2, reward=math.inf), answer(3), answer(4, reward=None)]
    found = compare([ScoredGroup(PROBLEM, answers)], GrpoOptions(steps=1, prompts_per_step=1, group_size=5))
    assert found.non_finite == {"p#1": "log-probability", "p#2": "reward"}
    assert found.valid.tolist() == [[True, False, False, True, False]]
    assert found.kept.tolist() == found.valid.tolist()


def test_samples_with_such_numbers_in_too_many_steps_in_a_row_end_the_run(run: Run) -> None:
    state: dict[str, Any] = {}
    steps = NonFiniteGuard(2, run.warn, state)
    steps.observe(1, {"p#1": "reward"})
    steps.observe(2, {})
    steps.observe(3, {"p#1": "reward"})
    steps = NonFiniteGuard(2, run.warn, json.loads(json.dumps(state)))
    with pytest.raises(NonFiniteError, match=r"2 steps in a row.*reward of p#1"):
        steps.observe(4, {"p#1": "reward"})
    assert [event["samples"] for event in told(run)] == [["p#1"]] * 3


def test_an_update_that_was_left_out_is_told_and_counted(run: Run) -> None:
    run.progress.stage("GRPO", 4)
    run.record_step("grpo", 3, {"gradient_norm": math.nan}, ())
    run.record_step("grpo", 4, {"gradient_norm": 1.0}, ())
    counts = [json.loads(line)["skipped_update"] for line in run.directory.metrics_file.read_text().splitlines()]
    assert counts == [1.0, 0.0]
    assert "grpo step 3" in told(run)[0]["message"]


STEPS = 12


def scored(components: dict[str, Score]) -> ScoredTrajectory:
    return replace(answer(0), reward=SampleReward(0.0, Verdict.PASS, components))


def alarms(learned_slope: float, trusted_slope: float, *, noise: float = 1.0, size: int = 1) -> list[int]:
    """The steps at which it goes off while both rewards drift by their slopes a step; the `size` answers to a prompt are alike."""
    guard = OverOptimisationGuard(GuardOptions(learned="model", trusted="rule", window=3), [])
    draw = Random(0)

    def score(mean: float) -> Score:
        return Score(mean + draw.gauss(0, noise), Verdict.PASS)

    found = []
    for step in range(STEPS):
        groups = []
        for _ in range(64):
            components = {"model": score(step * learned_slope), "rule": score(step * trusted_slope)}
            groups.append(ScoredGroup(PROBLEM, [scored(components)] * size))
        if guard.observe(groups):
            found.append(step)
    return found


def test_over_optimisation_is_told_when_the_rewards_part_and_then_looks_anew() -> None:
    assert alarms(0.5, -0.5) == [5, 11]


@pytest.mark.parametrize("slopes", [(0.5, 0.5), (-0.5, -0.5), (-0.5, 0.5), (0.5, 0.0), (0.0, -0.5), (0.0, 0.0)])
def test_over_optimisation_is_not_told_when_they_do_not(slopes: tuple[float, float]) -> None:
    assert alarms(*slopes) == []


def test_rewards_that_cannot_be_compared_are_no_alarm() -> None:
    guard = OverOptimisationGuard(GuardOptions(learned="model", trusted="rule", window=2), [])
    broken = scored({"model": Score(1.0, Verdict.PASS), "rule": Score(math.nan, Verdict.INFRA_ERROR)})
    other_domain = scored({"code_tests": Score(1.0, Verdict.PASS)})
    groups = [ScoredGroup(PROBLEM, [one]) for one in (broken, other_domain)]
    assert [guard.observe(groups) for _ in range(6)] == [None] * 6


def test_many_answers_to_a_prompt_are_no_more_evidence_than_one_where_they_are_alike() -> None:
    slopes = 0.02, -0.02
    assert alarms(*slopes, size=16) == alarms(*slopes) == []


def opened_by(word: str, length: int, step: int) -> Found:
    """Sixteen answers to prompts of their own."""
    texts = [f"{word}Number {n}" + " it is" * length for n in range(16 * step, 16 * step + 16)]
    return Found.of([Answer(f"{text}.", f"prompt {step} {place}") for place, text in enumerate(texts)])


def test_a_habit_that_the_start_did_not_have_is_told_once_and_after_an_interruption_not_again(run: Run) -> None:
    samples = {step: opened_by("Sure! " if step > 4 else "", 5, step) for step in range(1, 10)}
    names: list[str] = []
    guard = HabitGuard(AlarmOptions(), samples.__getitem__, run.warn, names)
    for step in range(1, 8):
        guard.observe(step)
    resumed = HabitGuard(AlarmOptions(), samples.__getitem__, run.warn, json.loads(json.dumps(names)))
    for step in (8, 9):
        resumed.observe(step)
    [event] = told(run)
    assert event["alarm"] == "habit"
    assert "answers begin with “Sure!" in event["message"]
    assert event["examples"][0].startswith("Sure! Number")


@pytest.mark.parametrize(("share", "alarms"), [(0.9, 0), (0.5, 1)])
def test_a_habit_below_its_share_is_no_alarm_and_one_above_ends_the_run_where_the_recipe_says_so(
    run: Run, share: float, alarms: int
) -> None:
    """Two thirds of the last steps have it."""
    samples = {step: opened_by("" if step in (1, 2, 4) else "Sure! ", 5, step) for step in range(1, 6)}
    guard = HabitGuard(AlarmOptions(habit_share=share, stop=["habit"]), samples.__getitem__, run.warn, [])
    if alarms:
        with pytest.raises(AlarmError, match=r"Sure!.*alarms.stop names habit"):
            guard.observe(5)
    else:
        guard.observe(5)
    assert [event["alarm"] for event in told(run)] == ["habit"] * alarms


def test_a_length_that_is_another_is_told(run: Run) -> None:
    samples = {step: opened_by("", 20 + step % 3 if step < 3 else 5 + step % 3, step) for step in range(1, 7)}
    guard = HabitGuard(AlarmOptions(), samples.__getitem__, run.warn, [])
    for step in range(1, 7):
        guard.observe(step)
    assert "length" in [event["alarm"] for event in told(run)]
    assert any("words on average" in event["message"] for event in told(run))


def test_an_alarm_that_the_recipe_names_ends_the_run(run: Run) -> None:
    alarms = Alarms(AlarmOptions(stop=["variance"]), run.warn, no_history())
    with pytest.raises(AlarmError, match="all rewards are equal"):
        alarms.observe(1, FINE | {"zero_variance_groups": 1.0}, SAMPLES)
    assert [event["alarm"] for event in told(run)] == ["variance"]
