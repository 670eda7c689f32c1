"""How long a process that loads a model may take, and whether the processes of a run are on GPUs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rollout import processes
from rollout.processes import UNSEEN_BYTES, start_limit_s

GB = 10**9


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory with 31 GB of weights, of which the disk has none."""
    for file, size in (("model-1.safetensors", 20 * GB), ("model-2.safetensors", 11 * GB), ("data.parquet", 99 * GB)):
        with (tmp_path / file).open("wb") as sparse:
            sparse.truncate(size)
    return str(tmp_path)


def test_large_weights_have_the_time_that_a_slow_disk_needs(model: str) -> None:
    assert start_limit_s(None, 300, model) == 300 + 310
    assert start_limit_s(None, 600, model, model) == 600 + 620


def test_small_ones_have_what_all_have(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    assert start_limit_s(None, 300, str(tmp_path)) == start_limit_s(None, 300) == 300


def test_a_model_that_is_still_on_the_hub_has_the_time_of_the_largest() -> None:
    assert start_limit_s(None, 300, "deepseek-ai/DeepSeek-V2") == 300 + UNSEEN_BYTES / 1e8


def test_what_the_recipe_gives_holds(model: str) -> None:
    assert start_limit_s(20.0, 300, model) == 20


def test_a_cluster_that_loses_its_gpus_for_a_while_still_gets_processes_that_want_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus, context = [8.0], SimpleNamespace(gcs_address="10.0.0.1:6379", get_job_id=lambda: "01000000")
    monkeypatch.setattr(processes, "_HAD_GPUS", set())
    monkeypatch.setattr(processes, "usable_gpus", lambda: gpus[-1])
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    assert processes.on_gpus()
    gpus.append(0.0)
    assert processes.on_gpus()
    context.gcs_address = "10.0.0.2:6379"
    assert not processes.on_gpus()
