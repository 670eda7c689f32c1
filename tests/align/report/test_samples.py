"""Which samples a page holds, and their tokens as text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.report import samples
from align.report.read import read_run
from align.report.samples import (
    CHARACTERS_OF_A_TEXT,
    EVALUATION_SAMPLES,
    TRAINING_SAMPLES,
    Decoder,
    as_data,
    by_interest,
    by_problem,
    to_json,
)

NANO = Path(__file__).parents[3] / "recipes" / "nano" / "policy" / "tokenizer.json"

WriteRun = Callable[..., Path]
SampleRow = Callable[..., dict[str, Any]]


def test_masked_best_and_worst_samples_come_first() -> None:
    rows: list[dict[str, Any]] = [{"reward": i / 100, "trained_on": True} for i in range(100)]
    rows[40]["trained_on"] = False
    rows[60]["reward"] = None
    rows[61]["reward"] = float("nan")
    order = by_interest(rows)
    assert sorted(order) == list(range(100))
    assert {40, 60, 61, 99, 98, 0, 1} <= set(order[:12])


def test_evaluations_show_the_same_problems_whatever_their_rewards() -> None:
    def rows(reward: float) -> list[dict[str, Any]]:
        return [{"reward": reward * i, "greedy": greedy} for greedy in (True, False) for i in range(50)]

    assert by_problem(rows(1.0)) == by_problem(rows(-3.0))
    assert all(place < 50 for place in by_problem(rows(1.0))[:50])


def test_tokens_become_the_text_that_they_are_pieces_of(write_run: WriteRun, sample_row: SampleRow) -> None:
    row = sample_row("1+1=2 \\boxed{2}", 1.0)
    data = as_data(read_run(write_run(samples={1: [row]})))
    (packed,) = data["rows"]
    texts = [data["pieces"][place] for place in packed["pieces"]]
    assert "".join(texts[:-1]) == "1+1=2 \\boxed{2}"
    assert packed["special"] == [len(texts) - 1]
    assert packed["log_probs"] == row["log_probs"]
    assert packed["mean_log_prob"] == pytest.approx(sum(row["log_probs"]) / len(texts), abs=1e-3)


def test_tokens_that_the_policy_did_not_sample_are_listed_as_given(write_run: WriteRun, sample_row: SampleRow) -> None:
    row = sample_row("1+1=2", 1.0, log_probs=[-1.0, 0.0, None, -3.0, -2.0, -2.0])
    row |= {"sampled": [True, False, False, True, True, True], "turns": [{"start": 0, "end": 1}], "experts": None}
    (packed,) = as_data(read_run(write_run(samples={1: [row]})))["rows"]
    assert packed["given"] == [1, 2]
    assert packed["mean_log_prob"] == -2.0
    short = row | {"sampled": [True]}
    (bare,) = as_data(read_run(write_run("short", samples={1: [short]})))["rows"]
    assert "given" not in bare


def test_a_sample_has_the_conversation_that_was_answered(write_run: WriteRun, sample_row: SampleRow) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "", "tool_calls": [call, {"name": "odd", "arguments": "1"}]},
        {"role": "tool", "name": "add", "content": "2"},
    ]
    metadata = json.dumps({"messages": messages, "level": 3})
    rows = [
        sample_row("2", 1.0, metadata=text) for text in (metadata, metadata, "", "no JSON", '{"messages": 3}', None)
    ]
    data = as_data(read_run(write_run(samples={1: rows})))
    assert data["prompts"] == [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": "", "calls": ['add({"a": 1})', "odd(1)"]},
            {"role": "tool", "content": "2", "name": "add"},
        ],
        [{"role": "user", "content": "What is 1 + 1?"}],
    ]
    assert sorted(row["prompt"] for row in data["rows"]) == [0, 0, 1, 1, 1, 1]


def test_a_token_has_the_learners_difference_and_its_version(write_run: WriteRun, sample_row: SampleRow) -> None:
    row = sample_row("1+1=2", 1.0, log_probs=[-1.0, 0.0, -2.0, -3.0, -2.0, -2.0])
    row |= {"sampled": [True, False, True, True, True, True], "weight_versions": [{"start": 0, "version": 3}]}
    learned = row | {"learner_log_probs": [-0.98766, 0.0, -2.0, float("nan"), None, -2.000012]}
    older = {key: value for key, value in row.items() if key != "weight_versions"} | {"weight_version": 7}
    rows = as_data(read_run(write_run(samples={1: [learned], 2: [older]})))["rows"]
    assert rows[0]["differences"] == [0.0123, None, 0.0, None, None, 0.0]
    assert (rows[0]["versions"], rows[0]["turns"]) == ([[0, 3]], [[0, 6]])
    assert (rows[1]["versions"], rows[1].get("differences")) == ([[0, 7]], None)


@pytest.mark.parametrize(
    ("said", "completion", "turns"),
    [
        ("<think>\nso</think> 4", "<think>\nso</think> 4", 1),
        ("so</think> 4", "<think>\nso</think> 4", 1),
        ("<think>\n\n</think>\n\n4", "4", 1),
        ("\n4", "4", 1),
        ("call 4 end", "end", 2),
    ],
)
def test_tokens_are_shown_of_thoughts_and_turns(
    write_run: WriteRun, sample_row: SampleRow, said: str, completion: str, turns: int
) -> None:
    row = sample_row(said, 1.0) | {"completion": completion}
    row["turns"] = [{"start": n, "end": n + 1, "finish_reason": "stop"} for n in range(turns)]
    (packed,) = as_data(read_run(write_run(samples={1: [row]})))["rows"]
    assert "pieces" in packed
    (other,) = as_data(read_run(write_run("other", samples={1: [row | {"completion": "5"}]})))["rows"]
    assert "pieces" not in other


@pytest.mark.parametrize("text", ["日本語 and 🦊🦊", "ﷺ naïve", "a\n\n  b"])
def test_a_character_of_several_tokens_is_one_piece(text: str) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(NANO)).encode(text, add_special_tokens=False).ids
    pieces = Decoder(NANO).pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_as_broken() -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(NANO)).encode("a🦊", add_special_tokens=False).ids
    assert Decoder(NANO).pieces(ids[:-1])[-1].startswith("\ufffd")


def test_tokens_stay_uncoloured_where_no_tokenizer_fits(write_run: WriteRun, sample_row: SampleRow) -> None:
    rows = [sample_row("2", 1.0), sample_row("2", 1.0) | {"completion": "another text"}]
    none = as_data(read_run(write_run("none", samples={1: rows}, tokenizer=False)))
    assert ["pieces" in row for row in none["rows"]] == [False, False]
    foreign = as_data(read_run(write_run("foreign", samples={1: rows})))
    assert {row["completion"]: "pieces" in row for row in foreign["rows"]} == {"2": True, "another text": False}
    broken = write_run("broken", samples={1: rows}, tokenizer=False)
    (broken / "final").mkdir()
    (broken / "final" / "tokenizer.json").write_text("{}")
    assert not any("pieces" in row for row in as_data(read_run(broken))["rows"])


def test_a_page_holds_as_many_of_each_step_and_no_more_than_the_cap(write_run: WriteRun, sample_row: SampleRow) -> None:
    row = sample_row("2", 0.3)
    step = [row] * 600 + [row | {"reward": 9.0, "completion": "best"}, row | {"trained_on": False}]
    answers = [row | {"greedy": True}] * 1500
    root = write_run(
        samples=dict.fromkeys((1, 2, 30, 400, 5000), step),
        evaluations=[({"name": "after", "step": 5000}, answers)],
    )
    data = as_data(read_run(root))
    assert [source["shown"] for source in data["sources"]] == [TRAINING_SAMPLES // 5] * 5 + [EVALUATION_SAMPLES]
    assert [source["total"] for source in data["sources"]] == [602] * 5 + [1500]
    assert sum(row["completion"] == "best" for row in data["rows"]) == 5
    assert sum(row["masked"] for row in data["rows"]) == 5
    assert data["prompts"] == [[{"role": "user", "content": "What is 1 + 1?"}]]


def test_the_bytes_of_the_samples_are_bounded(write_run: WriteRun, sample_row: SampleRow) -> None:
    row = sample_row("2", 0.3)
    long = [row | {"completion": f"{i}" + "<&>" * 9000} for i in range(12)]
    run = read_run(write_run(samples={1: long, 2: long, 3: long}))
    whole, small = as_data(run, limit=50_000_000), as_data(run, limit=1_000_000)
    assert len(whole["rows"]) == 36
    assert 0 < len(small["rows"]) < 36
    assert len(to_json(small).encode()) <= 1_100_000
    assert all(len(row["completion"]) < CHARACTERS_OF_A_TEXT + 40 for row in whole["rows"])
    assert small["sources"][-1]["step"] == 3
    assert as_data(run, limit=10)["rows"] == []


def test_tables_of_evaluations_that_are_no_answers_are_left_out(write_run: WriteRun) -> None:
    """Pairs that a reward model told apart, and texts of a policy that a hook measured; of a hook nobody may know how they were sampled."""
    tables = {
        "held-out pairs": {"id": "1", "chosen": "a", "rejected": "b"},
        "drift": {"prompt": "p", "answer": "the start's"},
        "needle": {"id": "1", "prompt": "p", "completion": "c"},
        "before": {"id": "1", "prompt": "p", "completion": "c", "greedy": False},
    }
    data = as_data(
        read_run(write_run(evaluations=[({"name": name, "step": 0}, [row]) for name, row in tables.items()]))
    )
    assert [source["evaluation"] for source in data["sources"]] == ["needle", "before"]
    assert [row.get("greedy") for row in data["rows"]] == [None, False]


def test_an_answer_that_nobody_was_to_score_is_not_masked() -> None:
    assert samples._row({"completion": "4", "reward": None, "verdict": "infra_error"})["masked"]
    assert not samples._row({"completion": "4", "reward": None, "verdict": "unscored"})["masked"]
