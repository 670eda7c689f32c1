"""Needle in a haystack: where the fact is, how long the prompt is, and what counts as found."""

import re
from typing import Any

import pytest

from align.errors import UserError
from align.evaluate.hooks import Metrics, PolicyCheckpoint, run
from align.evaluate.needle import Haystack, haystack, recalls

LONGEST_SENTENCE = 64  # more tokens than any sentence of the filler has


def text_of(hidden: Haystack) -> str:
    (message,) = hidden.messages
    return message["content"]


def position(hidden: Haystack) -> float:
    """Where the fact begins, as a share of the haystack's characters."""
    hay = text_of(hidden).split("\n\n")[1]
    fact = hay.index("The secret number")
    return fact / (len(hay) - len(re.findall(r"The secret number[^.]*\.", hay)[0]))


def reader(prompt: str, *, of: slice = slice(None)) -> str:
    """A model that remembers everything it reads of a part of its prompt."""
    place = re.findall(r"What is the secret number of (\w+)\?", prompt)[0]
    found = re.findall(rf"The secret number of {place} is (\d+)\.", prompt[of])
    return f"It is {found[0]}." if found else "I do not know."


@pytest.mark.parametrize("length", [140, 333, 2000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_prompt_is_as_long_as_asked_for_and_has_its_fact_at_the_depth(
    checkpoint: PolicyCheckpoint, length: int, depth: float
) -> None:
    hidden = haystack(checkpoint.tokenizer, length, depth, "a")
    rendered = checkpoint.tokenizer.apply_chat_template(hidden.messages, add_generation_prompt=True)
    tokens = rendered["input_ids"] if not isinstance(rendered, list) else rendered
    assert hidden.tokens == len(tokens)
    assert length - LONGEST_SENTENCE < hidden.tokens <= length
    assert text_of(hidden).count(hidden.answer) == 1
    if length == 2000:
        assert position(hidden) == pytest.approx(depth, abs=0.03)


def test_all_of_it_follows_from_the_seed(checkpoint: PolicyCheckpoint) -> None:
    one, same, other = (haystack(checkpoint.tokenizer, 300, 0.5, id_) for id_ in ("0/1", "0/1", "1/1"))
    assert one == same
    assert text_of(one) != text_of(other)


def measure(checkpoint: PolicyCheckpoint, fleet: Any, **params: Any) -> Metrics:
    defaults = {"lengths": [250, 400], "depths": [0.0, 1.0], "per_cell": 3, "max_new_tokens": 32}
    return run("needle", checkpoint, fleet, defaults | params)


def test_a_model_that_reads_everything_recalls_everything(checkpoint: PolicyCheckpoint, scripted: Any) -> None:
    metrics = measure(checkpoint, scripted(reader))
    assert set(metrics.values) == {"recall", "recall/250", "recall/400"} | {
        f"recall/{length}/{depth}" for length in (250, 400) for depth in (0, 1)
    }
    assert set(metrics.values.values()) == {1.0}
    assert len(metrics.rows) == 2 * 2 * 3


def test_recall_is_told_by_length_and_depth(checkpoint: PolicyCheckpoint, scripted: Any) -> None:
    fleet = scripted(lambda prompt: reader(prompt, of=slice(-220, None)))
    values = measure(checkpoint, fleet).values
    assert {name: values[name] for name in values if name.count("/") == 2} == {
        "recall/250/0": 0.0,
        "recall/250/1": 1.0,
        "recall/400/0": 0.0,
        "recall/400/1": 1.0,
    }
    assert values["recall"] == values["recall/250"] == 0.5
    assert [options.temperature for options in fleet.calls] == [0.0]


def test_a_length_that_cannot_be_is_refused_before_anything_is_asked(
    checkpoint: PolicyCheckpoint, scripted: Any
) -> None:
    fleet = scripted(reader)
    with pytest.raises(UserError, match=r"490 tokens with 32 new ones does not fit into rollout\.max_length = 512"):
        measure(checkpoint, fleet, lengths=[200, 490])
    with pytest.raises(UserError, match=r"50 tokens are too few: the question alone takes \d+"):
        measure(checkpoint, fleet, lengths=[50])
    assert not fleet.calls


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("123456", True),
        (" The number is 123456.", True),
        ("123,456", True),
        ("12,123456", True),
        ("1123456", False),
        ("1234567", False),
        ("123 456", False),
        ("", False),
    ],
)
def test_the_number_must_stand_by_itself(text: str, found: bool) -> None:
    assert recalls(text, "123456") is found
