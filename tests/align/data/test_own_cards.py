"""Cards whose source are files of one's own: their keys, and what is read in their place."""

from collections import Counter
from pathlib import Path

import pytest

from align.data.cards import load_card
from align.data.drawing import Stream
from align.data.entries import entries_of, evaluated
from align.data.loader import domains_of, load_split
from align.model.policy import load_tokenizer
from align.recipe import DataOptions, EvaluationOptions
from align.session.run import open_run
from align.stages.sft import load_sft_data

from ..rows import chats, problems, write_card, write_rows
from ..tiny import small_recipe

TOKENIZER = load_tokenizer("recipes/nano/policy")


def test_a_card_may_have_files_of_ones_own_beside_it_as_its_source(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [*problems(39), problems(1, 50)[0] | {"domain": "user"}])
    files = {"kind": "own", "path": "mine.jsonl", "splits": ["train", "test"]}
    card = load_card(write_card(tmp_path / "kept.md", files, domain="sums"))
    examples = [example for split in ("train", "test") for example in load_split(card, split).examples]
    assert Counter(example.domain for example in examples) == {"sums": 39, "user": 1}
    assert domains_of(card) == ["sums", "user"]


EVERY_SPLIT = ["train", "validation", "test"]


def test_the_keys_of_such_a_card_s_source_hold_as_those_of_an_entry_do(tmp_path: Path) -> None:
    rows = chats(60)
    rows[3]["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    card = write_card(
        tmp_path / "kept.md",
        {
            "kind": "own",
            "path": str(write_rows(tmp_path / "mine.jsonl", rows)),
            "splits": EVERY_SPLIT,
            "bad_rows": "leave_out",
            "stream": True,
        },
    )
    made = small_recipe("sft", tmp_path, data={"card": str(card)}, evaluation={"cards": ["nano_math"]})
    with open_run(made) as run:
        [loaded] = load_sft_data(made, TOKENIZER, run).sources
        assert isinstance(loaded.items, Stream)
        assert loaded.encode is not None
        given = [loaded.encode(row) for row in loaded.items[: len(loaded.items)]]
    assert given.count([]) == 1
    data = {"card": str(card), "limit": 5}
    made = small_recipe("sft", tmp_path / "few", data=data, evaluation={"cards": ["nano_math"]})
    with open_run(made) as run:
        [chosen] = load_sft_data(made, TOKENIZER, run).sources
        assert not isinstance(chosen.items, Stream)
        assert len(chosen.items) == 5


def test_a_path_beside_such_a_card_is_read_in_place_of_its_files(tmp_path: Path) -> None:
    card = write_card(
        tmp_path / "kept.md",
        {"kind": "own", "path": str(write_rows(tmp_path / "mine.jsonl", problems(40))), "splits": EVERY_SPLIT},
    )
    other, held = (
        write_rows(tmp_path / "other.jsonl", problems(60, 100)),
        write_rows(tmp_path / "held.jsonl", problems(7, 200)),
    )
    data = DataOptions(card=str(card), path=other)
    [entry] = entries_of([data], "grpo")
    trained = {example.prompt_text for example in load_split(entry.card, "train", path=entry.path).examples}
    assert trained < {row["question"] for row in problems(60, 100)}
    for split in ("test", "validation"):
        [asked] = evaluated(EvaluationOptions(path=held, split=split), [data])
        loaded = load_split(asked.card, split, path=asked.path)
        assert [example.prompt_text for example in loaded.examples] == [row["question"] for row in problems(7, 200)]


def test_the_instruction_of_a_card_is_in_the_conversations_that_are_learned_from_too(tmp_path: Path) -> None:
    more = {"role": "user", "content": "More."}
    rows = chats(20) + [{"messages": [*row["messages"], more]} for row in chats(40)[20:]]
    write_rows(tmp_path / "data" / "chat.jsonl", rows)
    files = {"kind": "own", "path": "data/chat.jsonl", "splits": ["train", "test"]}
    card = load_card(write_card(tmp_path / "told.md", files, instruction="Be brief."))
    for example in load_split(card, "train").examples:
        asked, answered = example.conversation
        assert example.messages[-1]["content"].endswith(".\nBe brief.")
        assert asked["content"].endswith(".\nBe brief.")
        assert answered == {"role": "assistant", "content": example.response}


@pytest.mark.parametrize("kind", ["own", "generator"])
def test_two_cards_whose_examples_begin_their_ids_alike_have_ids_of_their_own(tmp_path: Path, kind: str) -> None:
    held = {"against": ["validation", "test"], "why": "so"}
    cards = []
    for name in ("algebra", "geometry"):
        own = {"kind": "own", "path": str(write_rows(tmp_path / name / "train.jsonl", problems(60)))}
        source = own if kind == "own" else {"kind": "generator", "name": "nano_math"}
        splits = dict.fromkeys(EVERY_SPLIT, "some")
        cards.append(str(write_card(tmp_path / f"{name}.md", source, splits=splits, decontamination=held)))
    data = [DataOptions(card=card) for card in cards]
    chosen = EvaluationOptions(cards=cards)
    for entries in (entries_of(data, "grpo"), evaluated(EvaluationOptions(), data), evaluated(chosen, data)):
        assert [entry.mark for entry in entries] == ["", "@2"]


def test_cards_of_one_generator_whose_ids_differ_keep_them() -> None:
    entries = entries_of([DataOptions(card=name) for name in ("nano_helpful", "nano_safety")], "reward_model")
    assert [entry.name for entry in entries] == ["nano_helpful", "nano_safety"]
