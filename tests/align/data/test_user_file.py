import pytest

from align.data.own import read_user_file
from align.errors import UserError

from ..rows import write_rows

GOOD = {"id": "1", "prompt": "What is 1 + 1?", "answer": "2"}
TURNS = [{"role": "user", "content": "Hi"}]


def write(tmp_path, *rows):
    return write_rows(tmp_path / "mine.jsonl", rows)


def test_prompts_and_messages_are_read_in_order(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, *TURNS]
    other = {"id": "2", "messages": chat, "answer": "b", "level": 2, "domain": "d", "metadata": {"k": 1}}
    first, second = read_user_file(write(tmp_path, GOOD, "", other))
    assert (first.id, first.messages, first.answer) == (
        "1",
        ({"role": "user", "content": GOOD["prompt"]},),
        "2",
    )
    assert (first.domain, first.level, first.metadata, first.response) == (
        "user",
        None,
        {"id": "1", "answer": "2"},
        None,
    )
    assert second.messages == tuple(chat)
    assert (second.domain, second.level, second.metadata["k"]) == ("d", 2, 1)
    assert second.prompt_text == "Hi"


def test_a_wrong_line_is_named(tmp_path):
    bad = GOOD | {"prompt": [{"role": "asistant", "content": "x"}, *TURNS]}
    path = write(tmp_path, GOOD | {"id": "0"}, "", bad)
    with pytest.raises(
        UserError, match=r"mine\.jsonl, line 3\b.*message 1: unknown role 'asistant' \(did you mean 'assistant'"
    ):
        read_user_file(path)


def test_other_columns_and_those_of_metadata_reach_rewards_alike(tmp_path):
    path = write(tmp_path, GOOD | {"unit": "cm", "metadata": {"k": 1, "unit": "m"}})
    [example] = read_user_file(path)
    assert example.metadata == {"id": "1", "answer": "2", "unit": "cm", "k": 1}


def test_of_pairs_the_prompts_are_problems(tmp_path):
    path = write(tmp_path, {"prompt": "?", "chosen": "a", "rejected": "b", "answer": "2"})
    [example] = read_user_file(path)
    assert (example.prompt_text, example.response, example.answer) == ("?", None, "2")
