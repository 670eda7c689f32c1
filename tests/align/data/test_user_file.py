import json

import pytest

from align.data import read_user_file
from align.errors import UserError

GOOD = {"id": "1", "prompt": "What is 1 + 1?", "answer": "2"}
TURNS = [{"role": "user", "content": "Hi"}]


def write(tmp_path, *lines):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def without(key, **changes):
    return {name: value for name, value in GOOD.items() if name != key} | changes


def test_prompts_and_messages_are_read_in_order(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, *TURNS]
    path = write(
        tmp_path,
        json.dumps(GOOD),
        "",
        json.dumps({"id": "2", "messages": chat, "answer": "b", "level": 2, "domain": "d", "metadata": {"k": 1}}),
    )
    first, second = read_user_file(path)
    assert (first.id, first.messages, first.answer) == (
        "1",
        ({"role": "user", "content": GOOD["prompt"]},),
        "2",
    )
    assert (first.domain, first.level, first.metadata, first.response) == ("user", None, {}, None)
    assert second.messages == tuple(chat)
    assert (second.domain, second.level, second.metadata) == ("d", 2, {"k": 1})
    assert second.prompt_text == "Hi"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": ', "not JSON"),
        ("[1]", "must be one JSON object"),
        (without("id"), "no column 'id'; there are prompt, answer"),
        (without("prompt"), "no column 'prompt'"),
        (without("answer"), "no column 'answer'"),
        (GOOD | {"answer": ""}, "column 'answer' is empty"),
        (GOOD | {"answer": 2}, "column 'answer' must hold text, not 2; write \"2\""),
        (GOOD | {"id": 1}, "column 'id' must hold text, not 1"),
        (GOOD | {"id": "0"}, "the id '0' is already that of line 1"),
        (GOOD | {"messages": TURNS}, "both prompt and messages"),
        (without("prompt", messages="Hi"), "column 'messages' must hold a list of messages, not 'Hi'"),
        (without("prompt", messages=[]), "is empty|must hold a list of messages"),
        (without("prompt", messages=["Hi"]), "message 1: must be an object with role and content"),
        (
            without("prompt", messages=[{"role": "user"}]),
            "message 1: must be an object with role and content",
        ),
        (
            without("prompt", messages=[{"role": "asistant", "content": "x"}, *TURNS]),
            r"message 1: unknown role 'asistant' \(did you mean 'assistant'\?\)",
        ),
        (
            without("prompt", messages=[*TURNS, {"role": "assistant", "content": "x"}]),
            "must end with a message of the user",
        ),
        (
            without("prompt", messages=[{"role": "user", "content": None}]),
            "message 1: content must be text that is not empty, not None",
        ),
        (GOOD | {"anwser": "2"}, r"unknown key 'anwser' \(did you mean 'answer'\?\)"),
        (GOOD | {"level": True}, "column 'level' must hold a whole number, not True"),
        (GOOD | {"metadata": []}, "column 'metadata' must hold an object"),
        (GOOD | {"prompt": "\ud83d"}, "column 'prompt': character 1 is half of a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    bad = line if isinstance(line, str) else json.dumps(line)
    path = write(tmp_path, json.dumps(GOOD | {"id": "0"}), "", bad)
    with pytest.raises(UserError, match=rf"mine\.jsonl, line 3\b.*{message}"):
        read_user_file(path)


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_file(tmp_path, lines):
    with pytest.raises(UserError, match=r"mine\.jsonl is empty"):
        read_user_file(write(tmp_path, *lines))


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_user_file(tmp_path / "none.jsonl")
