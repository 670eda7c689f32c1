"""The tables of what training changed: each measure before, after over the seeds, and the interval of the difference."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from align.data.types import Example

REQUEST = Example(
    "one",
    ({"role": "user", "content": "Describe rain to a child. Use no commas."},),
    None,
    None,
    "instructions",
    metadata={"topic": ["rain"], "instructions": [{"kind": "punctuation:no_comma", "args": {}, "text": ""}]},
)


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("smollm2/compare.py")


def row(script: ModuleType, text: str, finish_reason: str = "stop") -> dict[str, Any]:
    answer = {"id": "one", "prompt": "", "completion": text, "finish_reason": finish_reason}
    found: dict[str, Any] = script.counted(answer, REQUEST)
    return found


def test_of_an_answer_is_counted_what_it_follows_and_what_nobody_asked_for(script: ModuleType) -> None:
    good = "Rain is water that falls from the clouds and makes the garden grow."
    found = row(script, good)
    assert (found["follows"], found["right"], found["trained"], found["quoted"], found["words"]) == (
        *(True,) * 3,
        False,
        13,
    )
    assert not row(script, f'"{good}"')["right"]
    assert row(script, f'"{good}')["quoted"]
    assert not row(script, good, "length")["right"]
    assert row(script, "Rain!")["degenerate"]
    assert not row(script, good.replace("that", ", that"))["follows"]


def test_the_seeds_are_averaged_and_the_interval_is_over_requests(script: ModuleType) -> None:
    def models(*shares: str) -> list[dict[str, list[dict[str, Any]]]]:
        keys = ("right", "follows", "degenerate", "quoted", "lines")
        made = [
            {"own": [dict.fromkeys(keys, mark == "y") | {"trained": True, "words": 10} for mark in share]}
            for share in shares
        ]
        return [made[0], *({**each, "drift": [{"difference": 0.5}]} for each in made[1:])]  # type: ignore[list-item]

    lines = list(script.table(models("nnnn", "yynn", "yynn")))
    assert "| held-out requests: right (4) | 0.0 % | 50.0 % | +50.0 (-6.6 to +106.6) |" in lines
    assert "| held-out requests: right (4) | 0.0 % | 25.0 % | +25.0 (-3.3 to +53.3) |" in list(
        script.table(models("nnnn", "yynn", "nnnn"))
    )
    assert lines[-1] == "| drift on ordinary requests, nats a token | 0.00 | 0.50 | |"
    assert not any("published" in line for line in lines)
