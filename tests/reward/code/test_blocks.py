"""Which block of an answer is its program, however models write them."""

import time

import pytest

from reward.code.blocks import program

ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    "opening",
    [
        "```python",
        "```Python",
        "```python3",
        "```py",
        "``` py3",
        "```python3.11",
        '```python title="a.py"',
        "```{.python .numberLines}",
        "```",
        "~~~",
        "~~~python",
        "`````python",
        "Code: ```python",
        "- ```python",
        "1. ```python",
    ],
)
def test_a_fence_opens_a_block_of_python_or_of_no_language(opening: str) -> None:
    closing = "".join(letter for letter in opening if letter in "`~")
    assert program(f"It adds.\n\n{opening}\n{ADD}{closing}\n\nDone.") == ADD


@pytest.mark.parametrize("language", ["cpp", "bash", "text", "pycon", "python-repl", "output"])
def test_a_block_of_another_language_is_no_program(language: str) -> None:
    other = f"```{language}\nprint(3)\n```\n"
    assert program(other) is None
    assert program(f"{other}```python\n{ADD}```\n{other}", "add") == ADD


@pytest.mark.parametrize("text", ["", ADD, "Write ```print(3)``` instead.", "`print(3)`"])
def test_without_a_block_there_is_no_program(text: str) -> None:
    assert program(text) is None


@pytest.mark.parametrize(
    "example",
    [
        "```\nadd(1, 2) -> 3\n```",
        "```\n3 4\n```",
        "```\n.\n└── main.py\n```",
        "```\nprint(add(1, 2))\n```",
        "```python\n>>> add(1, 2)\n3\n```",
        "```python\n# Output: 3\n```",
        "~~~text\n3\n~~~",
        "```\nstill open",
    ],
)
def test_an_example_behind_the_program_is_not_the_program(example: str) -> None:
    source = f"{ADD}\nprint(add(*map(int, input().split())))\n"
    answer = f"```python\n{source}```\n\nExample:\n\n{example}\n"
    assert program(answer) == program(answer, "add") == source


@pytest.mark.parametrize("usage", ["print(add(1, 2))", "from solution import add\nassert add(1, 2) == 3", "add(1, 2)"])
@pytest.mark.parametrize("language", ["python", ""])
def test_of_a_function_the_program_is_the_last_block_that_defines_it(usage: str, language: str) -> None:
    first, last = ADD.replace("+", "-"), ADD
    blocks = [f"```{language}\n{source}\n```\n" for source in (first, last, usage)]
    assert program("\n".join(blocks), "add") == last


@pytest.mark.parametrize(
    "defined", ["add = lambda a, b: a - b", "add: object = max", "class add:\n    pass", "async def add(a): pass"]
)
def test_there_are_other_ways_to_define_a_function(defined: str) -> None:
    assert program(f"```python\n{ADD}```\nNo:\n```python\n{defined}\n```", "add") == defined + "\n"


@pytest.mark.parametrize("output", ["3", "YES", "[1, 2]", "3 4\n5 6", "Output: 7"])
def test_of_blocks_without_a_language_the_program_is_the_last_that_looks_like_one(output: str) -> None:
    assert program(f"```\nprint(input())\n```\nprints\n```\n{output}\n```\n") == "print(input())\n"
    assert program(f"```\n{output}\n```") == output + "\n"


def test_the_last_program_counts_even_where_it_is_broken() -> None:
    assert program("```python\nprint(3)\n```\nBetter:\n```python\nprint(3\n```\n") == "print(3\n"
    assert program("```\nprint(3)\n```\nBetter:\n```\nprint(3\n```\n") == "print(3\n"


def test_a_last_block_without_an_end_is_the_program_and_no_earlier_one() -> None:
    assert program("```python\nprint(3)") == "print(3)\n"
    assert program("```python\nprint(3)\n```\nBetter:\n```python\nprint(") == "print(\n"


