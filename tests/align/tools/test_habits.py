"""`align habits`: what it takes, and what it prints."""

from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.run import RunDirectory, write_samples
from align.tools.habits import answers_in

from ..rows import write_rows


def rows(count: int, mark: str = "", first: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": f"{n}", "prompt": f"About {n}?", "completion": f"{mark}It is number {n}."}
        for n in range(first, first + count)
    ]


def test_two_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write_rows(tmp_path / "a.jsonl", rows(40))
    published = [
        {"key": row["id"], "prompt": row["prompt"], "response": f"Sure! {row['completion']}"} for row in rows(40)
    ]
    assert main(["habits", str(before), str(write_rows(tmp_path / "b.jsonl", published))]) == 0
    out = capsys.readouterr().out
    assert "40 and 40 answers to 40 prompts" in out
    assert "100 % of answers begin with “Sure! It is number”; 0 % did at the start" in out
    assert "      Sure! It is number 0." in out
    assert main(["habits", str(before), str(before)]) == 0
    assert "no habit taken up or lost" in capsys.readouterr().out


def test_an_answer_is_the_last_message_and_never_the_ground_truth(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "About 1?"}]
    said = {"role": "assistant", "content": "It is."}
    given = [
        {"prompt": asked, "completion": [said], "answer": "gold"},
        {"question": "About 1?", "response": "It is.", "answer": "gold"},
        {"prompt": "About 1?", "answer": "It is."},
        {"prompt": "About 1?", "completion": None, "response": "It is.", "answer": "gold"},
        {"prompt": "About 1?", "completion": "It is.", "greedy": True},
    ]
    for row in given:
        (found,) = answers_in(write_rows(tmp_path / "rows.jsonl", [row]))
        assert (found.text, found.prompt) == ("It is.", "About 1?")
    assert [
        answer.text for answer in answers_in(write_rows(tmp_path / "empty.jsonl", [given[-1] | {"completion": ""}]))
    ] == [""]
    sampled = {"prompt": "About 1?", "completion": "It may be.", "greedy": False}
    assert [answer.text for answer in answers_in(write_rows(tmp_path / "both.jsonl", [given[-1], sampled]))] == [
        "It is."
    ]


def test_a_run_is_compared_with_its_start_step_by_step_and_a_habit_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create(tmp_path / "run")
    for step in range(1, 11):
        mark = "" if step < 6 else "Sure! "
        write_samples(run.samples_file(step), rows(12, mark, first=12 * step))
    run.finish()
    assert main(["habits", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert out.count("begin with “Sure!") == 1
    assert "run, step 6, against the first 2 steps: 33 % of answers begin with" in out
    start = write_rows(
        tmp_path / "start.jsonl", [{**row, "completion": f"Sure! {row['completion']}"} for row in rows(60)]
    )
    assert main(["habits", str(run.path), "--start", str(start)]) == 0
    out = capsys.readouterr().out
    assert "against the start given: 100 % of answers begin with “It is number”" in out
    assert main(["habits", str(start), str(run.path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["a.jsonl", "nowhere"], "nowhere is neither a run directory nor a file of answers"),
        (["a.jsonl", "no_text.jsonl"], r"no_text.jsonl, line 1: no answer"),
        (["a.jsonl", "null.jsonl"], "null.jsonl, line 1: no answer"),
        (["a.jsonl", "empty.jsonl"], "empty.jsonl is empty"),
        (["run", "--start", "empty.jsonl"], "empty.jsonl is empty"),
        (["a.jsonl", "a.jsonl", "--start", "a.jsonl"], "--start has no effect"),
        (["run"], "run has nothing to compare"),
        (["a.jsonl", "odd.jsonl"], "odd.jsonl, line 1: column 'question'"),
        (["a.jsonl", "odder.jsonl"], "odder.jsonl, line 1: column 'prompt'"),
        (["run", "a.jsonl"], "run has no answers"),
    ],
)
def test_a_mistake_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("a.jsonl"), rows(3))
    write_rows(Path("no_text.jsonl"), [{"id": "1", "prompt": "?"}])
    write_rows(Path("null.jsonl"), [{"id": "1", "completion": None, "answer": "gold"}])
    write_rows(Path("empty.jsonl"), [])
    write_rows(Path("odd.jsonl"), [{"id": "1", "question": 17, "completion": "4"}])
    write_rows(
        Path("odder.jsonl"), [{"id": "1", "prompt": [{"role": "user", "content": ["What?"]}], "completion": "4"}]
    )
    RunDirectory.create("run").finish()
    assert main(["habits", *arguments]) == 2
    assert message in capsys.readouterr().err
