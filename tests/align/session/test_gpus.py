"""Which process sees which GPU, and what becomes of a run that finds none."""

import json
import subprocess
import sys
from typing import Any

import pytest

from align.errors import UserError
from align.learner.rank import device_of_rank
from align.run.machine import check_cuda
from align.session import ray as session_ray

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 80 * 2**30, "driver": "535.86"}

GPUS = 5
ACTORS = f"""
import json
import ray, torch
from align.evaluate import lm_eval
from align.learner.group import RankGroup
from align.recipe import LearnerOptions, ModelOptions
from reward import pool
from rollout import worker_handle
from rollout.types import FleetOptions

class Actor:
    def __init__(self, *_): pass

def seen(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: __import__("os").environ.get("CUDA_VISIBLE_DEVICES")))

torch.backends.cuda.is_built = lambda: True
worker_handle.RolloutWorker = pool.ScoringWorker = lm_eval.Harness = Actor
ray.init(num_cpus=1, num_gpus={GPUS}, include_dashboard=False, object_store_memory=10**8, logging_level="ERROR")

# All of them are alive at once.
group = RankGroup(Actor, ModelOptions(path="m"), LearnerOptions(ranks=1, optimizer=dict(learning_rate=1.0)))
worker = worker_handle.new_actor(FleetOptions(tensor_parallel=2), None, 0)
pools = [pool.ScoringPool(None, workers=1, timeout_s=1, gpus=gpus) for gpus in (0, 1)]
harnesses = [lm_eval.start_harness(gpus, unsafe_code=False) for gpus in (0, 1)]
print(json.dumps(dict(
    ranks=[seen(rank) for rank in group._ranks],
    worker=seen(worker.handle),
    scoring=[seen(one._workers[0]) for one in pools],
    harness=[seen(one) for one in harnesses],
)))
"""


def test_an_actor_with_gpus_sees_its_own_and_one_without_sees_none() -> None:
    done = subprocess.run([sys.executable, "-c", ACTORS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["scoring"][0] == found["harness"][0] == ""
    own = [*found["ranks"], *found["worker"].split(","), found["scoring"][1], found["harness"][1]]
    assert sorted(own) == [str(gpu) for gpu in range(GPUS)]


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
        ("13.0", [], "finds no GPU"),
    ],
)
def test_a_torch_for_cuda_that_can_use_no_gpu_ends_the_run(built_for: str, gpus: list[Any], expected: str) -> None:
    with pytest.raises(UserError, match=rf"{expected}.*CUDA_VISIBLE_DEVICES= in front"):
        check_cuda(built_for, gpus, hidden=False)
    assert check_cuda(built_for, gpus, hidden=True) is None


def test_a_torch_for_cpus_is_used_as_such_and_a_gpu_beside_it_is_told() -> None:
    assert check_cuda(None, [], hidden=False) is None
    assert "make setup ACCELERATOR=cuda" in (check_cuda(None, [H100], hidden=False) or "")


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
    error, told = (UserError, "the driver") if refused else (RuntimeError, "Ray starts")
    with pytest.raises(error, match=told), session_ray.local_ray():
        pass
