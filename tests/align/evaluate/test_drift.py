"""Drift: the loss on the start model's own answers, against transformers' own loss, and what moves it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.data.chat import encode_prompt
from align.errors import UserError
from align.evaluate.drift import drift, losses, ordinary_requests
from align.evaluate.hooks import PolicyCheckpoint, run

NO_FLEET: Any = None


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are most of the time of so small a model, on a busy machine all of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def moved(checkpoint: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    """A policy that has been trained away from the start: every weight a little."""
    directory = tmp_path_factory.mktemp("moved")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.model.path)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    policy = checkpoint.model.model_copy(update={"path": str(directory)})
    return replace(checkpoint, model=policy, start=checkpoint.model.path)


def test_a_policy_that_has_not_moved_has_no_drift(checkpoint: PolicyCheckpoint) -> None:
    values = run(
        "drift", replace(checkpoint, start=checkpoint.model.path), NO_FLEET, {"count": 2, "max_new_tokens": 4}
    ).values
    assert values["start"] > 1
    assert values["difference"] == 0


def test_one_that_has_moved_finds_the_starts_answers_less_likely(moved: PolicyCheckpoint) -> None:
    asked = {"count": 20, "max_new_tokens": 4}
    metrics = run("drift", moved, NO_FLEET, asked)
    assert metrics.values["difference"] == metrics.values["policy"] - metrics.values["start"] > 0
    tokens = sum(row["tokens"] for row in metrics.rows)
    assert len(metrics.rows) == 20, "more than one batch"
    assert sum(row["policy"] for row in metrics.rows) / tokens == pytest.approx(metrics.values["policy"])
    assert run("drift", moved, NO_FLEET, asked).values == metrics.values


def test_the_loss_is_the_one_that_transformers_computes(checkpoint: PolicyCheckpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.model.path).eval()
    prompt, answer = [3, 40, 50, 60], [70, 80, 90, 1]
    labels = torch.tensor([[-100] * len(prompt) + answer])
    expected = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
    assert losses(model, [prompt], [answer])[0] == pytest.approx(expected.item() * len(answer), rel=1e-5)


def test_requests_are_distinct_and_fit_the_template(checkpoint: PolicyCheckpoint) -> None:
    requests = ordinary_requests(48)
    assert len({request["content"] for request in requests}) == 48
    assert all(encode_prompt(checkpoint.tokenizer, [request]) for request in requests)
    assert len(ordinary_requests(152)) == 152


def test_without_a_model_to_begin_with_it_says_so(checkpoint: PolicyCheckpoint, tmp_path: Path) -> None:
    metrics = run("drift", checkpoint, NO_FLEET, {})
    assert metrics.values == {}
    assert "began with random weights" in metrics.not_run["loss"]
    with pytest.raises(UserError, match="cannot load"):
        drift(checkpoint, NO_FLEET, start=str(tmp_path))
