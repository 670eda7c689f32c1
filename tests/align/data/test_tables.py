r"""Tables of the hub and local ones: boxed answers, levels, and files that the hub's client cannot find by itself."""

import json
import logging

import pytest

from align.data.cards import load_card
from align.data.loader import load_split
from align.errors import UserError
from reward import Sample, Verdict
from reward.math.answer import math_answer

from ..rows import write_rows


def math_row(solution=r"Twice $\boxed{2}$ is $\boxed{\frac{8}{2}}$.", level="Level 3"):
    return {"problem": "What is 2 + 2?", "level": level, "type": "Prealgebra", "solution": solution}


def load_math(directory, *rows, **options):
    return load_split(load_card("math"), "test", path=write_rows(directory / "rows.jsonl", rows), **options).examples


def test_the_answer_of_math_is_the_last_box_of_its_solution(tmp_path):
    [example] = load_math(tmp_path, math_row())
    assert (example.answer, example.level, example.domain) == (r"\frac{8}{2}", 3, "math")
    assert example.response == math_row()["solution"]
    assert example.prompt_text == "What is 2 + 2?\nPut the final answer in \\boxed{}."


def test_boxes_that_are_joined_are_one_answer(tmp_path):
    [example] = load_math(tmp_path, math_row(r"So $x=\boxed{2}$ or $x=\boxed{3}$."))
    assert example.answer == "2, 3"
    completions = {r"\boxed{3} and \boxed{2}": Verdict.PASS, r"\boxed{2, 3}": Verdict.PASS, r"\boxed{3}": Verdict.WRONG}
    samples = [Sample(said, example.prompt_text, said, example.answer, "math") for said in completions]
    assert [score.verdict for score in math_answer(samples)] == list(completions.values())


def test_the_reward_math_judges_examples_of_math(tmp_path):
    [example] = load_math(tmp_path, math_row())
    answers = {"4": Verdict.PASS, r"\frac{16}{4}": Verdict.PASS, "5": Verdict.WRONG}
    samples = [Sample(a, example.prompt_text, rf"\boxed{{{a}}}", example.answer, "math") for a in answers]
    assert [score.verdict for score in math_answer(samples)] == list(answers.values())


@pytest.mark.parametrize(("published", "level"), [("Level 5", 5), (4, 4), (3.0, 3), ("3.0", 3), ("Level ?", None)])
def test_a_level_is_the_number_it_ends_in(published, level, tmp_path):
    assert load_math(tmp_path, math_row(level=published))[0].level == level


def test_levels_can_be_chosen(tmp_path):
    rows = [math_row(level=f"Level {n}") for n in (1, 2, 1, 5)]
    assert [example.id for example in load_math(tmp_path, *rows, levels=[1])] == ["math/test/0", "math/test/2"]


def test_a_blank_box_is_left_out_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        [example] = load_math(tmp_path, math_row(r"There are $\boxed{}$ of them."), math_row())
    assert example.id == "math/test/1"
    assert r"1 of 2 rows left out. The first: " in caplog.text
    assert r"line 1: the last \boxed{} is blank" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (math_row("It is 4."), r"column 'solution' has no \\boxed\{\} with the answer"),
        (math_row(level="hard"), "column 'level' must end in a whole number, the level, unlike 'hard'"),
        (math_row(level=2.5), "column 'level' must end in a whole number, the level, unlike '2.5'"),
        ({"problem": "?", "solution": r"\boxed{1}"}, "no column 'level' for the level"),
    ],
)
def test_a_row_without_box_or_level_is_named(row, message, tmp_path):
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: {message}"):
        load_math(tmp_path, math_row(), row)


@pytest.fixture
def asked(monkeypatch):
    """What the hub's client is asked for; it gives one program of APPS."""
    import datasets

    calls = []

    def answer(*args, **options):
        calls.append((args, options))
        cases = json.dumps({"inputs": [""], "outputs": [options["split"]]})
        return [{"question": f"Print {options['split']}.", "input_output": cases, "starter_code": ""}]

    monkeypatch.setattr(datasets, "load_dataset", answer)
    return calls


def test_files_of_a_repository_are_read_at_the_revision_of_the_card(asked):
    card = load_card("apps")
    [example] = load_split(card, "test").examples
    assert example.prompt_text.startswith("Print test.")
    files = f"hf://datasets/codeparrot/apps@{card.source.revision}/test.jsonl"
    assert asked == [(("json",), {"data_files": {"test": files}, "split": "test"})]


def test_a_card_for_evaluation_only_has_nothing_to_train_on():
    with pytest.raises(UserError, match="no split 'train', only test"):
        load_split(load_card("humaneval"), "train")
