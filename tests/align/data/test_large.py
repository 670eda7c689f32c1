"""Data that are not encoded before the start: rows that stay on the disk, files whose rows are tokenised when a step takes them, and streams."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.data import entries
from align.data.cards import OwnSource
from align.data.drawing import Source, Stream, items_of_step
from align.data.loader import load_split
from align.data.own import own_card, read_source
from align.errors import UserError
from align.model.policy import load_tokenizer
from align.session.run import open_run
from align.session.steps import data_digest
from align.stages.grpo import load_grpo_data
from align.stages.sft import load_sft_data

from ..rows import write_rows
from ..tiny import events, small_recipe

TOKENIZER = load_tokenizer("recipes/nano/policy")


def chats(count: int, long: int = 0) -> list[dict[str, Any]]:
    """Conversations of which every `long`th has an answer that there is no room for."""
    said = [" ".join(["no"] * (300 if long and n % long == 0 else 1)) for n in range(count)]
    return [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} {said[n]}"}]}
        for n in range(count)
    ]


def loaded(directory: Path, **data: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The training source of an SFT recipe with this data, of which a step takes four rows, and the events of its run."""
    run_options, sft = {"dir": directory / "run", "overwrite": True}, {"steps": 1, "sequences_per_step": 4}
    made = small_recipe("sft", directory, run=run_options, sft=sft, data=data)
    with open_run(made) as run:
        [source] = load_sft_data(made, TOKENIZER, run).sources
    return source, events(directory)


def steps(source: Any, count: int, start: int = 0) -> list[list[str]]:
    """The conversations of steps as text."""
    return [
        [TOKENIZER.decode(item.token_ids) for item in items_of_step([source], seed=0, step=step)]
        for step in range(start, start + count)
    ]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "TOKENISED_BEFORE", 10)


def test_a_large_file_gives_the_steps_that_it_would_give_if_it_was_tokenised_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "chat.jsonl", chats(60))
    before, _ = loaded(tmp_path, path=file)
    monkeypatch.setattr(entries, "TOKENISED_BEFORE", 10)
    as_needed, noted = loaded(tmp_path, path=file)
    assert before.encode is None
    assert as_needed.encode is not None
    assert steps(as_needed, 30) == steps(before, 30)
    assert [event["rows"] for event in noted if event["kind"] == "tokenised_as_needed"] == [49]


