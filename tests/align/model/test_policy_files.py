"""What a policy's files are like on the disk."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.model.lora import add_adapter, save_adapter
from align.model.policy import load_policy, load_tokenizer, save_policy
from align.recipe import LoraOptions, ModelOptions


@pytest.fixture(params=[0o022, 0o027], ids=["022", "027"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_whoever_may_read_the_configuration_may_read_the_weights(
    policy: ModelOptions, umask: int, tmp_path: Path
) -> None:
    model = load_policy(policy)
    save_policy(model, load_tokenizer(policy.path), tmp_path / "final")
    adapted = add_adapter(model, LoraOptions(rank=2), "CAUSAL_LM", policy.path)
    save_adapter(adapted, tmp_path / "final" / "adapter", dict(adapted.named_parameters()))
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*") if file.is_file()}
    assert {"model.safetensors", "adapter_model.safetensors", "config.json"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}, modes
