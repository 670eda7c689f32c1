"""Files that would run code if they were trusted are refused, and run nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from align.data.cards import load_card
from align.data.chat import encode_prompt
from align.errors import UserError
from align.evaluate.doctor import CheckStatus, check_template
from align.learner.state import _read
from align.model.policy import load_policy, load_tokenizer
from align.recipe import ModelOptions, load_recipe
from align.recipe.load import check_model_directory
from align.recipe.pipeline import load_pipeline
from align.run.checkpoints import CheckpointDirectory, hashed_file

SFT = Path("recipes/nano/sft.yaml")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once any of the code has run."""
    return tmp_path / "executed"


class Payload:
    """Makes the file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_the_payload_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


@pytest.mark.parametrize(
    ("file", "load"),
    [("recipe.yaml", lambda path: load_recipe(path)), ("pipeline.yaml", load_pipeline), ("card.md", load_card)],
)
@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_yaml_that_names_python_objects(
    file: str, load: Callable[[Path], object], tag: str, mark: Path, tmp_path: Path
) -> None:
    path = tmp_path / file
    text = f"stage: sft\nname: !!{tag} ['touch {mark}']\n"
    path.write_text(f"---\n{text}---\n" if path.suffix == ".md" else text)
    with pytest.raises(UserError, match=file):
        load(path)
    assert not mark.exists()


def test_a_value_on_the_command_line(mark: Path) -> None:
    with pytest.raises(UserError):
        load_recipe(SFT, [f"name=!!python/object/apply:os.system ['touch {mark}']"])
    assert not mark.exists()


def test_a_pickle_in_a_checkpoint_whose_hashes_are_right(mark: Path, tmp_path: Path) -> None:
    def fill(directory: Path) -> dict[str, Any]:
        with hashed_file(directory / "rank_00000.pt") as (file, entry):
            torch.save({"parameters": Payload(mark)}, file)
        return {"rank_00000.pt": entry}

    checkpoints = CheckpointDirectory(tmp_path / "checkpoints")
    checkpoints.write(1, {}, fill)
    newest = checkpoints.newest(pytest.fail)
    assert newest is not None
    with pytest.raises(pickle.UnpicklingError):
        _read(newest.path / "rank_00000.pt")
    assert not mark.exists()


def test_weights_as_a_pickle(policy: ModelOptions, mark: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(policy.path, directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    torch.save({"model.norm.weight": Payload(mark)}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights \(\*\.safetensors\)"):
        check_model_directory(directory, ModelOptions(path=str(directory)))
    # A hub's model is not looked into beforehand.
    with pytest.raises((UserError, pickle.UnpicklingError)):
        load_policy(ModelOptions(path=str(directory)))
    assert not mark.exists()


def test_a_model_that_brings_its_own_code(policy: ModelOptions, mark: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(policy.path, directory)
    config = json.loads((directory / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (directory / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    save_file({"x": torch.zeros(1)}, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError):
        load_policy(ModelOptions(path=str(directory)))
    assert not mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ self._TemplateReference__context.namespace.__init__.__globals__['os'].system('touch MARK') }}",
    ],
)
def test_a_chat_template_that_reaches_out(template: str, policy: ModelOptions, mark: Path) -> None:
    tokenizer = load_tokenizer(policy.path)
    tokenizer.chat_template = template.replace("MARK", str(mark))
    with pytest.raises(UserError, match="template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "x"}])
    assert check_template(tokenizer)[0] is CheckStatus.FAILED
    assert not mark.exists()
