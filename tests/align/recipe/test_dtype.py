"""`model.dtype: fastest` is decided by the machine when a run begins, and stays what it was."""

from pathlib import Path

import pytest
import torch
import yaml

from align.errors import UserError
from align.recipe import dtype, load_recipe, load_stages
from align.recipe.dtype import cpu_flags, dtype_of_machine, fastest_dtype
from align.shipped import found
from rollout.arguments import Device

CPU = Device()


def test_in_a_cluster_that_is_joined_by_what_is_built_for_gpus_it_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "here", lambda: CPU)
    monkeypatch.setattr("align.recipe.dtype.cpu_flags", lambda file: set())
    for cuda, address, expected in (
        ("13.0", "10.0.0.1:6379", "bfloat16"),
        ("13.0", "", "float32"),
        (None, "10.0.0.1:6379", "float32"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert dtype_of_machine()[0] == expected


@pytest.mark.parametrize(
    ("device", "flags", "environment", "expected"),
    [
        (CPU, {"avx512f", "avx512_bf16"}, {}, "bfloat16"),
        (CPU, {"amx_bf16"}, {}, "bfloat16"),
        (CPU, {"bf16"}, {}, "bfloat16"),
        (CPU, {"avx512f", "avx2"}, {}, "float32"),
        (CPU, set(), {}, "float32"),
        (CPU, {"amx_bf16"}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "float32"),
        (CPU, {"amx_bf16"}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bfloat16"),
        (Device((8, 0), "an A100"), set(), {}, "bfloat16"),
        (Device((7, 5), "a T4"), {"amx_bf16"}, {}, "float32"),
    ],
)
def test_by_the_instructions_of_the_cpu_or_the_gpu(device, flags, environment, expected):
    assert fastest_dtype(device, flags, environment)[0] == expected


def test_flags_of_x86_and_arm(tmp_path: Path):
    (tmp_path / "x86").write_text("model name\t: Xeon\nflags\t\t: fpu avx512_bf16\n\nflags\t\t: other\n")
    (tmp_path / "arm").write_text("Features\t: fp asimd bf16\n")
    assert "avx512_bf16" in cpu_flags(tmp_path / "x86")
    assert "other" not in cpu_flags(tmp_path / "x86")
    assert "bf16" in cpu_flags(tmp_path / "arm")
    assert cpu_flags(tmp_path / "none") == set()


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
