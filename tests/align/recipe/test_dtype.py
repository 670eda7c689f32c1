"""`model.dtype: fastest` is decided by the machine when a run begins, and stays what it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from align.errors import UserError
from align.recipe import dtype, load_recipe, load_stages
from align.recipe.dtype import dtype_of_machine
from align.shipped import found
from rollout.arguments import Device

CPU = Device()


@pytest.fixture(autouse=True)
def slow_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU that is half as fast in bfloat16."""
    monkeypatch.setattr(Device, "here", lambda: CPU)
    monkeypatch.setattr(dtype, "bfloat16_speedup", lambda: 0.5)


def test_in_a_cluster_that_is_joined_by_what_is_built_for_gpus_it_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, address, expected in (
        ("13.0", "10.0.0.1:6379", "bfloat16"),
        ("13.0", "", "float32"),
        (None, "10.0.0.1:6379", "float32"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert dtype_of_machine()[0] == expected


@pytest.mark.parametrize(
    ("device", "speedup", "expected"),
    [
        (CPU, 4.1, ("bfloat16", "this CPU multiplies matrices in bfloat16 4.1 times as fast as in float32")),
        (CPU, 0.58, ("float32", "this CPU multiplies matrices in bfloat16 0.58 times as fast as in float32")),
        (Device((8, 0), "an A100"), 0.5, ("bfloat16", "an A100 computes in it")),
        (Device((7, 5), "a T4"), 2.0, ("float32", "a T4 does not compute in it")),
    ],
)
def test_by_what_the_cpu_or_the_gpu_is_good_at(
    device: Device, speedup: float, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "here", lambda: device)
    monkeypatch.setattr(dtype, "bfloat16_speedup", lambda: speedup)
    assert dtype_of_machine() == expected


MEASURED = "from align.recipe.dtype import bfloat16_speedup; print(bfloat16_speedup())"


def test_without_its_instructions_bfloat16_is_measured_to_be_slower() -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, env=environment
    )
    assert 0 < float(found.stdout) < 1


class TestARecipe:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(dtype, "dtype_of_machine", lambda: (self.fastest, "of this test"))

    fastest = "bfloat16"

    def load(self, *overrides: str):
        return load_recipe(found(Path("recipes/nano/sft.yaml")), ["model.dtype=fastest", *overrides])

    def test_says_what_it_takes_and_why(self, caplog):
        assert self.load().model.dtype == "bfloat16"
        assert "model.dtype is fastest: bfloat16 (of this test)" in caplog.text

    def test_goes_on_with_the_dtype_of_its_run_on_another_machine(self, tmp_path):
        (tmp_path / "runs/nano-sft").mkdir(parents=True)
        (tmp_path / "runs/nano-sft/recipe.yaml").write_text(yaml.safe_dump({"model": {"dtype": "float32"}}))
        assert self.load().model.dtype == "float32"
        assert self.load("run.overwrite=true").model.dtype == "bfloat16"
        assert self.load("run.dir=elsewhere").model.dtype == "bfloat16"

    def test_a_run_directory_that_is_a_number_is_refused_by_its_key(self):
        with pytest.raises(UserError, match=r"run\.dir"):
            self.load("run.dir=2024")

    def test_the_stage_before_takes_the_same(self):
        self.fastest = "float32"
        first, second = load_stages(found(Path("recipes/nano/grpo.yaml")), ["model.dtype=fastest"])
        assert first.recipe.model.dtype == second.recipe.model.dtype == "float32"
        assert not any("model.dtype" in told for told in first.replaced)
