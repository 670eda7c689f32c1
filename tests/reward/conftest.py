from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from reward import registry


@pytest.fixture
def own_rewards() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    with patch.dict(registry._rewards.entries):
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with random weights, of the nano policy's architecture and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    nano = Path(__file__).parents[2] / "recipes" / "nano" / "policy"
    directory = tmp_path_factory.mktemp("reward_model")
    tokenizer = AutoTokenizer.from_pretrained(nano)
    tokenizer.pad_token = tokenizer.bos_token
    config = AutoConfig.from_pretrained(nano, num_labels=1, pad_token_id=tokenizer.bos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "reward_model.json").write_text('{"mean": 0.25, "std": 0.5}')
    return directory
