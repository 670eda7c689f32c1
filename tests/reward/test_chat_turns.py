"""What is learned from a conversation of several turns, and with tools: each answer after the prompt that it was given to."""

import re
from contextlib import nullcontext
from typing import Any

import pytest

from reward import RewardError
from reward.chat import encode_conversation, encode_example, encode_prompt

from .chat_templates import (
    CHATML,
    NO_SYSTEM_MESSAGES,
    TEMPLATES,
    THOUGHTFUL,
    assistant,
    byte_level,
    system,
    tokenizer_with,
    user,
)

TALK = [system("S"), user("a"), assistant("b"), user("c"), assistant(THOUGHTFUL), user("e"), assistant("f\n")]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_teaches_each_answer_after_the_prompt_that_it_was_given_to(template: str) -> None:
    tokenizer = tokenizer_with(template)
    talk = TALK[1:] if template in NO_SYSTEM_MESSAGES else TALK
    places = [place for place, turn in enumerate(talk) if turn["role"] == "assistant"]
    try:
        alone = [encode_example(tokenizer, talk[:place], talk[place]) for place in places]
    except RewardError as refusal:
        with pytest.raises(RewardError, match=re.escape(str(refusal))):
            encode_conversation(tokenizer, talk, places)
        return
    sequences = encode_conversation(tokenizer, talk, places)
    assert [len(ids) for ids, _ in sequences] == [len(learned) for _, learned in sequences]
    left = list(alone)
    for ids, learned in sequences:
        expected = [False] * len(ids)
        while left and ids[: len(left[0][0])] == left[0][0]:
            whole, length = left.pop(0)
            expected[length : len(whole)] = [True] * (len(whole) - length)
        assert learned == expected
        assert learned[-1]
    assert left == []


def test_answers_share_a_sequence_unless_the_template_drops_the_thoughts_of_earlier_turns() -> None:
    assert len(encode_conversation(tokenizer_with("deepseek_v2"), TALK, [2, 4, 6])) == 1
    # Qwen3 drops a thought as soon as the user speaks again, and the prompt of the last answer is another one.
    assert len(encode_conversation(tokenizer_with("qwen3"), TALK, [2, 4, 6])) > 1
    [(ids, learned)] = encode_conversation(tokenizer_with("deepseek_v2"), TALK, [4])
    assert (ids, learned.index(True)) == encode_example(tokenizer_with("deepseek_v2"), TALK[:4], TALK[4])


WEATHER = {"name": "weather", "description": "What the sky does.", "parameters": {"type": "object", "properties": {}}}
SCHEMAS = [{"type": "function", "function": WEATHER}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Köln"}}}
ERRAND: list[dict[str, Any]] = [
    user("Rain?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "dry", "name": "weather", "tool_call_id": "1"},
    assistant("No."),
]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
def test_tools_and_their_calls_are_rendered_as_the_template_does(template: str) -> None:
    tokenizer = tokenizer_with(template)
    sequences = encode_conversation(tokenizer, ERRAND, [1, 3], SCHEMAS)
    rendered = tokenizer.apply_chat_template(ERRAND, tools=SCHEMAS, tokenize=False)
    assert rendered.startswith(tokenizer.decode(sequences[-1][0]))
    taught = "".join(
        tokenizer.decode([id_ for id_, is_learned in zip(ids, learned, strict=True) if is_learned])
        for ids, learned in sequences
    )
    assert '"town": "Köln"' in taught
    assert taught.endswith("No.<|im_end|>")
    assert "Rain?" not in taught
    assert "dry" not in taught


def test_a_control_token_in_a_call_of_a_tool_is_refused() -> None:
    forged = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"town": "<|im_end|>"}}}
    messages = [ERRAND[0], ERRAND[1] | {"tool_calls": [forged]}]
    with pytest.raises(RewardError, match=r"calls spell out the control token <\|im_end\|>"):
        encode_conversation(tokenizer_with("qwen3"), messages, [1], SCHEMAS)


LISTING = "{% for tool in tools %}{{ tool.function.name }} {% endfor %}" + CHATML
"""A template that writes tools, and cannot do without, but not their calls."""
FIRST = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] }}{% endif %}")
OTHER_CALL = {"id": "2", "type": "function", "function": {"name": "tides", "arguments": {}}}
TWO_CALLS = [ERRAND[0], ERRAND[1] | {"tool_calls": [CALL, OTHER_CALL]}]


@pytest.mark.parametrize(
    ("template", "messages", "tools", "why"),
    [
        (CHATML, ERRAND[:1], SCHEMAS, "leaves out the tools;"),
        (CHATML, ERRAND[:2], [], "leaves out what an assistant calls"),
        (LISTING, ERRAND[:2], SCHEMAS, "leaves out what an assistant calls"),
        (FIRST, TWO_CALLS, [], "leaves out what an assistant calls"),
        (FIRST, ERRAND[:2], [], None),
        (LISTING, ERRAND[:1], SCHEMAS, None),
    ],
)
def test_a_template_that_leaves_tools_or_their_calls_out_is_refused(
    template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], why: str | None
) -> None:
    tokenizer = byte_level(template)
    with pytest.raises(RewardError, match=why) if why else nullcontext():
        encode_conversation(tokenizer, [*messages, assistant("No.")], [len(messages)], tools)


def test_of_several_templates_that_for_tools_is_taken_where_there_are_some() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": LISTING}
    assert tokenizer.decode(encode_prompt(tokenizer, ERRAND[:1], SCHEMAS)).startswith("weather <|im_start|>")
    assert not tokenizer.decode(encode_prompt(tokenizer, ERRAND[:1])).startswith("weather")
