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
    assert "% of 2 right by exact_answer" in capsys.readouterr().out


def test_a_function_in_a_file_scores_the_answers_to_a_card_and_their_file_again(
    policy: ModelOptions, ray_session: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("align.tools.offline.local_ray", nullcontext)
    file, out, scores = (tmp_path / name for name in ("mine.py", "answers.jsonl", "scores.jsonl"))
    file.write_text(
        "def short(completions, messages): return [len(m) / (1 + len(c)) for c, m in zip(completions, messages)]\n"
    )
    own = ["--reward", f"{file}:short"]
    asked = ["eval", "--model", policy.path, "--data", "nano_math", "--split", "validation", "--samples", "2"]
    assert main([*asked, "--temperature", "0.7", "--out", str(out), *own, "--max-new-tokens", "16"]) == 0
    assert main(["score", "--data", str(out), "--out", str(scores), *own]) == 0
    answers, again = (list(map(json.loads, path.read_text().splitlines())) for path in (out, scores))
    assert [row["greedy"] for row in answers].count(False) == 2 * [row["greedy"] for row in answers].count(True)
    assert [row["reward"] for row in answers] == [row["value"] for row in again]
