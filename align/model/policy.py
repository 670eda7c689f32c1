"""Building and loading the policy as a transformers model."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from align.config import ModelOptions
from align.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

if not torch.cuda.is_available():
    # transformers imports DeepSpeed where it is installed, which otherwise warns that it looked for a GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or hub name. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: {path} has no tokenizer that transformers can load: {first_line(error)}"
        ) from None


def load_policy(options: ModelOptions, dtype: torch.dtype | None = None) -> Any:
    """The pretrained policy, in `dtype` or the recipe's. Raises UserError when transformers cannot load it."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            options.path, dtype=dtype or DTYPES[options.dtype], trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: transformers cannot load {options.path}: {first_line(error)}") from None
    use_fast_experts(model)
    return model


def write_random_policy(options: ModelOptions, directory: Path, seed: int) -> None:
    """Draw the weights of a configuration from `seed` and write the policy to `directory`, tokenizer included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])
    save_policy(model, load_tokenizer(options.path), directory)


def save_policy(model: Any, tokenizer: Any, directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a Hugging Face checkpoint: safetensors under the architecture's checkpoint names, and the tokenizer."""
    with no_progress_bars():
        model.save_pretrained(directory, state_dict=state_dict)
    tokenizer.save_pretrained(directory)
    let_weights_be_read_like(directory / "config.json")


def let_weights_be_read_like(file: Path) -> None:
    """Give the safetensors files beside `file` its mode, which the umask chose: the library itself makes them 0600."""
    for weights in file.parent.glob("*.safetensors"):
        weights.chmod(file.stat().st_mode & 0o777)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars off the terminal, where the run's own display is."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def use_fast_experts(model: Any) -> None:
    """Run the experts as grouped matrix products where the model has fused experts."""
    if has_fused_experts(model):
        model.set_experts_implementation("grouped_mm")


def has_fused_experts(model: Any) -> bool:
    """Whether the experts of a layer are one stacked tensor each for gate-up and down projection."""
    return any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())


def stop_token_ids(path: str | Path, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the tokenizer's and those of generation_config.json."""
    stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    file = Path(path) / "generation_config.json"
    if file.is_file():
        declared = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") or []
        stops += [declared] if isinstance(declared, int) else list(declared)
    if not stops:
        raise UserError(f"model.path: {path} declares no end-of-sequence token, so no completion could end")
    return sorted(set(stops))


def first_line(error: Exception) -> str:
    """The first line of an exception's message."""
    return str(error).strip().split("\n")[0]