@pytest.mark.parametrize("indent", [" ", "  ", "    ", "\t", "        "])
def test_what_a_block_in_a_list_is_indented_by_is_no_part_of_it(indent: str) -> None:
    block = "".join(f"{indent}{line}\n" for line in f"```python\n{ADD}\n{ADD}```".split("\n"))
    assert program(f"1. Add:\n\n{block}\n2. Done.\n") == f"{ADD}\n{ADD}"
    assert program(block.replace("```python", "```python\r")) == f"{ADD}\n{ADD}"


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ("````python\n'''\n```\n'''\nprint(3)\n````", "'''\n```\n'''\nprint(3)\n"),
        ("~~~python\n'''\n```\n'''\nprint(3)\n~~~", "'''\n```\n'''\nprint(3)\n"),
        ('```python\n"""\n```\nf(1)\n```\n"""\nprint(3)\n```\nDone.', '"""\n```\nf(1)\n```\n"""\nprint(3)\n'),
        (
            "```python\n'''\n```python\nf(1)\n```\n'''\nprint(3)\n```\nDone.",
            "'''\n```python\nf(1)\n```\n'''\nprint(3)\n",
        ),
        (
            "```python\ndef f():\n    '''\n    ```\n    '''\nprint(3)\n```",
            "def f():\n    '''\n    ```\n    '''\nprint(3)\n",
        ),
        ("```markdown\n# Title\n```python\nprint(3)\n```\n```", "print(3)\n"),
        ("````markdown\n# Title\n```python\nprint(3)\n```\n````", "print(3)\n"),
        ("```python\nprint(3)```\nDone.", "print(3)\n"),
    ],
)
def test_a_fence_within_a_program_or_around_a_block_does_not_end_it(answer: str, source: str) -> None:
    assert program(answer) == source


@pytest.mark.parametrize("unfinished", ["x = 1", "x = '''", "print("])
def test_a_block_of_python_that_never_ended_ends_where_the_next_begins(unfinished: str) -> None:
    assert program(f"```python\n{unfinished}\n\nNo, wait.\n```python\nprint(3)\n```") == "print(3)\n"
    assert program(f"```python\n{unfinished}\n```\nNo, wait.\n```python\nprint(3)\n```") == "print(3)\n"


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ("<think>\n```python\nprint(2)\n```\n</think>\n```python\nprint(3)\n```", "print(3)\n"),
        ("<think>\n```python\nprint(2)\n```\n</think>\n```\nprint(3)\n```", "print(3)\n"),
        ("<think>\n```python\nprint(2)\n</think>\n\n```python\nprint(3)\n```", "print(3)\n"),
        ("Hm.\n```python\nprint(2)\n</think>\n\n```python\nprint(3)\n```", "print(3)\n"),
        ("<think>Easy.</think>```python\nprint(3)\n```", "print(3)\n"),
        ("<think>\n```python\nprint(2)\n```\n</think>\nIt is done.", None),
        ("Hm.\n```python\nprint(2)\n```\n</think>\nIt is done.", None),
        ("<think>\n```python\nprint(2)\n```\nHm", None),
        ("```python\nprint('<think>', '</think>')\n```", "print('<think>', '</think>')\n"),
    ],
)
def test_a_thought_holds_no_program(answer: str, source: str | None) -> None:
    assert program(answer) == source


def test_no_answer_takes_long_to_read() -> None:
    """What policies that have lost their way write: one thing again and again."""
    started = time.monotonic()
    for start, again in (
        ("", "`"),
        ("", "```\n"),
        ("", "```python\n"),
        ("", "</think>\n"),
        ("```", " "),
        ("```python\n", "x\n"),
        ("```python\n'''\n", "```\n"),
        ("```python\n", "'''\n```\n"),
        ("", "~~~`"),
        ("", "1. "),
    ):
        program(start + again * (60_000 // len(again)) + "`x", "add")
    assert time.monotonic() - started < 60
