"""Rows in the shapes of HumanEval, MBPP and APPS become tasks that the reward `code_tests` can judge."""

import json
import logging
from pathlib import Path

import pytest

from align.data.cards import load_card
from align.data.loader import load_split
from align.data.types import Example
from align.errors import UserError
from reward import Sample, Verdict
from reward.code.answer import code_tests

from ...reward.corpus.code_corpus import NEEDS_ISOLATION, humaneval
from ..rows import write_rows

HUMAN_EVAL = {
    "task_id": "Mine/0",
    "prompt": 'LIMIT = 9\n\ndef capped(n: int) -> int:\n    """n, but at most LIMIT."""\n',
    "entry_point": "capped",
    "canonical_solution": "    return min(n, LIMIT)\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(3) == 3\n    assert candidate(12) == LIMIT\n",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function to halve a number.",
    "code": "import math\r\ndef helper(x):\r\n    return x / 2\r\ndef halve(x):\r\n    return helper(x)",
    "test_list": ["assert halve(4) == 2", "assert sum([halve(6)]) == 3", "assert isclose(halve(1), 0.5)"],
    "test_setup_code": "from math import isclose",
    "challenge_test_list": [],
}
HALVE = "def halve(x):\n    return x / 2"


def apps(cases, starter="", question="What is asked.\n\n\n"):
    return {"id": 0, "question": question, "input_output": json.dumps(cases), "starter_code": starter}


STDIO = {"inputs": ["2\n", ["3", "4"]], "outputs": ["4\n", ["6", "8"]]}
STDIO_PROGRAM = "import sys\nfor line in sys.stdin:\n    print(2 * int(line))"
CODEWARS = {"fn_name": "pairs", "inputs": [[1, 2], [3, 4]], "outputs": [[[1, 2]], [[3, 4]]]}
LEETCODE = {"fn_name": "ones", "inputs": [[{"1": 5}], [{"2": 7}]], "outputs": [[5], [7]]}
LEETCODE_STARTER = "class Solution:\n    def ones(self, counts: Dict[int, int]) -> List[int]:\n        "


def load(card: str, *rows: dict, directory: Path) -> list[Example]:
    return load_split(load_card(card), "test", path=write_rows(directory / "rows.jsonl", rows)).examples


def verdict(example: Example, code: str) -> Verdict:
    sample = Sample(
        example.id, example.prompt_text, f"```python\n{code}\n```", None, example.domain, metadata=example.metadata
    )
    [score] = code_tests([sample])
    return score.verdict


def test_every_problem_of_humaneval_becomes_a_task(tmp_path):
    problems = humaneval()
    examples = load("humaneval", *problems, directory=tmp_path)
    assert len(examples) == 164
    for problem, example in zip(problems, examples, strict=True):
        assert example.prompt_text.startswith(problem["prompt"])
        assert example.prompt_text.endswith("block.")
        assert example.metadata["tests"]["entry_point"] == problem["entry_point"]


@NEEDS_ISOLATION
@pytest.mark.parametrize("number", [0, 38, 163])  # 38 needs a helper of its prompt
def test_canonical_solutions_of_humaneval_pass_and_a_wrong_body_fails(number, tmp_path):
    problem = humaneval()[number]
    [example] = load("humaneval", problem, directory=tmp_path)
    assert verdict(example, problem["prompt"] + problem["canonical_solution"]) is Verdict.PASS
    assert verdict(example, problem["prompt"] + "    return None") is Verdict.WRONG


def test_the_prompt_of_mbpp_shows_the_asserts_as_its_paper_does(tmp_path):
    [example] = load("mbpp", MBPP, directory=tmp_path)
    shown = "\n".join(MBPP["test_list"])
    assert example.prompt_text.startswith(f"{MBPP['text']}\nYour code should pass these tests:\n\n{shown}\nAnswer")
    assert example.metadata["tests"] == {
        "kind": "assert",
        "entry_point": "halve",
        "code": shown,
        "setup": "from math import isclose",
    }
    assert (example.domain, example.answer, example.response) == ("code", None, None)


def test_setup_may_be_a_list_of_imports(tmp_path):
    [example] = load("mbpp", MBPP | {"test_setup_code": ["import os", "from math import isclose"]}, directory=tmp_path)
    assert example.metadata["tests"]["setup"] == "import os\nfrom math import isclose"


def test_tests_of_what_only_the_solution_defines_are_left_out_and_counted(tmp_path, caplog):
    needs_class = MBPP | {"code": f"class Pair: pass\n{HALVE}", "test_list": ["assert halve(Pair()) == 2"]}
    with caplog.at_level(logging.WARNING):
        assert len(load("mbpp", MBPP, needs_class, MBPP, directory=tmp_path)) == 2
    [warning] = caplog.messages
    assert "card mbpp, split test: 1 of 3 rows left out" in warning
    assert "rows.jsonl, line 2: the tests use Pair, which only the solution defines" in warning


def test_a_program_of_apps_reads_standard_input(tmp_path):
    [example] = load("apps", apps(STDIO), directory=tmp_path)
    assert example.prompt_text.startswith("What is asked.\n\nRead from standard input")
    assert example.metadata["tests"] == {
        "kind": "stdio",
        "cases": [{"input": "2\n", "output": "4\n"}, {"input": "3\n4", "output": "6\n8"}],
    }


def test_a_function_of_codewars_has_its_outputs_taken_out_of_their_lists(tmp_path):
    [example] = load("apps", apps(CODEWARS, "def pairs(a, b):\n\t"), directory=tmp_path)
    assert "\n\ndef pairs(a, b):\nAnswer" in example.prompt_text
    assert example.metadata["tests"] == {
        "kind": "function",
        "entry_point": "pairs",
        "cases": [{"args": [1, 2], "expected": [1, 2]}, {"args": [3, 4], "expected": [3, 4]}],
    }


