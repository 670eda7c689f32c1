"""Data without a card: what a file is called and split into, what becomes of rows that cannot be used, and what the stages make of it."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from align.data.cards import OwnSource
from align.data.drawing import Stream, held_out_places, key_hash
from align.data.entries import card_of, evaluated
from align.data.loader import domains_of, load_preferences, load_split
from align.data.own import name_of, own_card, read_source, read_user_file
from align.errors import UserError
from align.model.policy import load_tokenizer
from align.recipe import DataOptions, EvaluationOptions, load_recipe
from align.session.checks import check_evaluation_cards, check_names
from align.session.run import open_run
from align.stages.grpo import load_grpo_data
from align.stages.held_out import load_problems
from align.stages.reward_model import load_reward_model_data
from align.stages.sft import load_sft_data

from ..rows import Rows, chats, pairs, problems, write_rows
from ..tiny import events, small_recipe

TOKENIZER = load_tokenizer("recipes/nano/policy")
SHAREGPT = Path(__file__).parents[4] / "shared" / "real" / "sharegpt.json"


def source(path: Path | str, **options: Any) -> OwnSource:
    return OwnSource(kind="own", path=str(path), **options)


def splits(path: Path, **options: Any) -> dict[str, list[str]]:
    card = own_card(source(path, **options))
    return {split: [e.prompt_text for e in load_split(card, split).examples] for split in card.splits}


def test_a_file_alone_is_split_by_its_prompts_and_a_row_stays_where_it_is_when_others_come(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "mine.jsonl", problems(400) + problems(400))
    first = splits(file)
    assert sorted(prompt for found in first.values() for prompt in found) == sorted(
        [row["question"] for row in problems(400)] * 2
    )
    assert not set(first["train"]) & set(first["validation"]) | set(first["test"]) & set(first["validation"])
    assert all(20 < len(first[split]) < 65 for split in ("validation", "test")), "about 5 % of 800"
    more = splits(write_rows(tmp_path / "more.jsonl", problems(600)))
    assert all(set(first[split]) <= set(more[split]) for split in first)


def test_the_share_that_is_held_out_can_be_set(tmp_path: Path) -> None:
    found = splits(write_rows(tmp_path / "mine.jsonl", problems(400)), held_out=0.2)
    assert 55 < len(found["validation"]) < 105 > len(found["test"]) > 55


@pytest.mark.parametrize("count", [3, 4, 10])
def test_a_small_file_has_something_in_every_split(count: int, tmp_path: Path) -> None:
    found = splits(write_rows(tmp_path / "mine.jsonl", problems(count)))
    assert all(found.values())
    assert sum(map(len, found.values())) == count


def test_fewer_prompts_than_splits_are_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "mine.jsonl", problems(2) + problems(2))
    with pytest.raises(UserError, match=r"mine\.jsonl has too few different prompts to hold any out for"):
        splits(file)


def test_what_is_held_out_keeps_what_it_had_unless_it_had_nothing_else() -> None:
    hashes = np.array([key_hash(str(n)) for n in range(102)], dtype=np.uint64)
    drawn, more = held_out_places(hashes[:100], 0.1, 2), held_out_places(hashes, 0.1, 2)
    assert set(drawn) == {0, 1, 2}
    assert np.array_equal(drawn, more[:100])


def test_turns_of_a_conversation_stay_in_one_split(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                *chat["messages"],
                {"role": "user", "content": f"Again {n}"},
                {"role": "assistant", "content": "!"},
            ]
        }
        for chat in chats(60)
        for n in range(3)
    ]
    card = own_card(source(write_rows(tmp_path / "mine.jsonl", rows)))
    openings = [{e.messages[0]["content"] for e in load_split(card, split).examples} for split in card.splits]
    assert sum(map(len, openings)) == 60


def test_a_directory_has_a_file_for_a_split_and_the_others_are_drawn_from_train(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train-00.jsonl", problems(100))
    write_rows(tmp_path / "data" / "train-01.jsonl", problems(100, 100))
    write_rows(tmp_path / "data" / "test.json", problems(5, 300))
    found = splits(tmp_path / "data")
    assert found["test"] == [row["question"] for row in problems(5, 300)]
    assert len(found["train"]) + len(found["validation"]) == 200
    assert len(found["validation"]) > 3
    card = own_card(source(tmp_path / "data"))
    ids = [e.id for split in card.splits for e in load_split(card, split).examples]
    assert len(set(ids)) == len(ids) == 205
    with pytest.raises(UserError, match=r"is a directory without train\.jsonl"):
        splits(tmp_path)


def test_two_configurations_of_one_data_set_are_both_evaluated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "align.data.entries.card_of", lambda data: SimpleNamespace(name="b", splits=("test",), source=None)
    )
    entries = [DataOptions(path=Path("a/b"), config=name) for name in ("x", "y", "x")]
    asked = evaluated(EvaluationOptions(), entries)
    assert [(entry.data.config, entry.name) for entry in asked] == [("x", "b"), ("y", "b@2")]
    check_evaluation_cards(asked, choosing=False)


def test_what_is_held_out_of_a_file_of_its_own_is_dropped_from_training_and_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", problems(50) + problems(3, 300))
    write_rows(tmp_path / "test.jsonl", problems(5, 300))
    loaded = load_split(own_card(source(tmp_path)), "train")
    assert (loaded.dropped_contaminated, loaded.compared[f"{tmp_path.name}/test"]) == (3, 3)


def test_a_conversation_that_goes_on_from_a_held_out_prompt_is_not_trained_on(tmp_path: Path) -> None:
    def said(*texts: str) -> dict[str, Any]:
        return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}

    longer = said("say 3.", "3.", "Thanks.", "Welcome.")
    write_rows(tmp_path / "train.jsonl", [*chats(2), longer, said("Hello.", "Hi.", "Say 3.", "3.")])
    write_rows(tmp_path / "test.jsonl", chats(5)[3:])
    loaded = load_split(own_card(source(tmp_path)), "train")
    assert loaded.compared[f"{tmp_path.name}/test"] == 1
    assert all(example.messages[0]["content"] != "say 3." for example in loaded.examples)


@pytest.mark.parametrize("stream", [False, True])
def test_nor_is_one_that_goes_on_from_a_held_out_prompt_of_several_turns(stream: bool, tmp_path: Path) -> None:
    def said(*texts: str) -> dict[str, Any]:
        return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}

    longer = said("Hello.", "Hi.", "Say 3.", "3.", "Thanks.", "Welcome.")
    other = said("Hello.", "Hi.", "Say 4.", "4.", "Thanks.", "Welcome.")
    write_rows(tmp_path / "train.jsonl", [*chats(60), longer, other])
    write_rows(tmp_path / "held.jsonl", [{"prompt": said("Hello.", "Hi.", "Say 3.")["messages"]}])
    made = small_recipe(
        "sft",
        tmp_path,
        data={"path": tmp_path / "train.jsonl", "stream": stream},
        evaluation={"path": tmp_path / "held.jsonl"},
    )
    with open_run(made) as run:
        [loaded] = load_sft_data(made, TOKENIZER, run).sources
        examples = list(loaded.items._read()) if isinstance(loaded.items, Stream) else []
        texts = [str(example.conversation) for example in examples] or [
            TOKENIZER.decode(item.token_ids) for item in loaded.items
        ]
    assert not any("Say 3." in text and "Thanks." in text for text in texts)
    assert any("Say 4." in text and "Thanks." in text for text in texts)


@pytest.mark.parametrize(
    ("name", "called"),
    [("chat.jsonl", "chat"), ("chat-*.jsonl.gz", "chat"), ("*.jsonl", "here"), ("chat.v2.json.zst", "chat.v2")],
)
def test_data_are_called_like_their_file(name: str, called: str) -> None:
    assert name_of(f"/over/here/{name}") == called


def test_ids_are_the_rows_own_or_their_numbers_and_of_several_files_they_have_the_file_s_name(tmp_path: Path) -> None:
    rows = problems(2)
    file = write_rows(tmp_path / "a.jsonl", [rows[0] | {"id": "x"}, rows[1]])
    assert [item.id for item in read_source(source(file))["train"].items] == ["a/x", "a/2"]
    assert [example.id for example in read_user_file(file)] == ["x", "2"]
    write_rows(tmp_path / "b.jsonl", [rows[0] | {"id": "x"}, rows[1]])
    ids = [item.id for item in read_source(source(tmp_path / "*.jsonl"))["train"].items]
    assert ids == [f"{tmp_path.name}/{id_}" for id_ in ("a/x", "a/2", "b/x", "b/2")]


def bad(count: int) -> list[dict[str, Any]]:
    return [row | {"question": ""} for row in problems(count)]


def test_all_bad_rows_are_told_at_once_the_first_twenty_and_a_count(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "mine.jsonl", problems(3) + bad(25))
    with pytest.raises(UserError) as refused:
        own_card(source(file))
    first, *lines, cure = str(refused.value).splitlines()
    assert first.endswith("mine.jsonl: 25 of 28 rows cannot be used, the first 20:")
    assert [f"line {n}:" in line for n, line in enumerate(lines, start=4)] == [True] * 20
    assert "data.bad_rows=leave_out" in cure


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_rows(tmp_path / "mine.jsonl", problems(30) + bad(2))
    card = own_card(source(file, bad_rows="leave_out"))
    with caplog.at_level(logging.WARNING):
        assert sum(len(load_split(card, split).examples) for split in card.splits) == 30
    [warned] = [record.getMessage() for record in caplog.records]
    assert "mine.jsonl, split train: 2 of 32 rows left out. The first: " in warned
    assert "mine.jsonl, line 31: " in warned
    with pytest.raises(UserError, match="2 of 2 rows cannot be used"):
        own_card(source(write_rows(tmp_path / "none.jsonl", bad(2)), bad_rows="leave_out"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            problems(2) + chats(1),
            r"line 3: it is of the form messages \(messages\), and the rows before it are of the form problem",
        ),
        (
            [problems(1)[0] | {"id": "a"}, problems(1)[0] | {"id": "a"}],
            r"line 2: the id 'a' is already that of .*line 1",
        ),
        ([*problems(1), {"question": "What?"}], r"line 2: its columns \(question\) have no form"),
        ([], "is empty: it has no rows"),
    ],
)
def test_mixed_forms_ids_that_come_twice_and_empty_files_are_refused(rows: Rows, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"mine\.jsonl.*{message}|(?s:mine\.jsonl.*{message})"):
        own_card(source(write_rows(tmp_path / "mine.jsonl", rows)))


def test_files_of_a_directory_must_be_of_one_form(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", problems(5))
    write_rows(tmp_path / "test.jsonl", chats(5))
    with pytest.raises(
        UserError, match="its files are of different forms: train of the form problem and test of the form messages"
    ):
        own_card(source(tmp_path))


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "mine.jsonl", problems(5))
    first = read_source(source(file))["train"]
    assert read_source(source(file))["train"] is first
    write_rows(file, problems(6))
    os.utime(file, ns=(1, 1))
    assert len(read_source(source(file))["train"].items) == 6


LOADERS: dict[str, Callable[..., Any]] = {
    "sft": load_sft_data,
    "grpo": load_grpo_data,
    "reward_model": load_reward_model_data,
}


@pytest.mark.parametrize(("stage", "rows"), [("sft", chats(60)), ("grpo", problems(60)), ("reward_model", pairs(60))])
def test_every_stage_takes_a_file_without_a_card_and_says_what_was_compared(
    stage: str, rows: Rows, tmp_path: Path
) -> None:
    made = small_recipe(stage, tmp_path, data={"path": write_rows(tmp_path / "mine.jsonl", rows), "held_out": 0.1})
    check_names(made.data, made.data_stage, made.roles())
    with open_run(made) as run:
        loaded = LOADERS[stage](made, TOKENIZER, run)
    [compared] = events(tmp_path, "held_out")
    assert {"mine/test"} <= compared["compared"].keys()
    assert "mine.jsonl: training prompts were compared with mine/" in compared["message"]
    [from_file] = loaded.sources
    assert from_file.card == "mine"
    assert len(from_file.items) > 40


@pytest.mark.parametrize("bad_rows", ["refuse", "leave_out"])
@pytest.mark.parametrize("evaluation", [{"cards": ["nano_math"]}, {}])
def test_rows_that_the_template_has_no_place_for_are_told_together_or_left_out(
    evaluation: dict[str, Any], bad_rows: str, tmp_path: Path
) -> None:
    rows = chats(60)
    for row in rows[:30]:
        row["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    file = write_rows(tmp_path / "mine.jsonl", rows)
    data = {"path": file, "bad_rows": bad_rows, "held_out": 0.2}
    made = small_recipe("sft", tmp_path, data=data, evaluation=evaluation)
    with open_run(made) as run:
        if bad_rows == "leave_out":
            loaded = load_sft_data(made, TOKENIZER, run)
            assert 10 < len(loaded.sources[0].items) <= 30
            left_out = [event["message"].partition(":")[0] for event in events(tmp_path, "warning")]
            assert f"{file}, split train" in left_out
            assert (f"{file}, split test" in left_out) == (not evaluation)
            return
        with pytest.raises(UserError, match=r"mine\.jsonl, split \w+: [0-9]+ of [0-9]+ rows cannot be used") as refused:
            load_sft_data(made, TOKENIZER, run)
    assert ("example 'mine/" if evaluation else "prompt 'mine/") in str(refused.value)
    assert "data.bad_rows=leave_out" in str(refused.value)


BRIEF = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]


@pytest.mark.parametrize("bad_row", [{"question": "", "answer": "2"}, {"prompt": BRIEF, "answer": "2"}])
def test_a_file_to_evaluate_on_has_its_rows_corrected_or_taken_out(bad_row: dict[str, Any], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "mine.jsonl", [*problems(3), bad_row])
    made = small_recipe("grpo", tmp_path, data={"path": file}, evaluation={"path": file})
    with pytest.raises(UserError, match=r"1 of 4 rows cannot be used:\n.*\nCorrect them, or take them out\Z"):
        load_problems(made.evaluation, made.data, made.rewards, 512, TOKENIZER, Mock())


def test_columns_of_a_file_are_in_the_metadata_of_training(tmp_path: Path) -> None:
    made = small_recipe("grpo", tmp_path, data={"path": write_rows(tmp_path / "mine.jsonl", problems(60))})
    with open_run(made) as run:
        loaded = load_grpo_data(made, TOKENIZER, run)
    assert {problem.example.metadata["unit"] for problem in loaded.sources[0].items} == {"cm"}
    assert {problem.example.metadata["unit"] for problem in loaded.held_out.problems} == {"cm"}


def test_an_evaluation_of_a_file_of_its_own_asks_all_of_it(tmp_path: Path) -> None:
    file, held = write_rows(tmp_path / "mine.jsonl", problems(60)), write_rows(tmp_path / "held.jsonl", problems(7, 58))
    made = small_recipe("grpo", tmp_path, data={"path": file}, evaluation={"path": held})
    check_names(made.data, made.data_stage, made.roles())
    with open_run(made) as run:
        loaded = load_grpo_data(made, TOKENIZER, run)
    asked = sorted(problem.example.prompt_text for problem in loaded.held_out.problems)
    assert asked == sorted(row["question"] for row in problems(7, 58))
    [compared] = events(tmp_path, "held_out")
    assert 0 < compared["compared"]["held/test"] <= 2, (
        "those of the last two problems that are not held out of the file itself"
    )


def test_data_with_a_card_and_without_one_stand_side_by_side(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "mine.jsonl", problems(60))
    made = small_recipe("grpo", tmp_path, data=[{"card": "nano_math"}, {"path": file}, {"path": file, "levels": [1]}])
    assert [entry.name for entry in evaluated(made.evaluation, made.data)] == ["nano_math", "mine"]
    assert made.evaluation_cards == ["nano_math", str(file)]


def test_domains_are_those_that_rows_say_and_a_reward_must_be_for_each(tmp_path: Path) -> None:
    rows = problems(20) + [row | {"domain": "lengths"} for row in problems(20, 50)]
    file = write_rows(tmp_path / "mine.jsonl", rows)
    assert domains_of(card_of(DataOptions(path=file))) == ["user", "lengths"]
    made = small_recipe("grpo", tmp_path, data={"path": file}, rewards=[{"name": "exact_answer", "domains": ["user"]}])
    with pytest.raises(UserError, match="none with a weight is for the domain 'lengths'"):
        check_names(made.data, made.data_stage, made.roles())


@pytest.mark.parametrize(
    ("stage", "rows", "message"),
    [
        ("sft", problems(9), r"mine\.jsonl is not for sft, only for grpo, eval"),
        ("sft", pairs(9), r"mine\.jsonl is not for sft, only for reward_model, eval"),
        ("reward_model", chats(9), r"mine\.jsonl is not for reward models and DPO, which need pairs, only for sft"),
        ("grpo", bad(9), r"9 of 9 rows cannot be used"),
    ],
)
def test_what_a_stage_cannot_take_is_refused_before_anything_starts(
    stage: str, rows: Rows, message: str, tmp_path: Path
) -> None:
    made = small_recipe(stage, tmp_path, data={"path": write_rows(tmp_path / "mine.jsonl", rows)})
    with pytest.raises(UserError, match=message):
        check_names(made.data, made.data_stage, made.roles())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "name a card, or give the path of data of one's own"),
        ({"card": "nano_math", "held_out": 0.1}, "data.held_out has no effect here"),
        ({"card": "nano_math", "bad_rows": "leave_out"}, "data.bad_rows has no effect here"),
        ({"card": "nano_math", "revision": "main"}, "data.revision has no effect here"),
        ({"card": "nano_math", "stream": True}, "data.stream has no effect here"),
        ({"path": "x.jsonl", "config": "a"}, "data.config has no effect here"),
        ({"path": "hf://datasets/org/name/x.jsonl", "hub_split": "a"}, "data.hub_split has no effect here"),
        ({"path": "x.jsonl", "stream": True, "limit": 5}, "data.limit has no effect here"),
        ({"path": "x.jsonl", "stream": True, "levels": [1]}, "data.levels has no effect here"),
        ({"path": "x.jsonl", "stream": True, "split": "validation"}, "data.split has no effect here"),
        ({"path": "x.jsonl", "held_out": 0.5}, "less than 0.5"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataOptions.model_validate(data)


@pytest.mark.parametrize(("path", "found"), [("none.jsonl", False), ("none-*.jsonl", False), ("mine*.jsonl", True)])
def test_a_recipe_s_path_may_be_a_pattern_and_must_name_something(path: str, found: bool, tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", problems(9))
    overrides = [f"data={{path: {tmp_path / path}}}"]
    if found:
        assert load_recipe(Path("recipes/nano/grpo.yaml"), overrides).data[0].path == tmp_path / path
    else:
        with pytest.raises(UserError, match=r"data\.path names .*none.*jsonl, which does not exist"):
            load_recipe(Path("recipes/nano/grpo.yaml"), overrides)


def test_another_name_of_the_validation_split_is_refused_where_it_would_not_be_read(tmp_path: Path) -> None:
    for name in ("train", "test", "valid"):
        write_rows(tmp_path / f"{name}.jsonl", problems(9))
    with pytest.raises(
        UserError, match=r"valid\.jsonl is not read, for a directory's splits are called train, validation"
    ):
        own_card(source(str(tmp_path)))
    write_rows(tmp_path / "validation.jsonl", problems(9))
    assert set(own_card(source(str(tmp_path))).splits) == {"train", "validation", "test"}


def test_pairs_of_a_file_are_preferences(tmp_path: Path) -> None:
    card = own_card(source(write_rows(tmp_path / "mine.jsonl", pairs(40))))
    found = [pair for split in card.splits for pair in load_preferences(card, split).examples]
    assert sorted(pair.chosen for pair in found) == sorted(row["chosen"] for row in pairs(40))


def test_a_policy_that_learns_from_pairs_of_a_file_answers_their_prompts_once_each(tmp_path: Path) -> None:
    rows = [{**row, "rejected": rejected} for row in pairs(40) for rejected in ("No.", "Never.")]
    card = own_card(source(write_rows(tmp_path / "mine.jsonl", rows)))
    asked = load_split(card, "test").examples
    held_out = load_preferences(card, "test").examples
    assert len(asked) == len(held_out) / 2 > 0
    assert {one.prompt_text for one in asked} == {pair.prompt_text for pair in held_out}
    assert all(one.response is None for one in asked)
    assert [one.prompt_text for one in read_user_file(tmp_path / "mine.jsonl")] == [row["prompt"] for row in pairs(40)]
    trained = {pair.prompt_text for pair in load_preferences(card, "train").examples}
    assert trained.isdisjoint(one.prompt_text for one in asked)


@pytest.mark.skipif(not SHAREGPT.is_file(), reason="the published file is not on this machine")
def test_a_published_file_of_sharegpt_is_read_whole() -> None:
    card = own_card(source(SHAREGPT))
    loaded = {split: load_split(card, split) for split in card.splits}
    assert sum(len(split.examples) + split.dropped_contaminated for split in loaded.values()) == 500
    assert {turn["role"] for e in loaded["train"].examples for turn in e.conversation} == {"user", "assistant"}


def test_files_of_one_name_are_evaluated_apart(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / name / "train.jsonl", problems(60, start)) for name, start in (("a", 0), ("b", 100))]
    data = [{"path": file} for file in files]
    made = small_recipe("grpo", tmp_path, data=data, rewards=[{"name": "exact_answer"}], evaluation={"limit": 3})
    check_names(made.data, made.data_stage, made.roles())
    found = load_problems(made.evaluation, made.data, made.rewards, 512, TOKENIZER, Mock())
    assert len({problem.example.id for problem in found.problems}) == 6
    assert list(found.prompts) == ["train/test", "train@2/test"]
