"""The forms in which people have data: what a row of each gives, and why a row is refused."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from align.data.forms import FORMS, example_of, form_of, preference_of
from align.data.pair_rows import ChosenRejected
from align.data.rows import Row
from align.data.types import joined
from align.errors import UserError
from align.experience import encode_problems
from align.model.policy import load_tokenizer
from align.stages.sft import encode_demonstration

ASKED = {"role": "user", "content": "What is 2 + 2?"}
SAID = {"role": "assistant", "content": "4."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "4"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]}
TEXT = "What is 2 + 2?"


def example(values: dict[str, Any]) -> Any:
    row = Row(values, "mine.jsonl, line 1")
    return example_of(form_of(row), row, "1")


def preference(values: dict[str, Any]) -> Any:
    row = Row(values, "mine.jsonl, line 1")
    return preference_of(form_of(row), row, "1")


@pytest.mark.parametrize("turns", [(ASKED, SAID, {"role": "user", "content": "And?"}), (ASKED, CALLED, RESULT)])
@pytest.mark.parametrize("written", [list, json.dumps])
def test_a_conversation_that_ends_by_asking_is_asked_whole_and_learned_from_up_to_its_last_answer(
    written: Callable[[Sequence[Any]], Any], turns: Sequence[Any]
) -> None:
    asked = example({"messages": written(turns), "answer": "8"})
    learned = example({"messages": written(turns)})
    assert (asked.response, asked.conversation, asked.answer) == (None, (), "8")
    assert asked.messages == learned.messages == example({"prompt": written(turns)}).messages
    assert len(learned.messages) == 3
    assert learned.conversation == learned.messages[:2]
    assert learned.response == learned.conversation[1]["content"]


def test_all_that_is_learned_from_of_a_conversation_that_ends_by_asking_is_held_out() -> None:
    turns = (ASKED, SAID, {"role": "user", "content": "And 3?"}, SAID, {"role": "user", "content": "And 4?"})
    longer = example({"messages": [*turns, SAID]})
    assert example({"messages": turns}).prompt_key == longer.prompt_key
    assert example({"messages": turns}).earlier_keys == longer.earlier_keys == [joined(turns[:3])]


def test_json_text_of_one_turn_is_a_prompt() -> None:
    assert example({"messages": json.dumps([ASKED]), "unit": "cm"}).messages == (ASKED,)


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("messages", {"messages": [ASKED, SAID]}),
        ("messages", {"messages": json.dumps([ASKED, SAID])}),
        ("messages", {"prompt": TEXT, "messages": [PARTS, SAID]}),
        ("messages", {"messages": [ASKED | {"name": None, "tool_calls": None}, SAID], "answer": None}),
        ("sharegpt", {"conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": "4."}]}),
        ("sharegpt", {"conversations": [ASKED, SAID]}),
        ("completion", {"prompt": TEXT, "completion": "4."}),
        ("completion", {"prompt": [ASKED], "completion": [SAID]}),
        ("completion", {"prompt": json.dumps([ASKED]), "completion": json.dumps([SAID])}),
        ("completion", {"question": TEXT, "response": "4."}),
        ("alpaca", {"instruction": TEXT, "input": "", "output": "4."}),
        ("alpaca", {"instruction": TEXT, "output": "4."}),
    ],
)
def test_a_demonstration_is_read_of_each_form(form: str, values: dict[str, Any]) -> None:
    assert form_of(Row(values, "")).name == form
    read = example(values)
    assert (read.messages, read.response, read.conversation) == ((ASKED,), "4.", (ASKED, SAID))


def test_alpaca_s_input_follows_its_instruction_after_a_blank_line() -> None:
    assert example({"instruction": "Add.", "input": "2, 2", "output": "4."}).prompt_text == "Add.\n\n2, 2"


@pytest.mark.parametrize(
    "values",
    [
        {"conversations": [ASKED, SAID]},
        {"instruction": TEXT, "output": "4."},
        {"messages": [ASKED, SAID]},
        {"question": TEXT, "response": "4."},
        {"prompt": TEXT, "answer": "4"},
    ],
)
def test_a_column_system_stands_before_the_conversation(values: dict[str, Any]) -> None:
    assert example(values | {"system": "Be brief."}).messages == (SYSTEM, ASKED)
    assert example(values | {"system_prompt": "Be brief.", "system": ""}).messages == (SYSTEM, ASKED)
    assert example(values | {"system": " "}).messages == (ASKED,)


def test_a_pair_has_the_system_prompt_of_its_row() -> None:
    read = preference({"prompt": TEXT, "chosen": "4.", "rejected": "5.", "system": "Be brief."})
    assert read.messages == (SYSTEM, ASKED)


def test_alpaca_s_history_comes_before_its_instruction() -> None:
    read = example({"instruction": "And 3?", "output": "6.", "history": [[TEXT, "4."]]})
    assert read.messages == (ASKED, SAID, {"role": "user", "content": "And 3?"})
    with pytest.raises(UserError, match="column 'history' must be a list of pairs"):
        example({"instruction": "And 3?", "output": "6.", "history": ["2 + 2?"]})


def test_what_sharegpt_s_turns_say_of_training_is_kept() -> None:
    said = {"from": "gpt", "value": "4."}
    turns = [{"from": "human", "value": TEXT}, said | {"weight": 0}, {"from": "human", "value": "And?"}]
    read = example({"conversations": [*turns, said | {"train": True}]})
    assert [turn.get("weight") for turn in read.conversation] == [None, 0.0, None, 1.0]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_beside_the_content_are_refused_by_what_would_learn_without_them(key: str) -> None:
    tokenizer = load_tokenizer("recipes/nano/policy")
    read = example({"messages": [ASKED, SAID | {key: "2 and 2 is 4."}]})
    assert read.response == "4."
    with pytest.raises(UserError, match=r"example '1' has thoughts beside the content.*<think>"):
        encode_demonstration(tokenizer, read)
    for without in (SAID | {key: ""}, SAID | {key: True}, SAID | {key: "Hm.", "weight": 0}):
        assert encode_demonstration(tokenizer, example({"messages": [ASKED, without, ASKED, SAID]}))


def test_thoughts_beside_the_content_are_refused_where_they_are_what_the_model_has_been_doing() -> None:
    tokenizer = load_tokenizer("recipes/nano/policy")
    thought = CALLED | {"reasoning_content": "I add."}
    with pytest.raises(UserError, match="prompt '1' has thoughts beside the content"):
        encode_problems(tokenizer, [example({"messages": [ASKED, thought, RESULT]})])
    with pytest.raises(UserError, match="example '1' has thoughts beside the content"):
        encode_demonstration(tokenizer, example({"messages": [ASKED, thought | {"weight": 0}, RESULT, SAID]}))
    with pytest.raises(UserError, match="the prompt has thoughts beside the content"):
        preference({"prompt": [ASKED, thought, RESULT], "chosen": "4.", "rejected": "5."})
    before = [ASKED, SAID | {"reasoning_content": "2 and 2."}, ASKED]
    assert encode_problems(tokenizer, [example({"messages": before})])
    assert preference({"prompt": before, "chosen": "4.", "rejected": "5."}).chosen == "4."


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_completions_are_not_compared_without_their_thoughts(column: str) -> None:
    values = {"chosen": [SAID], "rejected": [SAID | {"content": "5."}]}
    values[column] = [values[column][0] | {"reasoning_content": "2 and 2."}]
    with pytest.raises(UserError, match=f"mine.jsonl, line 1: column '{column}' has thoughts beside the content"):
        preference({"prompt": TEXT, **values})
    with pytest.raises(UserError, match=f"column '{column}' has thoughts beside the content"):
        ChosenRejected(format="chosen_rejected", chosen="chosen", rejected="rejected").pair(Row(values, ""))


def test_columns_of_tools_that_have_none_are_taken() -> None:
    for tools in ("[]", "null", [], None):
        assert preference({"prompt": TEXT, "chosen": "4.", "rejected": "5.", "tools": tools}).chosen == "4."
    with pytest.raises(UserError, match="column 'tools' has no effect"):
        preference({"prompt": TEXT, "chosen": "4.", "rejected": "5.", "tools": [{"name": "f"}]})
    assert example({"instruction": TEXT, "output": "4.", "history": "null"}).messages == (ASKED,)


def test_the_last_turn_of_the_assistant_is_the_response_and_the_whole_conversation_is_kept() -> None:
    developer = {"role": "developer", "content": "Use the tool."}
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [developer, ASKED, CALLED, RESULT, SAID | {"weight": 0}, ASKED, SAID | {"train": True}]
    read = example({"messages": turns, "tools": json.dumps(tools)})
    assert [message["role"] for message in read.messages] == [
        "developer",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert read.response == "4."
    called = CALL | {"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    assert read.conversation[2] == {"role": "assistant", "content": "", "tool_calls": [called]}
    assert read.conversation[3] == RESULT
    assert [turn.get("weight") for turn in read.conversation] == [None, None, None, None, 0.0, None, 1.0]
    assert read.tools == tuple(tools) == example({"messages": turns, "tools": tools}).tools


def test_sharegpt_s_calls_and_observations_are_tool_calls_and_their_results() -> None:
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    turns = [
        {"from": "human", "value": TEXT},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "4"},
        {"from": "function_call", "value": json.dumps([call, call])},
        {"from": "tool", "value": "4"},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4."},
    ]
    read = example({"conversations": turns, "tools": json.dumps([{"name": "add", "parameters": {}}])})
    called = {"type": "function", "function": call}
    assert read.conversation == (
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "", "tool_calls": [called, called]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "4"},
        SAID,
    )
    assert read.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)


@pytest.mark.parametrize("said", ["add(2, 2)", "[]", "[1]", '{"arguments": {}}', None])
def test_a_function_call_that_is_no_json_of_calls_is_refused(said: Any) -> None:
    turns = [{"from": "human", "value": TEXT}, {"from": "function_call", "value": said}]
    with pytest.raises(
        UserError, match="message 2: a function_call must be the JSON of an object with name and arguments"
    ):
        example({"conversations": turns})


@pytest.mark.parametrize(
    ("form", "values", "truth", "domain"),
    [
        (
            "verl",
            {"prompt": [ASKED], "data_source": "openai/gsm8k", "reward_model": {"style": "rule", "ground_truth": "4"}},
            "4",
            "openai/gsm8k",
        ),
        ("rlvr", {"messages": [ASKED], "ground_truth": "4", "dataset": "gsm8k"}, "4", "gsm8k"),
        ("rlvr", {"messages": [ASKED], "ground_truth": ["4"], "dataset": ["gsm8k"]}, "4", "gsm8k"),
        ("ifeval", {"key": 7, "prompt": TEXT, "instruction_id_list": ["a:b"], "kwargs": [{}]}, None, "user"),
        ("problem", {"question": TEXT, "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}, "4", "user"),
        (
            "problem",
            {"problem": TEXT, "solution": r"$\boxed{2}$ twice is $\boxed{\frac{8}{2}}$."},
            r"\frac{8}{2}",
            "user",
        ),
        ("problem", {"problem": TEXT, "solution": r"$\boxed{5}$", "answer": 4}, "4", "user"),
        ("problem", {"problem": TEXT, "ground_truth": "four", "domain": "words"}, "four", "words"),
        ("problem", {"prompt": [ASKED], "solution": "#### Step\nfour"}, "#### Step\nfour", "user"),
        ("prompt", {"prompt": TEXT, "unit": "cm"}, None, "user"),
        ("prompt", {"prompt": [ASKED], "answer": float("nan")}, None, "user"),
    ],
)
def test_a_problem_is_read_of_each_form(form: str, values: dict[str, Any], truth: str | None, domain: str) -> None:
    assert form_of(Row(values, "")).name == form
    read = example(values)
    assert (read.messages, read.response, read.answer, read.domain) == ((ASKED,), None, truth, domain)
    assert read.metadata == {k: v for k, v in values.items() if k not in ("prompt", "messages", "problem", "question")}


@pytest.mark.parametrize(
    "text", ['[{"a": 1}] Summarise this JSON.', '[{"a": 1}]', "[{x}] is a set. Which?", "[{", "[]"]
)
def test_a_prompt_that_begins_with_brackets_is_text_unless_it_holds_messages(text: str) -> None:
    assert example({"prompt": text}).messages == ({"role": "user", "content": text},)
    for turn in (ASKED, {"id": 1, **ASKED}):
        assert example({"prompt": json.dumps([turn])}).messages == (ASKED,)
    with pytest.raises(UserError, match="is not JSON"):
        example({"prompt": json.dumps([ASKED])[:-2]})


@pytest.mark.parametrize(
    ("level", "read"),
    [
        *((3, 3), ("3", 3), (3.0, 3), ("3.0", 3), ("Level 5", 5)),
        *((level, None) for level in ("Level ?", "hard", True, 2.5, "2.5", float("nan"), "1e999", None)),
    ],
)
def test_a_level_is_a_whole_number_or_the_one_that_its_text_ends_in(level: Any, read: int | None) -> None:
    assert example({"prompt": TEXT, "level": level}).level == read


@pytest.mark.parametrize(
    "answer", ['[{"from": "Paris", "to": "Rome"}]', '[{"role": "admin", "may": []}]', "[{'a': 1}]", "[]", "[1"]
)
def test_an_answer_may_be_other_json_than_messages(answer: str) -> None:
    assert example({"prompt": TEXT, "completion": answer}).response == answer
    assert preference({"prompt": TEXT, "chosen": answer, "rejected": "5."}).chosen == answer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "x"}, r"its columns \(text\) have no form that is known"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "column 'messages', message 1: unknown role 'bot'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1: unknown role 'alien'"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "message 2: must be an object with role and content"),
        ({"messages": [ASKED, SAID | {"content": " "}]}, "message 2: content must be text that is not empty"),
        ({"messages": [ASKED, SAID | {"content": [{"type": "image_url"}]}]}, r"a part that is no text \(image_url\)"),
        ({"messages": [SAID]}, "no message of the user comes before the answer"),
        ({"messages": [ASKED, CALLED, SAID]}, "message 2: 1 of its tool calls have no result after it"),
        ({"messages": [ASKED, RESULT, SAID]}, "message 2: a tool's result, and no tool call before it"),
        ({"messages": [ASKED, SAID | {"weight": 2}]}, "message 2: weight must be 0 or 1"),
        ({"messages": [ASKED, SAID], "tools": "add"}, "column 'tools' is not JSON"),
        ({"messages": [ASKED, SAID], "tools": {"a": 1}}, "column 'tools' must be a list of objects"),
        ({"prompt": [ASKED, SAID], "answer": "4"}, "column 'prompt' must end with a message of the user"),
        ({"prompt": TEXT, "messages": [ASKED], "answer": "4"}, "both prompt and messages"),
        ({"prompt": " ", "answer": "4"}, "column 'prompt' is empty"),
        ({"prompt": "\ud83d", "answer": "4"}, "column 'prompt': character 1 is half of a surrogate pair"),
        ({"prompt": 7, "answer": "4"}, "column 'prompt' must hold text or a list of messages, not 7"),
        ({"instruction": TEXT, "output": 4}, "column 'output' must hold text, not 4"),
        (
            {"prompt": "Human: a\n\nHuman: b\n\nAssistant:", "answer": "4"},
            "column 'prompt' is a dialogue, and its turns do not alternate",
        ),
        (
            {"prompt": TEXT, "completion": "5.", "label": False},
            "column 'label' is false: the completion is one that is",
        ),
        ({"prompt": TEXT, "completion": "5.", "label": "False"}, "column 'label' is false"),
        ({"prompt": TEXT, "completion": str([SAID])}, "column 'completion' is not JSON"),
        (
            {"prompt": TEXT, "completion": [ASKED | {"content": "3 + 3?"}, SAID]},
            "column 'completion' must begin with what",
        ),
        ({"messages": [ASKED, SAID], "images": [{"path": "a.png"}]}, "column 'images' is for models that see"),
        ({"messages": [ASKED | {"content": "<image> 2 + 2"}, SAID], "image": "a.png"}, "column 'image' is for models"),
        ({"question": TEXT, "choices": ["3", "four"], "answer": 1}, "column 'choices' may be a part of what is asked"),
        ({"question": TEXT, "options": {"A": "three"}, "answer": "A"}, "column 'options' may be a part"),
        ({"question": TEXT, "context": "Two and two are four.", "answer": "4"}, "column 'context' may be a part"),
        ({"prompt": TEXT, "chosen": "4.", "rejected": ""}, "column 'rejected' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_column(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"mine\.jsonl, line 1: .*{message}|mine\.jsonl, line 1: {message}"):
        example(values)


def test_a_completion_of_messages_may_repeat_its_prompt() -> None:
    for label in (True, 0):
        read = example({"prompt": TEXT, "completion": [ASKED, SAID], "label": label})
        assert (read.messages, read.response) == ((ASKED,), "4.")


def test_an_empty_column_of_pairs_alone_makes_no_pair() -> None:
    assert example({"prompt": TEXT, "completion": "4.", "rejected": None}).response == "4."


def test_parts_of_a_question_that_the_prompt_says_and_files_that_no_text_has_a_place_for_are_columns_for_rewards() -> (
    None
):
    asked = {"question": f"{TEXT} Is it 3 or four?", "choices": ["3", "four"], "answer": "B", "image": "swe:latest"}
    assert example(asked).metadata["choices"] == ["3", "four"]


def test_every_form_has_a_name_of_its_own() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS)
