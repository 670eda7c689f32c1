"""A run that would fill the disk is refused before it begins."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.model.sizes import empty_model, model_sizes, read_config
from align.recipe import RewardModelRecipe, load_recipe
from align.session.disk import bytes_needed, check_space, default_grace_s, most_checkpoints

from ..tiny import NANO, tiny_recipe

Usage = namedtuple("Usage", "free")
LITE = "deepseek-ai/DeepSeek-V2-Lite"
ADAPTERS = {"lora": {}, "optimizer": {"learning_rate": 1e-3}}
PARAMETERS = model_sizes(empty_model(read_config(NANO))).total


def recipe(**keys: object) -> RewardModelRecipe:
    return tiny_recipe(**{"model": {"path": NANO}, **keys})


def needed(**keys: object) -> int:
    return bytes_needed(recipe(**keys), PARAMETERS)


def test_each_checkpoint_counts_with_its_optimizer_and_the_one_that_is_being_written() -> None:
    without = needed()
    assert without == pytest.approx((4 + 4 + 12 + 4) * PARAMETERS, rel=1e-6)
    three = needed(save_every=1)
    assert three - without == pytest.approx(2 * 20 * PARAMETERS, rel=1e-6)
    assert needed(save_every=1, keep_checkpoints=3) > three
    rated: list[Any] = [
        load_recipe(Path("recipes/nano/grpo.yaml"), ["evaluation.every=5", f"save_every={every}"])
        for every in ("null", "10")
    ]
    assert [most_checkpoints(each) for each in rated] == [3, 4]


def test_too_little_space_is_refused_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(run={"dir": tmp_path / "not" / "there"})
    need = needed()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need))
    check_space(made, need)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need - 1))
    with pytest.raises(UserError, match=r"run\.dir: .* GB free, and the run writes up to 0\.1 GB"):
        check_space(made, need)


@pytest.mark.parametrize(
    ("keys", "seconds"),
    [
        ({}, 8.0),
        ({"model": {"path": LITE, "dtype": "bfloat16"}}, 502.6),
        ({"model": {"path": LITE, "dtype": "bfloat16"}, "learner": ADAPTERS}, 62.8),
        ({"model": {"path": "/nowhere"}}, 8.0),
    ],
    ids=["nano", "V2-Lite", "its adapters", "no model"],
)
def test_a_run_that_is_told_to_stop_has_the_time_to_write_its_checkpoint(keys: dict[str, Any], seconds: float) -> None:
    made = recipe(**keys)
    assert default_grace_s(made.model, made.learner) == pytest.approx(seconds, abs=0.1)
