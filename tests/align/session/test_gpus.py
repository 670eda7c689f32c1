"""Which process sees which GPU, and what becomes of a run that finds none."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray

from align.errors import UserError
from align.evaluate import lm_eval
from align.learner.engine import device_of_rank
from align.learner.group import RankGroup
from align.recipe import LearnerOptions, ModelOptions, load_recipe
from align.recipe.learner import OptimizerOptions
from align.recipe.roles import take
from align.run.machine import check_cuda
from align.session import ray as session_ray
from align.session.checks import check_recipe
from reward import Mixture, RewardTerm, ScoringPool
from rollout import FleetOptions, worker_handle

ROOT = Path(__file__).parents[3]
H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 80 * 2**30, "driver": "535.86"}


def test_an_actor_with_gpus_sees_its_own_and_one_without_sees_none(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Actor:
        def __init__(self, *_: Any) -> None:
            pass

    def seen(actor: Any) -> str:
        environment: str = ray.get(actor.__ray_call__.remote(lambda _: os.environ.get("CUDA_VISIBLE_DEVICES")))
        ray.kill(actor)
        return environment

    count = int(ray.cluster_resources()["GPU"])
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("rollout.processes._HAD_GPUS", set())
    for kind in ("rollout.worker_handle.RolloutWorker", "reward.pool.ScoringWorker", "align.evaluate.lm_eval.Harness"):
        monkeypatch.setattr(kind, Actor)
    learner = LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=1))
    mixture = Mixture([RewardTerm(name="exact_answer")])
    # All of them are alive at once.
    actors = [
        *RankGroup(Actor, ModelOptions(path=""), learner)._ranks,  # type: ignore[arg-type]
        worker_handle.new_actor(FleetOptions(tensor_parallel=2), None, 0).handle,
        *ScoringPool(mixture, workers=1, timeout_s=1, gpus=1)._workers,
        lm_eval.start_harness(count - 4, unsafe_code=False),
    ]
    without = [
        *ScoringPool(mixture, workers=1, timeout_s=1)._workers,
        lm_eval.start_harness(0, unsafe_code=False),
    ]
    assert [seen(actor) for actor in without] == ["", ""]
    own = [gpus.split(",") for gpus in map(seen, actors)]
    assert [len(gpus) for gpus in own] == [1, 2, 1, count - 4]
    assert sorted(int(gpu) for gpus in own for gpu in gpus) == list(range(count))


def test_a_rank_does_not_train_on_a_cpu_beside_the_gpu_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_of_rank().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"cannot use the GPU of .* Update it"):
        device_of_rank()


@pytest.mark.parametrize(
    ("built_for", "gpus", "expected"),
    [
        ("13.0", [H100], r"CUDA 13\.0 .* H100 80GB HBM3, driver 535\.86.*Update the driver"),
        ("13.0", [], "there is no GPU"),
    ],
)
def test_a_torch_for_cuda_that_can_use_no_gpu_ends_the_run(built_for: str, gpus: list[Any], expected: str) -> None:
    with pytest.raises(UserError, match=rf"{expected}.*export ACCELERATOR=cpu"):
        check_cuda(built_for, gpus, hidden=False)
    assert check_cuda(built_for, gpus, hidden=True) is None


def test_a_torch_for_cpus_is_used_as_such_and_a_gpu_beside_it_is_told() -> None:
    assert check_cuda(None, [], hidden=False) is None
    assert "make clean setup ACCELERATOR=cuda" in (check_cuda(None, [H100], hidden=False) or "")


@pytest.mark.parametrize(("visible", "refused"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_a_run_stops_before_ray_starts_unless_gpus_are_hidden_on_purpose(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, refused: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(session_ray, "gpu_records", lambda: [H100])

    def start(store: int) -> None:
        raise RuntimeError("Ray starts")

    monkeypatch.setattr(session_ray, "start_node", start)
    monkeypatch.setattr(session_ray, "watched", nullcontext)
    error, told = (UserError, "the driver") if refused else (RuntimeError, "Ray starts")
    with pytest.raises(error, match=told), session_ray.local_ray():
        pass


def test_a_node_that_lacks_what_is_wanted_keeps_what_it_has() -> None:
    free = [1.0, 1.0]
    assert not take(free, 4)
    assert take(free, 0.5)
    assert take(free, 0.5)
    assert take(free, 1)
    assert (free, take(free, 0.1)) == ([0.0, 0.0], False)


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        ([], 0, None),
        ([], 4, None),
        ([], 3, "takes 4 GPUs, and this machine has 3: share them .*, colocate=true learner.ranks=3 rollout.workers=3"),
        (["colocate=true"], 2, None),
        (["scoring.gpus=1"], 3, "takes 5 GPUs.*colocate=true learner.ranks=2 rollout.workers=2"),
        (["colocate=true", "scoring.gpus=1"], 2, r"takes 3 GPUs, and this machine has 2: lower learner\.ranks"),
        (
            ["learner.ranks=3", "learner.gpus=0.8", "rollout.workers=3", "rollout.gpus=0.2"],
            3,
            "parts of GPUs that do not fit on the 3",
        ),
        (["learner.ranks=1", "learner.gpus=0.6", "rollout.workers=1", "rollout.gpus=0.4"], 1, None),
        (["rollout.tensor_parallel=2"], 5, "takes 6 GPUs"),
        (["rollout.resources={fast: 1}"], 8, r"rollout\.resources: fast can only be of the nodes of a cluster"),
    ],
)
def test_what_this_machine_lacks_is_told_before_ray_would_wait_for_it(
    overrides: list[str], gpus: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(ROOT / "recipes/nano/grpo.yaml", overrides)
    monkeypatch.setenv("RAY_ADDRESS", "")  # as good as none
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_recipe(recipe)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check_recipe(recipe)
