"""Which examples a stage trains on, and which of them a step takes: a function of seed and step."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.cards import load_card
from align.data.drawing import Source, Stream, items_of_step, key_hash, refill_of_step, shares
from align.data.entries import entries_of
from align.data.loader import load_split
from align.data.types import Example, Preference
from align.errors import UserError
from align.experience import encode_problems
from align.model.policy import load_tokenizer
from align.session.run import open_run
from align.stages.grpo import load_grpo_data
from align.stages.preferences import load_prompts
from align.stages.reward_model import encode_pair
from align.stages.sft import encode_demonstration, load_sft_data

from ..rows import write_card, write_rows
from ..tiny import events, small_recipe


@given(st.integers(1, 500), st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_shares_add_up_and_miss_the_exact_share_by_less_than_one(total: int, weights: list[float]) -> None:
    counts = shares(total, weights)
    assert sum(counts) == total
    assert all(abs(count - total * w / sum(weights)) < 1 for count, w in zip(counts, weights, strict=True))


@given(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9))
def test_every_item_comes_once_an_epoch(seed: int, count: int, epoch: int) -> None:
    sources = [Source("all", range(41), count)]
    steps = 41 // count
    epoch_steps = range(epoch * steps, (epoch + 1) * steps)
    taken = [item for step in epoch_steps for item in items_of_step(sources, seed=seed, step=step)]
    assert len(taken) == steps * count
    assert max(Counter(taken).values()) == 1


def test_a_step_has_each_source_s_part_evenly_mixed() -> None:
    sources = [Source("math", [f"m{i}" for i in range(100)], 4), Source("code", [f"c{i}" for i in range(60)], 2)]
    step = items_of_step(sources, seed=0, step=3)
    assert [item[0] for item in step] in (["m", "c", "m", "m", "c", "m"], ["m", "m", "c", "m", "c", "m"])
    assert step == items_of_step(sources, seed=0, step=3)
    assert step != items_of_step(sources, seed=1, step=3)
    assert not set(step) & set(items_of_step(sources, seed=0, step=4))


def odd(item: str) -> list[str]:
    """What rows of an uneven number give; the others give nothing."""
    return [item] if int(item[1:]) % 2 else []


def source(name: str, count: int, a_step: int, kind: str) -> Source[str]:
    items = [f"{name}{i}" for i in range(count)]
    if kind == "table":
        return Source(name, items, a_step, odd)
    return Source(
        name,
        Stream(items, lambda: iter(items)) if kind == "stream" else items,
        a_step,
        odd if kind == "stream" else None,
    )


@pytest.mark.parametrize("kind", ["list", "table", "stream"])
@pytest.mark.parametrize("step", [0, 3, 7])
def test_what_a_step_and_its_rounds_of_refill_take_is_all_different_and_of_the_same_sources(
    kind: str, step: int
) -> None:
    def taken() -> list[list[str | None]]:
        sources = [source("m", 60, 4, kind), source("c", 40, 2, kind)]
        return [
            list(items_of_step(sources, seed=0, step=step)),
            *(refill_of_step(sources, seed=0, step=step, round=number) for number in range(1, 21)),
        ]

    rounds = taken()
    there = [item for items in rounds for item in items if item is not None]
    assert len(set(there)) == len(there) == (100 if kind == "list" else 50)
    for items in rounds:
        assert all(item is None or item[0] == str(first)[0] for item, first in zip(items, rounds[0], strict=True))
    assert None not in rounds[4]
    assert rounds[-1] == [None] * 6
    assert rounds == taken()


TOKENIZER = load_tokenizer("recipes/nano/policy")


def card(directory: Path, name: str, **prompts: Sequence[str]) -> str:
    """A card of files, one for each split, with the answer 1 to every prompt."""
    for split, asked in prompts.items():
        rows = ({"prompt": prompt, "response": r"\boxed{1}", "answer": "1"} for prompt in asked)
        write_rows(directory / f"{split}.jsonl", rows)
    splits = {split: {"from": f"{split}.jsonl"} for split in prompts}
    fields = {"prompt": "prompt", "response": "response", "answer": "answer"}
    return str(write_card(directory / f"{name}.md", {"kind": "file", "splits": splits, "fields": fields}))


def test_a_second_entry_of_a_card_has_ids_and_a_digest_of_its_own(tmp_path: Path) -> None:
    data = [{"card": "nano_math", "levels": [1]}, {"card": "nano_math", "levels": [1], "params": {"worked_share": 0.0}}]
    made = small_recipe("grpo", tmp_path, data=data, grpo={"steps": 1, "prompts_per_step": 80, "group_size": 2})
    with open_run(made) as run:
        loaded = load_grpo_data(made, TOKENIZER, run)
    ids = [problem.example.id for problem in items_of_step(loaded.sources, seed=0, step=0)]
    assert len(set(ids)) == len(ids) == 80
    assert all(problem.prompt.id == problem.example.id for problem in loaded.sources[1].items)
    assert [source.card for source in loaded.sources] == ["nano_math", "nano_math@2"]
    assert all(problem.prompt.id.endswith("@2") for problem in loaded.sources[1].items)


def test_a_single_entry_has_the_ids_that_it_always_had(tmp_path: Path) -> None:
    made = small_recipe("grpo", tmp_path, data=[{"card": "nano_math", "levels": [1]}])
    with open_run(made) as run:
        [source] = load_grpo_data(made, TOKENIZER, run).sources
    assert source.card == "nano_math"
    assert [problem.example for problem in source.items] == load_split(
        load_card("nano_math"), "train", levels=[1]
    ).examples


def test_entries_that_differ_in_their_share_alone_are_one_with_both_shares(tmp_path: Path) -> None:
    data = [{"card": "nano_math", "share": 1}, {"card": "nano_code"}, {"card": "nano_math", "share": 2}]
    math, code = entries_of(small_recipe("sft", tmp_path, data=data).data, "sft")
    assert (math.name, math.data.share, code.name) == ("nano_math", 3, "nano_code")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_training_prompt_of_any_evaluated_card_is_left_out_and_it_is_on_record(tmp_path: Path, stage: str) -> None:
    own = card(tmp_path / "own", "own", train=["Sum?", " what IS it?", "More?"], validation=["V?"], test=["T?"])
    other = card(tmp_path / "other", "other", test=["What is it?", "Else?"])
    made = small_recipe(stage, tmp_path, data=[{"card": own}], evaluation={"cards": [other]})
    with open_run(made) as run:
        loaded = load_sft_data(made, TOKENIZER, run) if stage == "sft" else load_grpo_data(made, TOKENIZER, run)
        [found] = events(tmp_path, "held_out")
    assert len(loaded.sources[0].items) == 2
    assert found["left_out"] == 1
    assert found["compared"] == {"own/validation": 0, "own/test": 0, "other/test": 1} | (
        {f"{own}/validation": 0} if stage == "sft" else {}
    )


def test_the_sft_inside_another_stage_is_held_apart_from_what_that_is_evaluated_on(tmp_path: Path) -> None:
    own = card(tmp_path / "own", "own", train=["Sum?", "What is it?", "More?"], validation=["V?"], test=["T?"])
    made = small_recipe("sft", tmp_path, data=[{"card": own}])
    with open_run(made) as run:
        loaded = load_sft_data(made, TOKENIZER, run, {"other/test": {key_hash("what is it?")}})
    assert len(loaded.sources[0].items) == 2


def test_one_file_is_not_read_as_training_and_validation_data_alike(tmp_path: Path) -> None:
    own = card(tmp_path / "own", "own", train=["Sum?", "More?"], validation=["V?"], test=["T?"])
    file = tmp_path / "own" / "train.jsonl"
    for stage, load in (("sft", load_sft_data), ("preferences", load_prompts)):
        made = small_recipe(stage, tmp_path / stage, data=[{"card": own, "path": file}])
        refused = pytest.raises(
            UserError, match=r"train\.jsonl is one file, and .* give a directory with .*validation\.jsonl"
        )
        with refused, open_run(made) as run:
            load(made, TOKENIZER, run)


@pytest.mark.parametrize(
    ("trained", "validated", "refused"),
    [
        ([1, 2, 3], [2, 3], None),
        ([1, 3], [1, 2, 3], "split train: no level 2; there are only 1, 3"),
        ([1, 2], [3], "split validation: no level 1, 2; there are only 3"),
    ],
)
def test_the_levels_of_the_data_are_demanded_of_what_is_trained_on_alone(
    trained: Sequence[int], validated: Sequence[int], refused: str | None, tmp_path: Path
) -> None:
    for split, levels in (("train", trained), ("validation", validated), ("test", [1])):
        rows = ({"prompt": f"{split} {n}?", "completion": "1", "level": level} for n, level in enumerate(levels))
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    own = str(
        write_card(tmp_path / "own.md", {"kind": "own", "path": "data", "splits": ["train", "validation", "test"]})
    )
    made = small_recipe("sft", tmp_path, data={"card": own, "levels": [1, 2]})
    with open_run(made) as run:
        if refused is None:
            loaded = load_sft_data(made, TOKENIZER, run)
            assert (len(loaded.sources[0].items), len(loaded.validation)) == (2, 1)
            return
        with pytest.raises(UserError, match=refused):
            load_sft_data(made, TOKENIZER, run)


LONG = "Sum? " + "1" * 500


@pytest.mark.parametrize(
    ("stage", "load"), [("sft", load_sft_data), ("grpo", load_grpo_data), ("preferences", load_prompts)]
)
def test_a_prompt_that_is_too_long_is_left_out_and_counted_or_refuses_the_run(
    tmp_path: Path, stage: str, load: Callable[..., Any]
) -> None:
    own = card(tmp_path / "own", "own", train=["Sum?", LONG, "More?"], validation=["V?"], test=["T?"])
    made = small_recipe(stage, tmp_path, data=[{"card": own}])
    with open_run(made) as run:
        loaded = load(made, TOKENIZER, run)
        [found] = [event for event in events(tmp_path, "warning") if "too_long" in event]
    parts = {part.split: part.problems for part in loaded} if stage == "preferences" else {}
    kept = parts["train"] if parts else loaded.sources[0].items
    assert len(kept) == 2
    assert (found["too_long"], found["examples"], found["card"]) == (1, 3, own)
    refusing = small_recipe(stage, tmp_path / "refusing", data=[{"card": own, "too_long": "refuse"}])
    with (
        pytest.raises(UserError, match=r"1 of 3 examples have more than \d+ tokens \(.*rollout\.max_length"),
        open_run(refusing) as run,
    ):
        load(refusing, TOKENIZER, run)


EXAMPLE = Example("row 7", ({"role": "user", "content": "Q"},), "It is 4.", None, "math")


@pytest.mark.parametrize(
    ("encode", "what"),
    [
        (lambda tokenizer: encode_problems(tokenizer, [EXAMPLE]), "prompt"),
        (lambda tokenizer: encode_demonstration(tokenizer, EXAMPLE), "example"),
        (
            lambda tokenizer: encode_pair(tokenizer, Preference("row 7", EXAMPLE.messages, "a", "b", "math"), 0.0),
            "preference",
        ),
    ],
)
def test_a_row_that_the_chat_template_refuses_is_named(encode: Callable[[Any], object], what: str) -> None:
    tokenizer = load_tokenizer("recipes/nano/policy")
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    with pytest.raises(UserError, match=rf"{what} 'row 7': .* refuses .* not today"):
        encode(tokenizer)
