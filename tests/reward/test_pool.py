"""Scoring in Ray workers: the same rewards as in this process, whatever becomes of a worker."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from reward import (
    InfrastructureError,
    Mixture,
    RewardContractError,
    RewardError,
    RewardTerm,
    Sample,
    SampleReward,
    Score,
    ScoringPool,
    Verdict,
    register,
)
from reward.pool import recent_batches

pytestmark = pytest.mark.usefixtures("own_rewards", "ray_session")


@pytest.fixture(autouse=True, scope="module")
def _functions_of_this_file_travel_whole() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def batches(count: int, size: int = 2) -> list[list[Sample]]:
    return [
        [
            Sample(id=f"{batch}#{place}", prompt="?", completion=rf"\boxed{{{place}}}", ground_truth="1")
            for place in range(size)
        ]
        for batch in range(count)
    ]


def scored(
    mixture: Mixture, samples: list[list[Sample]], *, workers: int = 1, timeout_s: float = 60
) -> list[list[SampleReward]]:
    pool = ScoringPool(mixture, workers=workers, timeout_s=timeout_s)
    try:
        pool.wait_until_ready()
        return pool.gather([pool.submit(batch) for batch in samples])
    finally:
        pool.close()


def verdicts(rewards: list[list[SampleReward]]) -> list[list[Verdict]]:
    return [[reward.verdict for reward in batch] for batch in rewards]


def deadly(file: Path, deaths: int) -> Callable[[Sample], Score]:
    """Kills the process that judges sample 1#0, so many times."""

    def judge(sample: Sample) -> Score:
        died = len(file.read_text()) if file.exists() else 0
        if sample.id == "1#0" and died < deaths:
            file.write_text("x" * (died + 1))
            time.sleep(0.5)  # what was judged before is on its way
            os._exit(1)
        return Score(1.0, Verdict.PASS)

    return judge


def test_the_rewards_are_those_of_the_mixture_in_the_order_of_the_batches() -> None:
    mixture = Mixture([RewardTerm(name="exact_answer"), RewardTerm(name="answer_format", weight=0.1)])
    samples = batches(5, size=3)
    here = [[reward.value for reward in mixture.score(batch)] for batch in samples]
    there = [[reward.value for reward in batch] for batch in scored(mixture, samples, workers=2)]
    assert there == here


def test_a_batch_whose_worker_died_is_judged_by_the_next(tmp_path: Path) -> None:
    register("deadly")(deadly(tmp_path / "deaths", 1))
    rewards = scored(Mixture([RewardTerm(name="deadly")]), batches(4))
    assert verdicts(rewards) == [[Verdict.PASS] * 2] * 4


def test_a_batch_that_killed_two_workers_is_masked_and_no_other_and_the_limit_is_for_all_batches_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("deadly")(deadly(tmp_path / "deaths", 2))
    refuse, found = Mixture.refuse_too_many_masked, list[SampleReward]()

    def seen(mixture: Mixture, samples: Sequence[Sample], rewards: Sequence[SampleReward], *earlier: Any) -> None:
        found.extend(rewards)
        refuse(mixture, samples, rewards, *earlier)

    monkeypatch.setattr(Mixture, "refuse_too_many_masked", seen)
    with pytest.raises(InfrastructureError, match=r"25.0% of the samples.*limit is 0.5%.*died, twice"):
        scored(Mixture([RewardTerm(name="deadly")], infra_error_limit=0.005), batches(4))
    assert [reward.verdict for reward in found] == [Verdict.PASS] * 2 + [Verdict.INFRA_ERROR] * 2 + [Verdict.PASS] * 4
    assert [reward.value for reward in found[2:4]] == [None, None]


def test_an_evaluation_is_judged_by_its_own_answers() -> None:
    register("lenient")(lambda sample: Score(1.0, Verdict.INFRA_ERROR if "bad" in sample.id else Verdict.PASS))
    mixture = Mixture([RewardTerm(name="lenient")])
    pool = ScoringPool(mixture, workers=1, timeout_s=60)
    good, bad = (
        [Sample(id=f"{name} {n}", prompt="?", completion="", ground_truth=None) for n in range(8)]
        for name in ("good", "bad")
    )
    try:
        pool.gather([pool.submit(good) for _ in range(64)])
        pool.gather([pool.submit(bad)])
        with pytest.raises(InfrastructureError, match=r"100.0% of the samples"):
            pool.gather([pool.submit(bad), pool.submit(bad)], alone=True)
        pool.gather([pool.submit(bad)])
        pool.gather([*(pool.submit(good) for _ in range(15)), pool.submit(bad)], alone=True)
    finally:
        pool.close()


