"""Evaluations across stages and their changes with intervals; answers before and after; published figures."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from align.report import write_report
from align.report.content import build_report
from align.report.evaluations import (
    MEANS,
    PAIRED,
    UNPAIRED,
    Change,
    Evaluation,
    compared_evaluations,
    published_figures,
)
from align.report.figures import SHOWN_PAIRS
from align.report.parts import Cell, Section, Table
from align.report.read import read_run
from align.statistics import mean_interval, paired_interval, unpaired_interval

WriteRun = Callable[..., Path]
Evaluated = tuple[dict[str, Any], list[dict[str, Any]]]

LITE = {"model_type": "deepseek_v2", "num_hidden_layers": 27, "hidden_size": 2048, "n_routed_experts": 64}
LARGE = {"model_type": "deepseek_v2", "num_hidden_layers": 60, "hidden_size": 5120, "n_routed_experts": 160}


def evaluated(name: str, greedy: str, sampled: Mapping[str, str] | None = None, **more: Any) -> Evaluated:
    """An evaluation of the problems 0, 1, ... whose greedy answers are right (r) or wrong (w)."""
    rows = [answer(str(i), letter, greedy=True) for i, letter in enumerate(greedy)]
    rows += [answer(id_, letter, greedy=False) for id_, letters in (sampled or {}).items() for letter in letters]
    right, wrong = greedy.count("r"), greedy.count("w")
    record = {"stage": "x", "step": 3, "name": name, "problems": len(greedy), "accuracy": right / len(greedy)}
    return record | {"verdicts": {"pass": right, "wrong": wrong}} | more, rows


def answer(id_: str, letter: str, *, greedy: bool) -> dict[str, Any]:
    return {"id": id_, "greedy": greedy, "verdict": "pass" if letter == "r" else "wrong"}


def compared(write_run: WriteRun, sft: list[Evaluated], grpo: list[Evaluated]) -> list[Evaluation]:
    root = write_run(evaluations=grpo)
    write_run(root / "sft", stage="sft", evaluations=sft)
    return compared_evaluations(read_run(root))


def section(root: Path, key: str) -> Section:
    return next(section for section in build_report(read_run(root)).sections if section.key == key)


def test_the_same_problems_are_compared_in_pairs(tmp_path: Path, write_run: WriteRun) -> None:
    before, after = evaluated("after SFT", "rrwwwwww"), evaluated("after GRPO", "rwrrrwrr")
    made = compared(write_run, [before], [after])
    change = made[1].changes["accuracy"]
    assert made[1].before is made[0]
    assert change.difference == pytest.approx(4 / 8)
    assert change.interval == paired_interval(5, 1, 8)
    assert change.method == PAIRED
    overview, _, table = section(tmp_path / "run", "evaluations").tables
    assert table.note.endswith(f" P{PAIRED[1:]}.")
    figure = overview.rows[1][4]
    assert (str(figure), figure.note, figure.tone) == ("75.0%", "+50.0 (−10.3 to +82.1)", "")


def test_other_problems_are_compared_as_two_samples(write_run: WriteRun) -> None:
    before, after = evaluated("after SFT", "rwww"), evaluated("after GRPO", "rrrwr")
    change = compared(write_run, [before], [after])[1].changes["accuracy"]
    assert (change.interval, change.method) == (unpaired_interval(1, 4, 4, 5), UNPAIRED)


@pytest.mark.parametrize(
    ("sft", "grpo", "against"),
    [
        # The last evaluation of the stage before; where none fits, the first one of the same stage.
        (["before:wwww", "step 9:wwwr", "after:wwrr"], ["step 20:wrrr", "end:rrrr"], "- before before after after"),
        # Of several sets of problems, the same one.
        (["math:wwrr", "code:wwwww"], ["math 2:wrrr", "code 2:wwwwr"], "- math math code"),
        # Where the stage before was asked others, the first one of the same stage.
        (["sft:rwww"], ["start:rwwwr", "end:rrwwr"], "- sft start"),
        # Problems by which checkpoints are chosen are compared with one another alone.
        (["sft:rwww"], ["v1:rrrw", "v2:rrrw", "end:rrww"], "- - v1 sft"),
        ([], ["start:rwww", "v1:rrrw", "v2:rrrw", "end:rrww"], "- - v1 start"),
    ],
)
def test_what_an_evaluation_is_compared_with(
    write_run: WriteRun, sft: list[str], grpo: list[str], against: str
) -> None:
    def made(names: list[str]) -> list[Evaluated]:
        split = {True: {"split": "validation"}, False: {}}
        return [evaluated(*each.split(":"), **split[each[0] == "v"]) for each in names]

    rows = compared(write_run, made(sft), made(grpo))
    assert " ".join(row.before.name if row.before else "-" for row in rows) == against


def test_answers_that_could_not_be_judged_are_no_part_of_an_accuracy_without_its_rows(write_run: WriteRun) -> None:
    verdicts = {"pass": 57, "wrong": 38, "infra_error": 5}
    record = {"stage": "x", "step": 3, "name": "after", "problems": 100, "accuracy": 0.6, "verdicts": verdicts}
    [made] = compared(write_run, [], [(record, [])])
    assert (made.right, made.judged, made.share("accuracy")) == (57, 95, (57, 95))


@pytest.mark.parametrize("is_gone", [True, False])
def test_completions_that_are_gone_or_another_evaluations_do_not_count_as_pairs(
    write_run: WriteRun, is_gone: bool
) -> None:
    record, rows = evaluated("after GRPO", "rrrr")
    after = (record, []) if is_gone else (record | {"accuracy": 0.5}, rows)
    assert compared(write_run, [evaluated("after SFT", "rwww")], [after])[1].changes["accuracy"].method == UNPAIRED


def test_the_accuracy_of_a_domain_is_compared_on_its_problems(write_run: WriteRun) -> None:
    made = [evaluated("before", "wwwrr"), evaluated("after", "rrrwr")]
    for place, (record, rows) in enumerate(made):
        record |= {"accuracy/math": (0.0, 1.0)[place], "accuracy/code": (1.0, 0.5)[place]}
        for i, row in enumerate(rows):
            row["domain"] = "math" if i < 3 else "code"
    changes = compared(write_run, made[:1], made[1:])[1].changes
    assert changes["accuracy/math"] == Change(1.0, paired_interval(3, 0, 3), PAIRED)
    assert changes["accuracy/code"] == Change(-0.5, paired_interval(0, 1, 2), PAIRED)
    assert changes["accuracy"].interval == paired_interval(3, 1, 5)


def test_pass_at_k_is_compared_problem_by_problem(write_run: WriteRun) -> None:
    before = evaluated("before", "ww", {"0": "rw", "1": "ww"}, **{"pass@1": 0.25, "pass@2": 0.5})
    after = evaluated("after", "rr", {"0": "rr", "1": "rw"}, **{"pass@1": 0.75, "pass@2": 1.0})
    changes = compared(write_run, [before], [after])[1].changes
    # Both problems gain 1/2 at k = 1; at k = 2 the first gains nothing and the second everything.
    assert (changes["pass@1"].difference, changes["pass@1"].interval) == (0.5, None)
    assert changes["pass@2"] == Change(0.5, mean_interval([0.0, 1.0]), MEANS)


def test_a_policy_is_compared_with_the_one_that_it_was_made_of(tmp_path: Path, write_run: WriteRun) -> None:
    sft, first, second = (evaluated(f"after {name}", "wwrr") for name in ("SFT", "first", "second"))
    root = tmp_path / "run"
    made_of = {"model": {"path": str(root / "sft" / "final")}}
    at_first = {"run": {"dir": str(root / "sft")}}
    write_run(root, stage="pipeline")
    for place, (name, made, recipe) in enumerate(
        (("sft", sft, at_first), ("one", first, made_of), ("two", second, made_of))
    ):
        status = write_run(root / name, evaluations=[made], recipe=recipe) / "status.json"
        status.write_text(status.read_text().replace("03:04:05", f"03:04:1{place}"))
    moved = tmp_path / "moved"
    for place in (root, moved):
        if place == moved:
            root.rename(moved)
        rows = compared_evaluations(read_run(place))
        assert [row.name for row in rows] == ["after SFT", "after first", "after second"]
        assert [row.before and row.before.name for row in rows] == [None, "after SFT", "after SFT"]


def rows_of(root: Path) -> list[list[str]]:
    """The rows of the last table of figures, each value with its note."""
    told = [
        [f"{value} | {value.note}" if getattr(value, "note", "") else str(value) for value in row]
        for row in figures(root).rows
    ]
    return [[value.replace("None", "–") for value in row] for row in told]


def figures(root: Path) -> Table:
    return [table for table in section(root, "evaluations").tables if table.kind == "figures"][-1]


def test_every_number_of_a_record_is_a_row_in_its_group(tmp_path: Path, write_run: WriteRun) -> None:
    more = {"accuracy/code": 0.5, "pass@16": 0.9, "pass@4": 0.8, "refusal_rate": 0.1, "win_rate": 0.4, "judge": 7.5}
    more |= {"over_refusals": 0.07, "win_rate_sampled": 0.3, "preference/longer": 0.6, "preference/difference": 1.5}
    more |= {"mean_length": 20.5, "truncated": 0.25, "needle/recall": 0.3, "accuracy/kind/title": 0.75}
    compared(write_run, [evaluated("after SFT", "rw", **more)], [])
    overview, table = section(tmp_path / "run", "evaluations").tables
    assert overview.heads == [
        "stage",
        "evaluation",
        "step",
        "problems",
        "accuracy",
        "pass@4",
        "pass@16",
        "verdicts (greedy)",
    ]
    assert overview.rows[0][-1] == Cell("1 pass, 1 wrong", "wide", bar=[("pass", 0.0, 50.0), ("wrong", 50.0, 50.0)])
    assert (table.title, table.heads) == ("sft: after SFT", ["", "n", "after SFT"])
    assert rows_of(tmp_path / "run") == [
        ["right answers"],
        ["all problems", "2", "50.0% | 9.5 to 90.5"],
        ["code", "–", "50.0%"],
        ["instructions followed, by kind"],
        ["title", "–", "75.0%"],
        ["sampled"],
        ["pass@4", "–", "80.0%"],
        ["pass@16", "–", "90.0%"],
        ["rates"],
        ["over_refusals", "–", "7.0%"],
        ["refusal_rate", "–", "10.0%"],
        ["win_rate", "–", "40.0%"],
        ["win_rate_sampled", "–", "30.0%"],
        ["answers"],
        ["mean_length", "–", "20.5"],
        ["truncated", "–", "25.0%"],
        ["other"],
        ["judge", "–", "7.5"],
        ["needle"],
        ["needle/recall", "–", "0.3"],
        ["preference"],
        ["preference/difference", "–", "1.5"],
        ["preference/longer", "–", "60.0%"],
    ]


def by_kind(name: str, *titles: bool, tokens: int) -> Evaluated:
    """An evaluation of problems that ask for a title; the last asks for no commas, and has none."""
    rows = [answer(str(i), "r" if met else "w", greedy=True) for i, met in enumerate(titles)]
    for i, (row, met) in enumerate(zip(rows, titles, strict=True)):
        row |= {"tokens": tokens + i, "finish_reason": "stop", "completion": "x " * tokens, "prompt": str(i)}
        row["counted"] = {"accuracy/kind/title": met, "degenerate_share": not met}
    rows[-1]["counted"] = {"accuracy/kind/no_comma": True, "degenerate_share": False}
    shares = {"accuracy/kind/title": fmean(titles[:-1]), "accuracy/kind/no_comma": 1.0}
    shares |= {"degenerate_share": 1 - (sum(titles[:-1]) + 1) / len(titles)}
    shares |= {"mean_length": tokens + (len(titles) - 1) / 2, "truncated": 0.0}
    right = sum(titles)
    record = {"name": name, "step": 0, "problems": len(titles), "accuracy": right / len(titles), **shares}
    return record | {"verdicts": {"pass": right, "wrong": len(titles) - right}}, rows


def test_each_kind_has_a_row_with_before_after_and_change(tmp_path: Path, write_run: WriteRun) -> None:
    before = by_kind("before", *[False] * 10, True, tokens=40)
    after = by_kind("after", *[True] * 9, False, True, tokens=20)
    # What hooks measured has been measured before by the same hook alone.
    drift = ({"name": "drift", "step": 9, "start": 2.0, "policy": 2.25, "difference": 0.25}, [])
    root = write_run(evaluations=[before, after, drift])
    assert figures(root).heads == ["", "n", "before", "after", "change"]
    rows = {row[0]: row[1:] for row in rows_of(root)}
    gain = " to ".join(f"+{100 * end:.1f}" for end in paired_interval(9, 0, 10))
    assert rows["title"] == ["10", "0.0% | 0.0 to 27.8", "90.0% | 59.6 to 98.2", f"+90.0 | {gain}"]
    assert rows["no_comma"][0] == "1"
    assert list(rows)[:2] == ["right answers", "all problems"]
    assert rows["mean_length"] == ["11", "45 | 43.04 to 46.96", "25 | 23.04 to 26.96", "−20"]
    assert rows["difference"] == ["–", "–", "0.25", "–"]
    tones = {str(row[0]): row[-1].tone for row in figures(root).rows if isinstance(row[-1], Cell) and len(row) > 1}
    assert tones["title"] == tones["degenerate_share"] == "good"
    assert rows["words an answer"][1:] == ["40", "20", "−20"]
    assert list(rows).index("drift") < list(rows).index("habits, against before") < list(rows).index("words an answer")
    page = write_report(root).read_text(encoding="utf-8")
    assert '<th class="over" colspan="5" scope="rowgroup"><span>right answers</span></th>' in page
    assert "<td>no_<wbr>comma</td>" in page


def test_a_kind_on_other_problems_is_compared_as_two_samples(write_run: WriteRun) -> None:
    before, after = by_kind("before", *[False] * 10, True, tokens=40), by_kind("after", *[True] * 8, True, tokens=40)
    change = compared(write_run, [before], [after])[1].changes["accuracy/kind/title"]
    assert change == Change(1.0, unpaired_interval(0, 10, 8, 8), UNPAIRED)


def test_what_the_answers_do_not_add_up_to_has_no_interval(write_run: WriteRun) -> None:
    record, rows = by_kind("before", False, True, True, tokens=40)
    (evaluation,) = compared(write_run, [(record | {"accuracy/kind/title": 0.75}, rows)], [])
    assert (evaluation.interval("accuracy/kind/title"), evaluation.share("accuracy/kind/no_comma")) == (None, (1, 1))


def test_pairs_are_not_compared_with_problems(write_run: WriteRun) -> None:
    record: dict[str, Any] = {"stage": "x", "step": 3, "name": "held-out pairs", "problems": 2, "pair_accuracy": 0.5}
    assert compared(write_run, [evaluated("after SFT", "rw")], [(record, [])])[1].before is None


def test_a_hook_is_compared_with_itself_in_the_stage_before(write_run: WriteRun) -> None:
    first, second = (({"name": "drift", "step": 1, "difference": value}, []) for value in (0.1, 0.3))
    needle = ({"name": "needle", "step": 1, "difference": 0.9}, [])
    made = compared(write_run, [first, needle], [second])
    assert made[2].before is made[0]
    assert made[2].changes["difference"].difference == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("before", "after", "told", "tone"), [("w", "r", "+100.0", "good"), ("r", "w", "−100.0", "bad")]
)
def test_a_change_beyond_chance_is_good_or_bad_news(
    tmp_path: Path, write_run: WriteRun, before: str, after: str, told: str, tone: str
) -> None:
    compared(write_run, [evaluated("before", before * 40)], [evaluated("after", after * 40)])
    figure = section(tmp_path / "run", "evaluations").tables[0].rows[1][4]
    assert (figure.note.partition(" ")[0], figure.tone) == (told, tone)


def pair(id_: str, completion: str, verdict: str, **more: Any) -> dict[str, Any]:
    row = {"id": id_, "greedy": True, "prompt": f"prompt of {id_}", "completion": completion, "verdict": verdict}
    return row | {"detail": f"because of {completion}"} | more


def held_out(name: str, *rows: dict[str, Any]) -> Evaluated:
    return {"name": name, "step": 0, "problems": len(rows), "accuracy": 0.5}, list(rows)


def test_each_prompt_has_its_two_answers_and_what_was_said_of_them(write_run: WriteRun) -> None:
    before = held_out("before", pair("a", "old", "wrong"), pair("b", "same", "pass"))
    after = held_out("after", pair("b", "same", "pass"), pair("a", "new " * 1000, "pass"))
    found = section(write_run(evaluations=[before, after]), "compared")
    assert "Of 2, 1 became right and 0 wrong; 1 were right both times" in found.note
    (table,) = found.tables
    assert table.heads == ["prompt", "before", "after"]
    prompt, was, is_ = table.rows[0]
    assert (str(prompt), str(was), was.note, was.tone) == ("prompt of a", "old", "wrong: because of old", "bad")
    assert (is_.note[:22], is_.tone) == ("pass: because of new n", "good")
    assert len(str(is_)) < 1300
    assert len(is_.note) < 1300


def test_what_changed_comes_first_and_in_turn(write_run: WriteRun) -> None:
    kinds = {"gain": ("wrong", "pass"), "loss": ("pass", "wrong"), "bad": ("wrong", "wrong"), "good": ("pass", "pass")}
    names = [f"{kind}{place}" for kind in ("good", "bad", "loss", "gain") for place in range(20)]
    before = held_out("before", *(pair(name, "x", kinds[name.rstrip("0123456789")][0]) for name in names))
    after = held_out("after", *(pair(name, "y", kinds[name.rstrip("0123456789")][1]) for name in names))
    rows = section(write_run(evaluations=[before, after]), "compared").tables[0].rows
    assert len(rows) == SHOWN_PAIRS
    assert [str(row[0]) for row in rows[:5]] == [
        f"prompt of {name}" for name in ("gain0", "loss0", "bad0", "good0", "gain1")
    ]


def test_answers_that_nothing_scored_are_shown_side_by_side_without_right_and_wrong(write_run: WriteRun) -> None:
    def unscored(name: str) -> Evaluated:
        rows = [pair(str(n), name, "unscored", reward=None) for n in range(20)]
        return {"name": name, "step": 0, "problems": 20, "verdicts": {"unscored": 20}, "mean_length": 3.0}, rows

    hook = ({"name": "mine", "step": 1, "b": 1.0}, [pair("0", "of a hook", "unscored")])
    found = section(write_run(evaluations=[unscored("before"), unscored("after"), hook]), "compared")
    (table,) = found.tables
    assert table.heads == ["prompt", "before", "after"]
    assert [str(row[0]) for row in table.rows] == [f"prompt of {n}" for n in range(0, 20, 2)]
    assert {(str(cell), cell.note, cell.tone) for row in table.rows for cell in row[1:]} == {
        ("before", "", ""),
        ("after", "", ""),
    }
    assert "right" not in found.note


def test_scored_answers_are_compared_with_scored_ones_before_any_others(write_run: WriteRun) -> None:
    unscored = [pair("a", "first", "unscored", reward=None)]
    start = ({"name": "start", "step": 0, "problems": 1, "verdicts": {"unscored": 1}, "mean_length": 3.0}, unscored)
    both = [held_out("before", pair("a", "old", "wrong")), held_out("after", pair("a", "new", "pass"))]
    assert "1 became right" in section(write_run(evaluations=[start, *both]), "compared").note


def test_sampled_answers_and_other_problems_are_left_out(write_run: WriteRun) -> None:
    elsewhere = held_out("elsewhere", pair("z", "x", "pass"))
    before = held_out("before", pair("a", "x", "wrong"), pair("a", "drawn", "pass", greedy=False))
    after = held_out("after", pair("a", "y", "pass"), pair("c", "y", "pass"))
    (table,) = section(write_run(evaluations=[elsewhere, before, after]), "compared").tables
    assert table.heads == ["prompt", "before", "after"]
    assert [[str(cell) for cell in row] for row in table.rows] == [["prompt of a", "x", "y"]]


def test_other_problems_of_the_same_id_are_not_compared(write_run: WriteRun) -> None:
    elsewhere = held_out("elsewhere", pair("a", "other", "pass", prompt="another prompt"))
    before, after = held_out("before", pair("a", "x", "wrong")), held_out("after", pair("a", "y", "pass"))
    (table,) = section(write_run(evaluations=[elsewhere, before, after]), "compared").tables
    assert [[str(cell) for cell in row] for row in table.rows] == [["prompt of a", "x", "y"]]


def test_a_run_with_one_evaluation_says_so(write_run: WriteRun) -> None:
    root = write_run(evaluations=[held_out("only", pair("a", "x", "pass"))])
    assert "No two evaluations" in section(root, "compared").note


@pytest.mark.parametrize(
    ("name", "config", "model"),
    [
        ("models/mine", LITE, "DeepSeek-V2-Lite"),
        ("models/mine", LARGE, "DeepSeek-V2"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", None, "DeepSeek-V2-Lite"),
        ("deepseek-ai/DeepSeek-V2", None, "DeepSeek-V2"),
        ("deepseek-ai/DeepSeek-Coder-V2-Lite-Base", LITE, None),
        ("deepseek-ai/DeepSeek-V2.5", LARGE, None),
        ("deepseek-ai/DeepSeek-V2", LITE | {"hidden_size": 128}, None),
        ("models/mine", None, None),
        ("models/mine", LITE | {"model_type": "deepseek_v3"}, None),
    ],
)
def test_a_model_is_known_by_its_sizes_or_else_by_its_name(
    write_run: WriteRun, name: str, config: dict[str, object] | None, model: str | None
) -> None:
    root = write_run(recipe={"model": {"path": name}}, tokenizer=False)
    if config is not None:
        (root / "final").mkdir()
        (root / "final" / "config.json").write_text(json.dumps(config))
    found = published_figures(read_run(root))
    assert (found["name"] if found else None) == model


def test_the_figures_are_those_of_the_report(write_run: WriteRun) -> None:
    lite, large = (
        section(write_run(name, recipe={"model": {"path": name}}, tokenizer=False), "evaluations").tables[-1]
        for name in ("DeepSeek-V2-Lite", "DeepSeek-V2")
    )
    # Table 7 for Lite, of which no reinforcement learning was reported; Table 3 for the large model.
    assert "arXiv:2405.04434, Tables 6 and 7" in lite.note
    assert lite.heads == ["benchmark", "base", "Chat (SFT)"]
    assert ["GSM8K", "41.1", "72"] in lite.rows
    assert large.title == "Published for DeepSeek-V2"
    assert large.heads == ["benchmark", "base", "Chat (SFT)", "Chat (RL)"]
    assert large.rows[:2] == [["MMLU", "78.5", "78.4", "77.8"], ["BBH", "78.9", "81.3", "79.7"]]
    assert ["MT-Bench", "–", "8.62", "8.97"] in large.rows
