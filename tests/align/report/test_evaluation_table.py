"""Evaluations across stages, and their changes with intervals."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from align.report.evaluations import MEANS, PAIRED, UNPAIRED, Change, Table, evaluation_table
from align.report.markdown import markdown_page
from align.report.read import read_run
from align.statistics import mean_interval, paired_interval, unpaired_interval

WriteRun = Callable[..., Path]
Evaluated = tuple[dict[str, Any], list[dict[str, Any]]]


def evaluated(name: str, greedy: str, sampled: Mapping[str, str] | None = None, **more: Any) -> Evaluated:
    """An evaluation of the problems 0, 1, ... whose greedy answers are right (r) or wrong (w)."""
    rows = [answer(str(i), letter, greedy=True) for i, letter in enumerate(greedy)]
    rows += [answer(id_, letter, greedy=False) for id_, letters in (sampled or {}).items() for letter in letters]
    record = {
        "stage": "x",
        "step": 3,
        "name": name,
        "problems": len(greedy),
        "accuracy": greedy.count("r") / len(greedy),
    }
    return record | {"verdicts": {"pass": greedy.count("r"), "wrong": greedy.count("w")}} | more, rows


def answer(id_: str, letter: str, *, greedy: bool) -> dict[str, Any]:
    return {"id": id_, "greedy": greedy, "verdict": "pass" if letter == "r" else "wrong"}


def table_of(path: Path, write_run: WriteRun, sft: list[Evaluated], grpo: list[Evaluated]) -> Table:
    root = write_run(path / "run", evaluations=grpo)
    write_run(root / "sft", stage="sft", evaluations=sft)
    return evaluation_table(read_run(root))


def test_the_same_problems_are_compared_in_pairs(tmp_path: Path, write_run: WriteRun) -> None:
    before, after = evaluated("after SFT", "rrwwwwww"), evaluated("after GRPO", "rwrrrwrr")
    table = table_of(tmp_path, write_run, [before], [after])
    change = table.rows[1].changes["accuracy"]
    assert table.rows[1].against == "after SFT"
    assert change.difference == pytest.approx(4 / 8)
    assert change.interval == paired_interval(5, 1, 8)
    assert change.method == PAIRED
    assert table.methods == [PAIRED]


def test_other_problems_are_compared_as_two_samples(tmp_path: Path, write_run: WriteRun) -> None:
    before, after = evaluated("after SFT", "rwww"), evaluated("after GRPO", "rrrwr")
    change = table_of(tmp_path, write_run, [before], [after]).rows[1].changes["accuracy"]
    assert (change.interval, change.method) == (unpaired_interval(1, 4, 4, 5), UNPAIRED)


def test_validation_problems_are_never_compared_with_those_of_the_test(tmp_path: Path, write_run: WriteRun) -> None:
    before, after = evaluated("after SFT", "rwww"), evaluated("after GRPO", "rrww")
    chosen_by = [evaluated(f"GRPO step {n}, validation", "rrrw", split="validation") for n in (1, 2)]
    rows = table_of(tmp_path, write_run, [before], [*chosen_by, after]).rows
    assert [row.against for row in rows] == [None, None, None, "after SFT"]
    alone = table_of(tmp_path / "alone", write_run, [], [before, *chosen_by, after]).rows
    assert [row.against for row in alone] == [None, None, "GRPO step 1, validation", "after SFT"]


def test_completions_that_are_gone_or_another_evaluations_do_not_count_as_pairs(
    tmp_path: Path, write_run: WriteRun
) -> None:
    record, rows = evaluated("after GRPO", "rrrr")
    before = evaluated("after SFT", "rwww")
    overwritten = table_of(tmp_path / "a", write_run, [before], [(record | {"accuracy": 0.5}, rows)])
    gone = table_of(tmp_path / "b", write_run, [before], [(record, [])])
    assert [table.rows[1].changes["accuracy"].method for table in (overwritten, gone)] == [UNPAIRED, UNPAIRED]


def test_the_accuracy_of_a_domain_is_compared_on_its_problems(tmp_path: Path, write_run: WriteRun) -> None:
    made = [evaluated("before", "wwwrr"), evaluated("after", "rrrwr")]
    for place, (record, rows) in enumerate(made):
        record |= {"accuracy/math": (0.0, 1.0)[place], "accuracy/code": (1.0, 0.5)[place]}
        for i, row in enumerate(rows):
            row["domain"] = "math" if i < 3 else "code"
    changes = table_of(tmp_path, write_run, made[:1], made[1:]).rows[1].changes
    assert changes["accuracy/math"] == Change(1.0, paired_interval(3, 0, 3), PAIRED)
    assert changes["accuracy/code"] == Change(-0.5, paired_interval(0, 1, 2), PAIRED)
    assert changes["accuracy"].interval == paired_interval(3, 1, 5)


def test_pass_at_k_is_compared_problem_by_problem(tmp_path: Path, write_run: WriteRun) -> None:
    before = evaluated("before", "ww", {"0": "rw", "1": "ww"}, **{"pass@1": 0.25, "pass@2": 0.5})
    after = evaluated("after", "rr", {"0": "rr", "1": "rw"}, **{"pass@1": 0.75, "pass@2": 1.0})
    changes = table_of(tmp_path, write_run, [before], [after]).rows[1].changes
    # Both problems gain 1/2 at k = 1; at k = 2 the first gains nothing and the second everything.
    assert (changes["pass@1"].difference, changes["pass@1"].interval) == (0.5, None)
    assert changes["pass@2"] == Change(0.5, mean_interval([0.0, 1.0]), MEANS)


def test_the_stage_before_is_the_one_to_compare_with(tmp_path: Path, write_run: WriteRun) -> None:
    sft = [evaluated("before SFT", "wwww"), evaluated("SFT step 9", "wwwr"), evaluated("after SFT", "wwrr")]
    grpo = [evaluated("GRPO step 20", "wrrr"), evaluated("after GRPO", "rrrr")]
    rows = table_of(tmp_path, write_run, sft, grpo).rows
    assert [row.against for row in rows] == [None, "before SFT", "before SFT", "after SFT", "after SFT"]


def test_a_policy_is_compared_with_the_one_that_it_was_made_of(tmp_path: Path, write_run: WriteRun) -> None:
    sft, first, second = (evaluated(f"after {name}", "wwrr") for name in ("SFT", "first", "second"))
    root = tmp_path / "run"
    made_of = {"model": {"path": str(root / "sft" / "final")}}
    write_run(root, stage="pipeline")
    for place, (name, made, recipe) in enumerate((("sft", sft, {}), ("one", first, made_of), ("two", second, made_of))):
        status = write_run(root / name, evaluations=[made], recipe=recipe) / "status.json"
        status.write_text(status.read_text().replace("03:04:05", f"03:04:1{place}"))
    rows = evaluation_table(read_run(root)).rows
    assert [row.name for row in rows] == ["after SFT", "after first", "after second"]
    assert [row.against for row in rows] == [None, "after SFT", "after SFT"]


def test_of_several_sets_of_problems_each_is_compared_with_itself(tmp_path: Path, write_run: WriteRun) -> None:
    sft = [evaluated("math after SFT", "wwrr"), evaluated("code after SFT", "wwwww")]
    grpo = [evaluated("math after GRPO", "wrrr"), evaluated("code after GRPO", "wwwwr")]
    rows = table_of(tmp_path, write_run, sft, grpo).rows
    assert [row.against for row in rows[2:]] == ["math after SFT", "code after SFT"]


def test_every_number_of_a_record_is_a_column_in_its_group(tmp_path: Path, write_run: WriteRun) -> None:
    more = {
        "accuracy/code": 0.5,
        "pass@16": 0.9,
        "pass@4": 0.8,
        "refusal_rate": 0.1,
        "win_rate": 0.4,
        "judge": 7.5,
        "needle/recall": 0.3,
        "sums/exact_match/boxed": 0.75,
    }
    more |= {"mean_length": 20.5, "truncated": 0.25}
    table = table_of(tmp_path, write_run, [evaluated("after SFT", "rw", **more)], [])
    assert table.groups == [
        ("right answers", ["accuracy", "accuracy/code"]),
        ("sampled", ["pass@4", "pass@16"]),
        ("rates", ["refusal_rate", "win_rate"]),
        ("answers", ["mean_length", "truncated"]),
        ("other", ["judge"]),
        ("needle", ["needle/recall"]),
        ("sums", ["sums/exact_match/boxed"]),
    ]
    text = markdown_page(read_run(tmp_path / "run"), table, None)
    assert "| 50.0% | 50.0% | 80.0% | 90.0% | 10.0% | 40.0% | 20.5 | 25.0% | 7.5 | 0.3 | 75.0% |" in text
