"""A run that would fill the disk is refused before it begins."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from align.errors import UserError
from align.model.sizes import empty_model, model_sizes, read_config
from align.recipe import RewardModelRecipe
from align.session.checks import bytes_needed, check_space

from ..tiny import NANO, tiny_recipe

Usage = namedtuple("Usage", "free")
PARAMETERS = model_sizes(empty_model(read_config(NANO))).total


def recipe(**keys: object) -> RewardModelRecipe:
    return tiny_recipe(model={"path": NANO}, **keys)


def test_each_checkpoint_counts_with_its_optimizer_and_the_one_that_is_being_written() -> None:
    without = bytes_needed(recipe(), PARAMETERS)
    assert without == pytest.approx((4 + 4 + 12 + 4) * PARAMETERS, rel=1e-6)
    three = bytes_needed(recipe(save_every=1), PARAMETERS)
    assert three - without == pytest.approx(2 * 20 * PARAMETERS, rel=1e-6)
    assert bytes_needed(recipe(save_every=1, keep_checkpoints=3), PARAMETERS) > three


def test_too_little_space_is_refused_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(run={"dir": tmp_path / "not" / "there"})
    need = bytes_needed(recipe(), PARAMETERS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need))
    check_space(made.directory, need, keep=made.keep_checkpoints)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need - 1))
    with pytest.raises(UserError, match=r"run\.dir: .* GB free, and the run writes up to 0\.1 GB"):
        check_space(made.directory, need, keep=made.keep_checkpoints)
