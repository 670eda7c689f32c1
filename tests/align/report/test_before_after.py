"""The same problems answered before and after, side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.report import write_report
from align.report.before_after import SHOWN, find_pairs, section
from align.report.read import read_run

WriteRun = Callable[..., Path]


def answer(id_: str, completion: str, verdict: str, **more: Any) -> dict[str, Any]:
    row = {"id": id_, "greedy": True, "prompt": f"prompt of {id_}", "completion": completion, "verdict": verdict}
    return row | {"detail": f"{verdict} because of {completion}"} | more


def evaluation(name: str, *rows: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return {"name": name, "step": 0, "problems": len(rows), "accuracy": 0.5}, list(rows)


def test_each_prompt_has_its_two_answers_and_what_was_said_of_them(tmp_path: Path, write_run: WriteRun) -> None:
    before = evaluation("before", answer("a", "old", "wrong"), answer("b", "same", "pass"))
    after = evaluation("after", answer("b", "same", "pass"), answer("a", "<b>new</b>", "pass"))
    page = write_report(write_run(tmp_path / "run", evaluations=[before, after])).read_text()
    assert "Of 2, 1 became right and 0 wrong; 1 were right both times" in page
    row = page[page.index('<td class="text">prompt of a') :]
    assert row.index("old") < row.index("wrong: wrong because of old") < row.index("&lt;b&gt;new") < row.index("pass: ")
    assert "<th>before</th><th>after</th>" in page


def test_what_changed_comes_first_and_in_turn(tmp_path: Path, write_run: WriteRun) -> None:
    kinds = {"gain": ("wrong", "pass"), "loss": ("pass", "wrong"), "bad": ("wrong", "wrong"), "good": ("pass", "pass")}
    names = [f"{kind}{place}" for kind in ("good", "bad", "loss", "gain") for place in range(20)]
    before = evaluation("before", *(answer(name, "x", kinds[name.rstrip("0123456789")][0]) for name in names))
    after = evaluation("after", *(answer(name, "y", kinds[name.rstrip("0123456789")][1]) for name in names))
    pairs = find_pairs(read_run(write_run(tmp_path / "run", evaluations=[before, after])))
    assert pairs is not None
    assert len(pairs.chosen()) == SHOWN
    assert pairs.chosen()[:5] == ["gain0", "loss0", "bad0", "good0", "gain1"]


def test_sampled_answers_and_other_problems_are_left_out(tmp_path: Path, write_run: WriteRun) -> None:
    elsewhere = evaluation("elsewhere", answer("z", "x", "pass"))
    before = evaluation("before", answer("a", "x", "wrong"), answer("a", "drawn", "pass", greedy=False))
    after = evaluation("after", answer("a", "y", "pass"), answer("c", "y", "pass"))
    pairs = find_pairs(read_run(write_run(tmp_path / "run", evaluations=[elsewhere, before, after])))
    assert pairs is not None
    assert pairs.names == ("before", "after")
    assert pairs.ids == ["a"]
    assert pairs.before["a"]["completion"] == "x"


def test_a_run_with_one_evaluation_says_so(tmp_path: Path, write_run: WriteRun) -> None:
    run = read_run(write_run(tmp_path / "run", evaluations=[evaluation("only", answer("a", "x", "pass"))]))
    assert "No two evaluations" in section(run)


def test_long_answers_are_cut(tmp_path: Path, write_run: WriteRun) -> None:
    rows = [answer("a", "long " * 1000, "wrong")]
    run = read_run(write_run(tmp_path / "run", evaluations=[evaluation("x", *rows), evaluation("y", *rows)]))
    assert len(section(run)) < 10_000
