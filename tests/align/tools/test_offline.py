"""`align eval`: a policy answers a user's own file, on the engines that tests share."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from align.cli import main
from align.recipe import ModelOptions


def test_a_policy_answers_a_users_own_file(
    policy: ModelOptions,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("align.tools.offline.local_ray", nullcontext)
    problems = [
        {"id": "a", "prompt": "What is 1 + 1?", "answer": "2"},
        {"id": "b", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"},
    ]
    data, out = tmp_path / "problems.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    assert main(["eval", "--model", policy.path, "--data", str(data), "--out", str(out)]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b"]
    assert all({"completion", "reward", "verdict"} <= answer.keys() for answer in answers)
    assert "% of 2 right" in capsys.readouterr().out