def test_so_many_batches_are_remembered_that_a_single_one_is_a_small_share() -> None:
    one, eight = [SampleReward(1.0, Verdict.PASS, {})], [SampleReward(1.0, Verdict.PASS, {})] * 8
    assert len(recent_batches([eight] * 60, [eight] * 8)) == 64
    assert len(recent_batches([one] * 60, [one] * 8)) == 68
    assert len(recent_batches([one] * 300, [one] * 8)) == 256
    assert len(recent_batches([eight] * 100, [eight] * 8, 100)) == 100, (
        "a step's further groups are counted with the step"
    )


def test_what_only_measures_masks_nothing_when_its_workers_die(tmp_path: Path) -> None:
    register("deadly")(deadly(tmp_path / "deaths", 2))
    rewards = scored(Mixture([RewardTerm(name="deadly", weight=0.0)]), batches(2))
    assert [reward.value for batch in rewards for reward in batch] == [0.0] * 4


def test_a_worker_whose_answers_take_long_to_fetch_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    get = ray.get

    def slow(references: Any, *, timeout: float | None = None) -> Any:
        if timeout is not None and timeout < 10:
            raise ray.exceptions.GetTimeoutError("a busy machine")
        return get(references, timeout=timeout)

    pool = ScoringPool(Mixture([RewardTerm(name="exact_answer")]), workers=1, timeout_s=60)
    workers = list(pool._workers)
    try:
        monkeypatch.setattr(ray, "get", slow)
        rewards = pool.gather([pool.submit(batch) for batch in batches(3)])
        assert pool._workers == workers
    finally:
        pool.close()
    assert verdicts(rewards) == [[Verdict.WRONG, Verdict.PASS]] * 3


def sleeps(sample: Sample) -> Score:
    time.sleep(3600 if sample.id.startswith("1#") else 0)
    return Score(1.0, Verdict.PASS)


def test_a_reward_that_hangs_is_an_error_with_the_ids_of_the_samples() -> None:
    register("sleeps")(sleeps)
    with pytest.raises(
        RewardContractError, match=r"'sleeps' on sample '1#0 … 1#1': none of them was judged within 3 s"
    ):
        scored(Mixture([RewardTerm(name="sleeps")]), batches(2), timeout_s=3)


def raises(sample: Sample) -> Score:
    raise KeyError("lost")


def test_a_reward_that_raises_is_named_with_the_sample() -> None:
    register("raises")(raises)
    with pytest.raises(RewardContractError, match=r"'raises' on sample '0#0': raised KeyError") as raised:
        scored(Mixture([RewardTerm(name="raises")]), batches(2))
    assert type(raised.value) is RewardContractError


def test_a_reward_that_cannot_run_here_says_so_before_the_first_sample() -> None:
    mixture = Mixture([RewardTerm(name="code_tests", params={"executor": "nowhere:executor"})])
    with pytest.raises(RewardError, match=r"executor 'nowhere:executor' must be"):
        scored(mixture, [])


def test_a_function_in_a_file_that_hangs_or_dies_costs_its_sample_and_no_worker(tmp_path: Path) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "import os, time\n"
        "def mine(sample):\n"
        "    if sample.id == '0#1': time.sleep(60)\n"
        "    if sample.id == '1#0': os._exit(1)\n"
        "    return float(os.getppid())\n"
    )
    mixture = Mixture([RewardTerm(name=f"{file}:mine", timeout_s=1)], infra_error_limit=0.5)
    rewards = [reward for batch in scored(mixture, batches(3)) for reward in batch]
    assert [reward.value is None for reward in rewards] == [False, True, True, False, False, False]
    assert len({reward.value for reward in rewards} - {None}) == 1, "the worker is the same one for all of them"
