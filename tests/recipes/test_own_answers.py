"""`make smol` lets the model answer plain requests once, and takes the answers again as long as the model is the same."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from align.errors import UserError
from align.recipe import ModelOptions
from align.run.files import read_jsonl, write_jsonl
from align.tasks.instructions import plain_requests, read_answers


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("smollm2/own_answers.py")


@pytest.mark.slow
def test_the_model_answers_through_the_rollout_engine(
    script: ModuleType, policy: ModelOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "REQUESTS_OF_A_TOPIC", 1)
    monkeypatch.setattr(script, "MAX_NEW_TOKENS", 16)
    file = tmp_path / "models" / "answers.jsonl"
    assert script.own_answers(policy.path, file).startswith("112 of ")
    rows = read_jsonl(file)
    assert [row["request"] for row in rows] == plain_requests(1)
    assert {row["model"] for row in rows} == {policy.path}
    assert all(isinstance(row["answer"], str) for row in rows)
    assert set(read_answers(file)) == set(plain_requests(1))


def test_the_answers_of_the_same_model_are_taken_again_and_those_of_another_are_not(
    script: ModuleType, policy: ModelOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.jsonl"
    monkeypatch.setattr(script, "answers_of", lambda model, requests, *_, **__: dict.fromkeys(requests, "It is."))
    write_jsonl(file, [{"model": policy.path, "request": "Describe rain to a child.", "answer": "It rains."}])
    assert "already" in script.own_answers(policy.path, file)
    assert len(read_jsonl(file)) == 1
    write_jsonl(file, [{"model": "another", "request": "Describe rain to a child.", "answer": "It rains."}])
    assert script.own_answers(policy.path, file).startswith("560 of ")
    assert {row["model"] for row in read_jsonl(file)} == {policy.path}


def test_what_is_no_model_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        script.own_answers(str(tmp_path), tmp_path / "answers.jsonl")
