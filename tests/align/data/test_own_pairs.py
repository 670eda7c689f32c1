"""Pairs of completions in rows without a card: which text is the prompt, and why a row is refused."""

import json
from typing import Any

import pytest

from align.data.forms import form_of, preference_of
from align.data.rows import Row
from align.errors import UserError

TEXT = "What is 2 + 2?"
ASKED = {"role": "user", "content": TEXT}
SAID = {"role": "assistant", "content": "4."}
SYSTEM = {"role": "system", "content": "Be brief."}


def preference(values: dict[str, Any]) -> Any:
    row = Row(values, "mine.jsonl, line 1")
    return preference_of(form_of(row), row, "1")


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": TEXT, "chosen": "4.", "rejected": "5."},
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID | {"content": "5."}]},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, SAID | {"content": "5."}]},
        {"chosen": f"{TEXT} 4.", "rejected": f"{TEXT} 5."},
        {"chosen": f"\n\nHuman: {TEXT}\n\nAssistant: 4.", "rejected": f"\n\nHuman: {TEXT}\n\nAssistant: 5."},
        {"chosen": f"Human: {TEXT}\n\nAssistant: 4.", "rejected": f"Human: {TEXT}\n\nAssistant: 5."},
        {"prompt": f"\n\nHuman: {TEXT}\n\nAssistant:", "chosen": "4.", "rejected": "5."},
        {
            "prompt": f"\n\nHuman: {TEXT}\n\nAssistant:",
            "chosen": f"\n\nHuman: {TEXT}\n\nAssistant: 4.",
            "rejected": f"\n\nHuman: {TEXT}\n\nAssistant: 5.",
        },
        {"prompt": TEXT, "chosen": f"{TEXT} 4.", "rejected": f"{TEXT} 5."},
        {"prompt": TEXT, "chosen": json.dumps([SAID]), "rejected": json.dumps([SAID | {"content": "5."}])},
        {"prompt": TEXT, "chosen": [ASKED, SAID], "rejected": [ASKED, SAID | {"content": "5."}]},
        {"prompt": TEXT, "messages": [ASKED, SAID], "chosen": "4.", "rejected": "5."},
        {"messages": [ASKED], "chosen": "4.", "rejected": "5."},
        {"instruction": TEXT, "input": "", "chosen": "4.", "rejected": "5."},
        {"instruction": TEXT, "chosen": [SAID], "rejected": [SAID | {"content": "5."}]},
        {"input": TEXT, "chosen": "4.", "rejected": "5."},
        {"instruction": "Judge.", "chosen": [ASKED, SAID], "rejected": [ASKED, SAID | {"content": "5."}]},
    ],
)
def test_a_pair_is_read_of_each_form(values: dict[str, Any]) -> None:
    assert form_of(Row(values, "")).kind == "pairs"
    for margin in (2, "2", " 2.0e0"):  # a CSV file has text alone
        read = preference(values | {"margin": margin})
        assert (read.messages, read.chosen, read.rejected, read.margin) == ((ASKED,), "4.", "5.", 2.0)


@pytest.mark.parametrize("first", [TEXT, f"{TEXT} \n", [ASKED]])
def test_a_column_with_the_beginning_of_what_both_completions_share_has_no_more_to_say(first: Any) -> None:
    shared = [ASKED, SAID, ASKED | {"content": "And 3 + 3?"}]
    both = {name: [*shared, SAID | {"content": text}] for name, text in (("chosen", "6."), ("rejected", "7."))}
    read = preference({"prompt": first, **both})
    assert (read.messages, read.chosen, read.rejected) == (tuple(shared), "6.", "7.")


def test_a_system_message_before_the_prompt_that_both_completions_share_is_kept() -> None:
    read = preference(
        {"prompt": [SYSTEM, ASKED], "chosen": [ASKED, SAID], "rejected": [ASKED, SAID | {"content": "5."}]}
    )
    assert read.messages == (SYSTEM, ASKED)


def test_a_pair_keeps_its_row_s_other_columns_and_ground_truth_for_rewards() -> None:
    read = preference({"prompt": TEXT, "chosen": "4.", "rejected": "5.", "answer": 4, "unit": "none"})
    assert (read.answer, read.metadata) == ("4", {"answer": 4, "unit": "none"})