def test_a_method_of_leetcode_is_asked_for_as_a_function(tmp_path):
    [example] = load("apps", apps(LEETCODE, LEETCODE_STARTER), directory=tmp_path)
    assert "\n\ndef ones(counts: Dict[int, int]) -> List[int]:\nAnswer" in example.prompt_text
    assert [case["expected"] for case in example.metadata["tests"]["cases"]] == [[5], [7]]
    assert example.metadata["tests"]["cases"][0]["args"] == [{1: 5}]


@NEEDS_ISOLATION
@pytest.mark.parametrize(
    ("card", "row", "right", "wrong"),
    [
        ("mbpp", MBPP, HALVE, HALVE + " + 1"),
        ("apps", apps(STDIO), STDIO_PROGRAM, "print(4)"),
        ("apps", apps(CODEWARS), "def pairs(a, b):\n    return a, b", "def pairs(a, b):\n    return [(a, b)]"),
        (
            "apps",
            apps(LEETCODE, LEETCODE_STARTER),
            "def ones(counts):\n    return [counts[min(counts)]]",
            "def ones(counts):\n    return counts[min(counts)]",
        ),
    ],
)
def test_a_program_is_judged_by_the_tests_of_its_row(card, row, right, wrong, tmp_path):
    [example] = load(card, row, directory=tmp_path)
    assert verdict(example, right) is Verdict.PASS
    assert verdict(example, wrong) is Verdict.WRONG


LONG_NUMBER = '{"fn_name": "f", "inputs": [[1]], "outputs": [[' + "9" * 5000 + "]]}"


@pytest.mark.parametrize(
    ("cases", "reason"),
    [
        ("", "there are no tests"),
        (None, "there are no tests"),
        ({"inputs": [], "outputs": []}, "0 inputs and 0 outputs"),
        ({"inputs": ["1", "2"], "outputs": ["1"]}, "2 inputs and 1 outputs"),
        ({"inputs": [1], "outputs": ["1"]}, "tests of kind 'stdio' must be"),
        ({"fn_name": "f", "inputs": [1], "outputs": [[1]]}, "tests of kind 'function' must be"),
        ({"fn_name": "a b", "inputs": [[1]], "outputs": [[1]]}, "'a b' is no name of a function"),
        (LONG_NUMBER, "digits"),
    ],
)
def test_rows_of_apps_without_a_usable_test_are_left_out_and_counted(cases, reason, tmp_path, caplog):
    bad = apps(STDIO) | {"input_output": json.dumps(cases) if isinstance(cases, dict) else cases}
    with caplog.at_level(logging.WARNING):
        [example] = load("apps", bad, apps(STDIO), directory=tmp_path)
    assert example.id == "apps/test/1"
    assert "line 1: " in caplog.text
    assert reason in caplog.text


def test_a_table_where_no_row_can_be_judged_is_an_error(tmp_path):
    with pytest.raises(
        UserError, match=r"card apps, split test: no row can be judged\. The first: .*line 1: there are no"
    ):
        load("apps", apps(STDIO) | {"input_output": ""}, directory=tmp_path)


@pytest.mark.parametrize(
    ("card", "row", "message"),
    [
        ("humaneval", {key: HUMAN_EVAL[key] for key in ("prompt", "test")}, "no column 'entry_point' for the tests"),
        ("humaneval", HUMAN_EVAL | {"test": ""}, "column 'test' is empty: the tests is missing"),
        ("humaneval", HUMAN_EVAL | {"test": "def check(c:"}, "column 'test' is no Python: "),
        ("humaneval", HUMAN_EVAL | {"test": "assert capped(3) == 3"}, r"column 'test' defines no check\(candidate\)"),
        ("humaneval", HUMAN_EVAL | {"prompt": "Cap a number."}, "the prompt is no Python"),
        ("humaneval", HUMAN_EVAL | {"entry_point": "cap"}, "the prompt defines no 'cap', as column 'entry_point' says"),
        ("mbpp", MBPP | {"test_list": [1]}, r"column 'test_list' must hold text for the tests, not \[1\]"),
        ("mbpp", MBPP | {"test_list": []}, "each assert in column 'test_list' must call one and the same function"),
        ("mbpp", MBPP | {"test_list": ["assert half(4) == 2"]}, "'code'; they call none"),
        ("mbpp", MBPP | {"test_list": ["assert halve(helper(8)) == 2"]}, "they call halve, helper"),
        ("mbpp", MBPP | {"test_list": ["assert halve(4) = 2"]}, "column 'test_list' is no Python"),
        ("mbpp", MBPP | {"code": "print 'halve'"}, "column 'code' is no Python"),
        ("mbpp", MBPP | {"test_setup_code": 3}, "column 'test_setup_code' must hold text"),
        ("apps", apps(CODEWARS, "def pairs(\ud800): "), "column 'starter_code': character .* half of a surrogate"),
        ("apps", apps(STDIO) | {"input_output": "{"}, "column 'input_output' is not JSON: "),
        ("apps", apps({"inputs": "2"}), "column 'input_output' must hold JSON of lists named inputs and outputs"),
        ("apps", apps(STDIO) | {"input_output": STDIO}, "column 'input_output' must hold text for the tests"),
    ],
)
def test_a_row_of_another_shape_is_an_error_that_names_its_column(card, row, message, tmp_path):
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 1: .*{message}"):
        load(card, row, directory=tmp_path)
