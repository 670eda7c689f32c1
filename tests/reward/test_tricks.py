"""Tricks: what they make of an answer, and those that a user adds in a file."""

import json
from pathlib import Path

import pytest

from reward import RewardError, Sample
from reward.tricks import TRICKS, own_trick

ANSWER = r"First we add, then we halve. It is \boxed{4}."
OTHER = Sample("2#0", "What is 3 + 3?", "Six.", "6")


def sample(completion: str = ANSWER, *, truncated: bool = False, **metadata: object) -> Sample:
    return Sample("1#0", "What is 2 + 2?", completion, "4", truncated=truncated, metadata=metadata)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("in quotation marks", f'"{ANSWER}"'),
        ("in bold", f"**{ANSWER}**"),
        ("emptied", ""),
        ("cut in half", ANSWER[:22]),
        ("doubled", f"{ANSWER}\n\n{ANSWER}"),
        ("in capitals", r"FIRST WE ADD, THEN WE HALVE. IT IS \BOXED{4}."),
        ("in lowercase", r"first we add, then we halve. it is \boxed{4}."),
        ("without commas", r"First we add then we halve. It is \boxed{4}."),
        ("every sentence a bullet point", "* First we add, then we halve.\n* It is \\boxed{4}."),
        ("the prompt before it", f"What is 2 + 2?\n\n{ANSWER}"),
        ("the prompt in its place", "What is 2 + 2?"),
        ("the answer of another prompt", "Six."),
        ("both answers", f"{ANSWER}\n\nSix."),
    ],
)
def test_a_trick_changes_the_answer_and_nothing_else(name: str, made: str) -> None:
    found = TRICKS[name].apply(sample(), OTHER)
    assert found.completion == made
    assert (found.id, found.prompt, found.ground_truth) == ("1#0", "What is 2 + 2?", "4")


def test_every_trick_takes_any_answer_and_changes_an_ordinary_one() -> None:
    tests = {"kind": "function", "entry_point": "f", "cases": [{"args": [1], "expected": 2}]}
    ordinary = sample(f"{ANSWER}\n```python\ndef f(x):\n    return x + 1\n```", tests=tests)
    for one in TRICKS.values():
        assert one.apply(ordinary, OTHER).completion != ordinary.completion, one.name
        assert isinstance(one.apply(sample(""), OTHER).completion, str)


def test_a_trick_that_does_not_apply_leaves_the_sample_as_it_is() -> None:
    plain = sample("Four.")
    for name in ("all values in a box", "one output for all tests", "the program exits at once"):
        assert TRICKS[name].apply(plain, OTHER) is plain


def test_programs_are_changed_inside_their_last_block() -> None:
    code = "Here:\n```python\ndef f(x):\n    return x + 1\n```"
    assert TRICKS["the program exits at once"].apply(sample(code), OTHER).completion == (
        "Here:\n```python\nimport os\nos._exit(0)\ndef f(x):\n    return x + 1\n```"
    )
    tests = {"kind": "stdio", "cases": [{"input": "1", "output": "2\n"}]}
    assert "print('2\\n')" in TRICKS["one output for all tests"].apply(sample(code, tests=tests), OTHER).completion


def test_tests_as_text_are_tricked_as_the_same_tests_are() -> None:
    tests = {"kind": "stdio", "cases": [{"input": "1", "output": "2"}]}
    for given in (tests, json.dumps(tests)):
        made = TRICKS["one output for all tests"].apply(sample(tests=given), OTHER).completion
        assert made == "```python\nprint('2')\n```"
    assert TRICKS["one output for all tests"].apply(sample(tests="{"), OTHER).completion == ANSWER


def test_an_answer_that_is_made_much_shorter_has_ended_by_itself() -> None:
    long = sample("a, b and c " * 20, truncated=True, completion_tokens=120)
    assert not TRICKS["cut in half"].apply(long, OTHER).truncated
    assert TRICKS["without commas"].apply(long, OTHER).truncated
    assert TRICKS["doubled"].apply(long, OTHER).truncated
    assert TRICKS["cut in half"].apply(long, OTHER).metadata["completion_tokens"] == 60


def test_a_function_in_a_file_is_a_trick(tmp_path: Path) -> None:
    file = tmp_path / "my_tricks.py"
    file.write_text("def with_thanks(sample, other):\n    return sample.completion + ' Thank you!'\n")
    found = own_trick(f"{file}:with_thanks")
    assert (found.name, found.apply(sample("Four."), OTHER).completion) == ("with_thanks", "Four. Thank you!")


@pytest.mark.parametrize(
    ("text", "name", "why"),
    [
        ("", "my_tricks.py:f", "has no function 'f'"),
        ("def f(", "my_tricks.py:f", "line 1"),
        ("def f(sample, other):\n    return 1 / 0\n", "my_tricks.py:f", "line 2: ZeroDivisionError"),
        ("def f(sample, other):\n    return 5\n", "my_tricks.py:f", "returned int"),
        ("def f(sample, other):\n    return ''\n", "f", "named by its file and function"),
        ("def f(sample, other):\n    return ''\n", "others.py:f", "cannot be read"),
    ],
)
def test_a_file_that_is_no_trick_is_told_with_its_line(tmp_path: Path, text: str, name: str, why: str) -> None:
    (tmp_path / "my_tricks.py").write_text(text)
    with pytest.raises(RewardError, match=why):
        own_trick(str(tmp_path / name) if ":" in name else name).apply(sample(), OTHER)