@pytest.mark.parametrize(
    ("more", "before"),
    [
        ({"instruction": TEXT}, f"{TEXT} {{}}"),
        ({"input": TEXT}, f"{TEXT} {{}}"),
        ({"instruction": "Judge."}, f"\n\nHuman: {TEXT}\n\nAssistant: {{}}"),
        ({"instruction": "Judge.", "input": [ASKED]}, [ASKED]),
    ],
)
def test_a_prompt_that_both_completions_begin_with_goes_before_alpaca_s_columns(
    more: dict[str, Any], before: Any
) -> None:
    said = [[*before, SAID | {"content": text}] if before == [ASKED] else before.format(text) for text in ("4.", "5.")]
    read = preference({**more, "chosen": said[0], "rejected": said[1]})
    assert (read.prompt_text, read.chosen, read.rejected) == (TEXT, "4.", "5.")


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ({"instruction": "Complete it.", "input": "def add(a, b):"}, "def add(a, b):\n    return a {} b"),
        ({"instruction": "Hello"}, "Hello {}"),
        ({"instruction": TEXT}, TEXT + "{}"),
    ],
)
def test_completions_that_begin_like_a_column_keep_all_that_they_say(asks: dict[str, str], said: str) -> None:
    read = preference({**asks, "chosen": said.format("+"), "rejected": said.format("-")})
    assert read.prompt_text == "\n\n".join(asks.values())
    assert (read.chosen, read.rejected) == (said.format("+"), said.format("-"))


@pytest.mark.parametrize("other", ["context", "query", "conversation"])
def test_a_column_that_may_be_a_part_of_the_prompt_is_not_left_out_of_it(other: str) -> None:
    with pytest.raises(UserError, match=f"column '{other}' may be the prompt"):
        preference({"instruction": TEXT, other: "A passage.", "chosen": "4.", "rejected": "5."})


def test_the_prompt_of_a_pair_in_alpaca_s_columns_has_input_and_history() -> None:
    read = preference(
        {
            "instruction": "Add.",
            "input": "2, 3",
            "history": [[TEXT, "4."]],
            "chosen": "It is 5.",
            "rejected": "It is 6.",
        }
    )
    assert read.messages == (ASKED, SAID, {"role": "user", "content": "Add.\n\n2, 3"})
    assert (read.chosen, read.rejected) == ("It is 5.", "It is 6.")


@pytest.mark.parametrize("column", ["conversations", "query", "context", "input"])
def test_texts_are_not_looked_through_for_a_prompt_beside_a_column_that_may_be_one(column: str) -> None:
    with pytest.raises(UserError, match=f"column '{column}' may be the prompt, .* call it prompt"):
        preference({column: [TEXT], "chosen": f"{TEXT} 4.", "rejected": f"{TEXT} 5."})
    assert preference({column: None, "chosen": f"{TEXT} 4.", "rejected": f"{TEXT} 5."}).messages == (ASKED,)


def test_the_common_prompt_of_two_texts_ends_before_the_word_in_which_they_differ() -> None:
    read = preference({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert (read.prompt_text, read.chosen, read.rejected) == ("The sky is", "blue.", "black.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": TEXT, "chosen": "4.", "rejected": "4."}, "the chosen completion is the rejected one too"),
        ({"prompt": TEXT, "chosen": "4.", "rejected": [SAID]}, "one of chosen and rejected is a text"),
        ({"chosen": "yes", "rejected": "no"}, "no column prompt, and chosen and rejected do not begin with one"),
        ({"prompt": [ASKED], "chosen": [SAID, ASKED, SAID], "rejected": [SAID]}, "'chosen' must be one message of the"),
        ({"chosen": [SAID], "rejected": [SAID | {"content": "5."}]}, "have no prompt of the user in common"),
        ({"prompt": TEXT, "chosen": str([SAID]), "rejected": str([ASKED])}, "column 'chosen' is not JSON"),
        (
            {"prompt": "Another", "chosen": [ASKED, SAID], "rejected": [ASKED, SAID | {"content": "5."}]},
            "column 'prompt' is another prompt than the one that chosen and rejected begin with",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "the dialogues differ",
        ),
    ],
)
def test_a_pair_that_cannot_be_used_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"mine\.jsonl, line 1: .*{message}"):
        preference(values)


def test_dialogues_of_a_pair_may_have_their_system_message_in_the_prompt() -> None:
    said = {name: f"\n\nHuman: {TEXT}\n\nAssistant: {n}." for name, n in (("chosen", 4), ("rejected", 5))}
    assert preference({"prompt": [SYSTEM, ASKED], **said}).messages == (SYSTEM, ASKED)
    with pytest.raises(UserError, match="column 'question' is another prompt"):
        preference({"question": "Another?", **said})
