"""The hook `instructions`: which requests it asks, and what it counts."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest

from align.errors import UserError
from align.evaluate import instructions
from align.evaluate.hooks import PolicyCheckpoint, check_params, check_ready, run
from align.tasks.instructions import generate
from reward import RewardError

ANSWERS = ("This is a text without any form at all.", "* One, two\n* THREE", "")


@pytest.fixture
def asked(checkpoint: PolicyCheckpoint, scripted: Callable[..., Any]) -> Callable[..., Any]:
    """The hook's metrics, with a policy that gives each of the ANSWERS in turn; and the prompts that it was asked."""

    def run_hook(**params: Any) -> tuple[Any, list[str]]:
        prompts: list[str] = []

        def answer(prompt: str) -> str:
            prompts.append(prompt.removeprefix("User: ").removesuffix("\n\nAssistant:"))
            return ANSWERS[len(prompts) % len(ANSWERS)]

        roomy = dataclasses.replace(checkpoint, max_length=4096)
        return run("instructions", roomy, scripted(answer), {"max_new_tokens": 200} | params), prompts

    return run_hook


def test_it_asks_the_first_requests_of_the_cards_test_split_by_the_seed(asked: Callable[..., Any]) -> None:
    metrics, prompts = asked(count=30, seed=3)
    examples = generate("test", seed=3)[:30]
    assert sorted(prompts) == sorted(example.prompt_text for example in examples)
    assert [row["id"] for row in metrics.rows] == [example.id for example in examples]
    assert {kind for row in metrics.rows for kind in row["instructions"]} == {
        one["kind"] for example in examples for one in example.metadata["instructions"]
    }


def test_accuracy_is_of_prompts_and_of_instructions_strict_and_loose(asked: Callable[..., Any]) -> None:
    metrics, _ = asked(count=60)
    values, rows = dict(metrics.values), metrics.rows
    for criterion in ("strict", "loose"):
        met = [row[criterion] for row in rows]
        assert values.pop(f"prompt_{criterion}") == sum(map(all, met)) / 60
        assert values.pop(f"instruction_{criterion}") == sum(map(sum, met)) / sum(map(len, met))
    assert all(loose or not strict for row in rows for loose, strict in zip(row["loose"], row["strict"], strict=True))
    assert any(row["loose"] != row["strict"] for row in rows), "the first line of a list is forgiven"
    assert not any(any(row["loose"]) for row in rows if not row["completion"])
    assert values.pop("degenerate_share") == 1.0
    for name, value in values.items():
        kind = name.removeprefix("instruction_loose/")
        of_kind = [
            met
            for row in rows
            for one, met in zip(row["instructions"], row["loose"], strict=True)
            if one.endswith(f":{kind}")
        ]
        assert value == pytest.approx(sum(of_kind) / len(of_kind))


@pytest.mark.parametrize("opened", ["<think>", ""])
def test_a_thought_is_not_a_part_of_the_answer(
    asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, opened: str
) -> None:
    plain, _ = asked(count=20)
    thoughts = [f"{opened}One, two. <<Three>> P.S. {{}}</think>\n{answer}" for answer in ANSWERS]
    monkeypatch.setattr(sys.modules[__name__], "ANSWERS", thoughts)
    assert asked(count=20)[0].values == plain.values


def test_what_cannot_be_asked_or_checked_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ready("instructions", {})
    with pytest.raises(UserError, match=r"count: .*less than or equal to 600"):
        check_params("instructions", {"count": 601})

    def missing() -> None:
        raise RewardError("needs lm_eval: pip install 'moe-align[evaluation]'")

    monkeypatch.setattr(instructions, "checkers", missing)
    with pytest.raises(UserError, match="needs lm_eval"):
        check_ready("instructions", {})
