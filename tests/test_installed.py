"""The package as pip installs it, away from the repository: its commands, recipes and data cards are all there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from align.cli import main
from align.errors import UserError
from align.recipe import load_recipe
from align.session.checks import check_recipe
from align.shipped import SHIPPED, found

ROOT = Path(__file__).parents[1]
SOURCE = ("align", "rollout", "reward", "data_cards", "recipes")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
UV = Path(sys.executable).with_name("uv")


def test_what_is_shipped_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = SHIPPED / "recipes/nano/grpo.yaml"
    assert found(Path("recipes/nano/grpo.yaml")) == shipped
    recipe = load_recipe(shipped)
    assert recipe.model.path == str(SHIPPED / "recipes/nano/policy")
    assert found(Path("recipes/nano/none.yaml")) == Path("recipes/nano/none.yaml")
    assert found(Path("align/errors.py")) == Path("align/errors.py")


def test_a_file_of_ones_own_comes_before_the_one_that_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path("recipes/nano/grpo.yaml")
    (tmp_path / own).parent.mkdir(parents=True)
    (tmp_path / own).write_text("")
    monkeypatch.chdir(tmp_path)
    assert found(own) == own


@pytest.mark.parametrize(
    ("stage", "missing"), [("grpo", ["ray", "vllm", "deepspeed"]), ("reward_model", ["deepspeed"]), ("grpo", ["vllm"])]
)
def test_missing_engines_are_a_sentence_with_the_extras_that_bring_them(
    stage: str, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    message = rf"{', '.join(missing)} (is|are) not installed: `pip install 'moe-align\[cuda\]'` .*'moe-align\[cpu\]'`"
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe(Path(f"recipes/nano/{stage}.yaml"), ["machine={}"]))


@pytest.mark.parametrize("has_pip", [False, True])
def test_an_environment_without_pip_is_made_again(has_pip: bool, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "locks").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("pyproject.toml", "locks/cpu.txt"):
        (tmp_path / name).touch()
    # As in .venv: `-m pip --version` is all that it can do.
    scripts = {".venv/bin/python": f'test {has_pip:d} = 1 -a "$3" = --version', "python": 'echo "$@" >> made; exit 1'}
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(["make", "setup", "ACCELERATOR=cpu", "PYTHON=./python"], cwd=tmp_path, capture_output=True)
    assert (tmp_path / "made").exists() != has_pip


def test_a_reward_model_needs_no_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "vllm", None)
    check_recipe(load_recipe(Path("recipes/nano/reward_model.yaml"), ["machine={}"]))


def test_an_engine_that_is_missed_later_is_the_same_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["chat", "--model", "recipes/nano/policy"]) == 2
    assert "error: vllm is not installed: `pip install" in capsys.readouterr().err


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `align` of an environment that has the wheel, built from the sdist, beside the packages of this one."""
    source, environment = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in SOURCE:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [
            UV,
            "build",
            "--quiet",
            "--no-build-isolation",
            "--python",
            sys.executable,
            "--out-dir",
            source / "dist",
            source,
        ],
        check=True,
    )
    [wheel] = (source / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "beside.pth").write_text("\n".join(ours))
    subprocess.run(
        [UV, "pip", "install", "--quiet", "--no-deps", "--offline", "--python", environment / "bin/python", wheel],
        check=True,
    )
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0] for name in archive.namelist() if ".dist-info" not in name} == {
            "align",
            "rollout",
            "reward",
        }
    return environment / "bin" / "align"


def said(installed: Path, *arguments: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [installed, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_brings_all_that_the_repository_has_of_recipes_and_cards(installed: Path) -> None:
    [shipped] = installed.parents[1].glob("lib/python*/site-packages/align/shipped_files")
    for name in ("recipes", "data_cards"):
        files = {
            str(path.relative_to(ROOT))
            for path in (ROOT / name).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert files == {str(path.relative_to(shipped)) for path in (shipped / name).rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["recipes/nano/grpo.yaml", "recipes/nano/reward_model.yaml", "recipes/smollm2/grpo.yaml"]
)
def test_a_shipped_recipe_is_checked_in_an_empty_directory(installed: Path, file: str, tmp_path: Path) -> None:
    model = ["model.path=recipes/nano/policy", "model.init=random"] if "smollm2" in file else []
    output = said(installed, "check", file, "machine={}", *model, cwd=tmp_path)
    assert f"site-packages/align/shipped_files/{file}: a valid" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_help_and_templates_are_there(installed: Path, tmp_path: Path) -> None:
    assert "learner.optimizer.learning_rate" in said(installed, "grpo", "--help", cwd=tmp_path)
    assert "exact_answer" in said(installed, "rewards", "list", cwd=tmp_path)
