"""A row is the same sample to a reward in training, in `align eval`, for `align score` and behind TRL's adapter."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from align.data.entries import card_of
from align.data.forms import FORMS
from align.data.loader import load_split
from align.data.own import read_user_file
from align.data.types import Example
from align.experience import reward_sample
from align.recipe import DataOptions
from align.tools.score_file import score_file
from reward import RewardTerm, Sample, Score, Verdict, register, registry, trl_reward_func
from rollout import FinishReason, Prompt, Trajectory

COMPLETION, TOKENS = r"It is \boxed{4}.", [5, 6, 7]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "2 + 2?"},
]
ROWS: dict[str, dict[str, Any]] = {
    "a text and an answer": {"prompt": "2 + 2?", "answer": 4, "unit": "cm", "steps": [1, 2]},
    "a conversation": {"prompt": CHAT, "ground_truth": "4", "domain": "sums", "unit": None},
    "a whole solution": {"prompt": "2 + 2?", "solution": r"First $\boxed{2}$, then $\boxed{4}$.", "level": "Level 3"},
    "a box in no gold": {"prompt": "2 + 2?", "answer": "so\n#### 4", "solution": "other"},
    "verl": {
        "data_source": "openai/gsm8k",
        "prompt": CHAT[-1:],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 3},
    },
    "ifeval": {"prompt": "Hi?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "columns in metadata": {"prompt": "2 + 2?", "answer": "4", "metadata": {"unit": "m", "more": 1}, "unit": "cm"},
    "nothing but a prompt": {"prompt": "2 + 2?", "tests": {"kind": "stdio"}},
}


TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
FORM_ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS, "unit": "cm"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
        "system": "Be brief.",
        "unit": "cm",
    },
    "alpaca": {"instruction": "Add.", "input": "2 + 2", "output": "4", "unit": "cm"},
    "completion": {"prompt": "2 + 2?", "completion": "4", "system_prompt": "Be brief.", "unit": "cm"},
    "verl": ROWS["verl"] | {"unit": "cm", "system": "Be brief."},
    "rlvr": {"messages": TURNS[:1], "ground_truth": "4", "dataset": "sums", "unit": "cm"},
    "ifeval": ROWS["ifeval"] | {"unit": "cm"},
    "problem": {"question": "2 + 2?", "solution": "4", "unit": "cm"},
    "prompt": {"prompt": "2 + 2?", "unit": "cm"},
}
"""A row of each form that has prompts to answer; pairs are never sampled from."""
MORE = [*TURNS, {"role": "user", "content": "And 2 + 2 again?"}]
ENDING_BY_ASKING: dict[str, dict[str, Any]] = {
    "messages that end by asking": {"messages": MORE, "unit": "cm"},
    "their text": {"messages": json.dumps(MORE), "answer": "4", "unit": "cm"},
    "sharegpt that ends by asking": {"conversations": MORE, "unit": "cm"},
}


@pytest.fixture
def seen() -> Iterator[list[Sample]]:
    """What a reward named `curious` was shown."""
    found: list[Sample] = []
    with patch.dict(registry._rewards.entries):

        @register("curious")
        def curious(sample: Sample) -> Score:
            found.append(sample)
            return Score(1.0, Verdict.PASS)

        yield found


def answered(example: Example) -> Sample:
    """What a reward sees of an answer that the policy gave."""
    prompt = Prompt(example.id, [1])
    trajectory = Trajectory.of_one_turn(prompt, 0, TOKENS, [-1.0] * 3, FinishReason.STOP, seed=1, weight_version=0)
    return reward_sample(example, trajectory, COMPLETION)


def in_training(file: Path) -> Sample:
    card = card_of(DataOptions(path=file))
    [example] = (e for split in card.splits for e in load_split(card, split).examples if "of interest" in e.id)
    return answered(example)


def scored(file: Path, row: dict[str, Any], seen: list[Sample]) -> Sample:
    file.write_text(json.dumps(row | {"completion": COMPLETION}) + "\n")
    score_file(RewardTerm(name="curious"), file, file.with_suffix(".out"))
    return seen.pop()


def by_trl(row: dict[str, Any], seen: list[Sample]) -> Sample:
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    conversational = isinstance(row["prompt"], list)
    completion = [{"role": "assistant", "content": COMPLETION}] if conversational else COMPLETION
    trl_reward_func("curious")(prompts=[row["prompt"]], completions=[completion], completion_ids=[TOKENS], **columns)
    return seen.pop()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_same_sample_everywhere(name: str, tmp_path: Path, seen: list[Sample]) -> None:
    row = {"id": "of interest", **ROWS[name]}
    others = [{**row, "id": str(n), "prompt": f"Other {n}?"} for n in range(5)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in [row, *others]))
    trained = in_training(file)
    samples = {
        "eval": answered(read_user_file(file)[0]),
        "score": scored(tmp_path / "completions.jsonl", row, seen),
        "trl": by_trl(row, seen),
    }
    # A completion of the policy has its place in its group behind the id; a file of completions has no token ids.
    assert (trained.id, samples["eval"].id, samples["score"].id) == (
        "mine/of interest#0",
        "of interest#0",
        "of interest",
    )
    assert trained.metadata["completion_tokens"] == 3
    assert "completion_tokens" not in samples["score"].metadata
    samples["score"] = replace(samples["score"], metadata={**samples["score"].metadata, "completion_tokens": 3})
    assert trained.prompt == ("Hi?" if name == "ifeval" else "2 + 2?")
    assert trained.ground_truth == (None if name in ("ifeval", "nothing but a prompt") else "4")
    for sample in samples.values():
        assert replace(sample, id=trained.id) == trained


def test_every_form_has_a_row_here() -> None:
    assert FORM_ROWS.keys() == {form.name for form in FORMS if form.kind != "pairs"}


@pytest.mark.parametrize("name", FORM_ROWS | ENDING_BY_ASKING)
def test_a_row_of_every_form_is_the_same_sample_in_training_evaluation_and_for_align_score(
    name: str, tmp_path: Path, seen: list[Sample]
) -> None:
    row = {"id": "of interest", **(FORM_ROWS | ENDING_BY_ASKING)[name]}
    others = [changed(row, n) for n in range(5)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in [row, *others]))
    trained = in_training(file)
    evaluated = next(answered(e) for e in read_user_file(file) if e.id == "of interest")
    assert replace(evaluated, id=trained.id) == trained
    assert trained.metadata["unit"] == "cm"
    assert len(trained.metadata["messages"]) == 3 or name not in ENDING_BY_ASKING
    if name != "completion":  # there the column holds what is scored
        rescored = scored(tmp_path / "completions.jsonl", row, seen)
        assert replace(rescored, id=trained.id, metadata={**rescored.metadata, "completion_tokens": 3}) == trained


def changed(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row with another id and prompt."""
    return json.loads(
        json.dumps({**row, "id": str(number)}).replace("2 + 2", f"2 + {number}").replace("Hi?", f"{number}?")
    )


def test_every_column_but_the_prompt_is_in_the_metadata(tmp_path: Path, seen: list[Sample]) -> None:
    row = {"id": "1", **ROWS["a text and an answer"]}
    sample = by_trl(row, seen)
    others = {name: value for name, value in row.items() if name != "prompt"}
    asked = [{"role": "user", "content": "2 + 2?"}]
    assert sample.metadata == {**others, "messages": asked, "completion_tokens": 3}
    assert (sample.prompt, sample.ground_truth, sample.domain) == ("2 + 2?", "4", "user")
