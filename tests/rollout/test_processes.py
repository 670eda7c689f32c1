"""How long a process that loads a model may take."""

from pathlib import Path

import pytest

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