@pytest.mark.usefixtures("large")
def test_what_is_too_long_is_left_out_counted_and_replaced_by_what_no_other_step_decides(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chat.jsonl", chats(100, long=5))
    source, noted = loaded(tmp_path, path=file)
    [warned] = [event for event in noted if "rows looked at" in event["message"]]
    epoch = len(source.items) // 4
    counts = []
    for step in range(epoch):
        [texts] = steps(source, 1, step)
        counts.append(source.left_out)
        assert len(set(texts)) == 4
        assert not any("no no" in text for text in texts)
    assert sum(counts) >= warned["too_long"] > 10
    resumed, _ = loaded(tmp_path, path=file)
    assert steps(resumed, 5, 7) == steps(source, 5, 7)
    assert resumed.digest == source.digest


@pytest.mark.usefixtures("large")
def test_long_rows_that_are_refused_and_rows_without_room_end_the_run(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chat.jsonl", chats(100, long=50))
    with pytest.raises(UserError, match=r"of [0-9]+ examples have more than 128 tokens"):
        loaded(tmp_path, path=file, too_long="refuse")
    with pytest.raises(UserError, match="none is left"):
        loaded(tmp_path, path=write_rows(tmp_path / "all.jsonl", chats(100, long=1)))
    every = Source("chat", range(20), 4, lambda row: [])
    with pytest.raises(UserError, match="chat: too few of its rows can be trained on: 0 of 4 for step 1"):
        items_of_step([every], seed=0, step=0)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("bad_rows", ["refuse", "leave_out"])
def test_a_row_that_the_template_refuses_when_it_is_needed_ends_the_run_or_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_rows: str
) -> None:
    monkeypatch.setattr(entries, "LOOKED_AT", 2)
    rows = chats(60)
    rows[22]["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    source, _ = loaded(tmp_path, path=write_rows(tmp_path / "chat.jsonl", rows), bad_rows=bad_rows)
    if bad_rows == "leave_out":
        assert all(len(step) == 4 for step in steps(source, 10))
        return
    with pytest.raises(UserError, match=r"example 'chat/23'(?s:.*)data\.bad_rows=leave_out"):
        steps(source, len(source.items) // 4)


def test_rows_of_a_file_that_has_changed_are_not_taken_for_those_that_were_checked(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chat.jsonl", chats(20))
    items = read_source(OwnSource(kind="own", path=str(file)))["train"].items
    assert items[3].response == "3 no"
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match=r"chat\.jsonl has changed since"):
        items[3]


@pytest.mark.parametrize("was_open", [False, True])
def test_a_file_that_is_gone_is_named(was_open: bool, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chat.jsonl", chats(20))
    items = read_source(OwnSource(kind="own", path=str(file)))["train"].items
    assert not was_open or items[0]
    file.unlink()
    with pytest.raises(UserError, match=r"chat\.jsonl, line 4 cannot be read any more: No such file"):
        items[3]


def test_the_digest_of_a_large_file_knows_its_content_and_the_rows_that_are_taken(tmp_path: Path, large: None) -> None:
    rows = chats(60)
    digests = [loaded(tmp_path, path=write_rows(tmp_path / "chat.jsonl", rows))[0].digest]
    digests.append(loaded(tmp_path, path=tmp_path / "chat.jsonl", held_out=0.2)[0].digest)
    rows[7]["messages"][1]["content"] = "Never."
    digests.append(loaded(tmp_path, path=write_rows(tmp_path / "chat.jsonl", rows))[0].digest)
    assert len(set(digests)) == 3
    assert data_digest([]) not in digests


def numbers(total: int) -> Stream[int]:
    return Stream(range(min(total, 10)), lambda: iter(range(total)))


def taken(stream: Stream[int], steps: Iterator[int] | range, count: int = 3) -> list[list[int]]:
    source = Source("numbers", stream, count, lambda row: [row])
    return [items_of_step([source], seed=1, step=step) for step in steps]


def test_a_stream_gives_each_row_once_an_epoch_block_by_block_in_an_order_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("align.data.drawing.BLOCK", 30)
    found = taken(numbers(90), range(60))
    rows = [row for step in found for row in step]
    for block in range(6):
        assert sorted(rows[30 * block : 30 * (block + 1)]) == list(range(30 * (block % 3), 30 * (block % 3 + 1)))
    assert rows[:30] != sorted(rows[:30])
    assert rows[:30] != rows[90:120]


def test_a_stream_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.data.drawing.BLOCK", 30)
    whole = taken(numbers(80), range(60))
    assert taken(numbers(80), range(43, 60)) == whole[43:]
    stream = numbers(80)
    assert taken(stream, iter([50, 4, 20])) == [whole[50], whole[4], whole[20]]
    with pytest.raises(UserError, match="a step takes 50 rows, and the stream has fewer in each of its blocks"):
        taken(numbers(80), range(1), count=50)


def test_a_stream_of_files_holds_out_what_its_first_rows_and_their_hash_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("drawing", "own", "entries"):
        monkeypatch.setattr(f"align.data.{module}.BLOCK", 40)
    files = [write_rows(tmp_path / f"chat-{part}.jsonl", chats(120)[part * 60 : (part + 1) * 60]) for part in (0, 1)]
    with files[1].open("a") as file:
        file.write("{cut off\n")
    source, noted = loaded(tmp_path, path=tmp_path / "chat-*.jsonl", stream=True, bad_rows="leave_out")
    texts = [text for step in steps(source, 27) for text in step]
    assert 90 < len(set(texts)) <= 120
    assert max(Counter(texts).values()) <= 2
    card = own_card(OwnSource(kind="own", path=str(tmp_path / "chat-*.jsonl"), stream=True, bad_rows="leave_out"))
    for split in ("validation", "test"):
        held = [example.prompt_text for example in load_split(card, split).examples]
        assert held
        assert not [text for text in texts for prompt in held if f"{prompt} " in text]
    assert "of each 40 rows in turn the order is shuffled" in str(noted)
    again, _ = loaded(tmp_path, path=tmp_path / "chat-*.jsonl", stream=True, bad_rows="leave_out")
    assert steps(again, 3, 20) == steps(source, 3, 20)
    refusing, _ = loaded(tmp_path, path=tmp_path / "chat-*.jsonl", stream=True)
    with pytest.raises(UserError, match=r"chat-1\.jsonl, line 61: not JSON"):
        steps(refusing, 40)


@pytest.mark.parametrize("domains", [None, ["late"], ["user"]])
def test_a_domain_that_a_stream_comes_to_later_is_refused_where_no_reward_is_for_it(
    domains: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("drawing", "own", "entries"):
        monkeypatch.setattr(f"align.data.{module}.BLOCK", 40)
    rows = [row | {"answer": "1", "domain": "user" if n < 40 else "late"} for n, row in enumerate(chats(80))]
    file = write_rows(tmp_path / "chat.jsonl", rows)
    source, _ = loaded(tmp_path, path=file, stream=True)
    assert all(len(step) == 4 for step in steps(source, 15))
    rewards = (
        [{"name": "exact_answer"}] if domains is None else [{"name": "exact_answer", "domains": ["user", *domains]}]
    )
    made = small_recipe("grpo", tmp_path / "grpo", data={"path": file, "stream": True}, rewards=rewards)
    with open_run(made) as run:
        [prompts] = load_grpo_data(made, TOKENIZER, run).sources
    if domains != ["user"]:
        assert [items_of_step([prompts], seed=0, step=step) for step in range(30)]
        return
    with pytest.raises(UserError, match=r"prompt 'chat/[4-8][0-9]': no reward of the recipe is for its domain 'late'"):
        [items_of_step([prompts], seed=0, step=step) for step in range(30)]
