"""Preferences from every form they are published in, held apart like examples."""

import logging
from pathlib import Path
from typing import Any

import pytest

from align.data.cards import load_card
from align.data.loader import load_preferences, load_split
from align.data.types import Preference
from align.errors import UserError

from ..rows import write_card, write_rows

SPLITS = {"train": {"from": "train.jsonl"}, "test": {"from": "test.jsonl"}}
COLUMNS = {"format": "chosen_rejected", "chosen": "good", "rejected": "bad", "margin": "by", "domain": "about"}
NUMBERED = {"format": "numbered", "responses": ["a", "b"], "better": "better"}
SIGNED = {"format": "signed", "responses": ["a", "b"], "strength": "strength"}
HH = {"format": "hh", "chosen": "good", "rejected": "bad"}


def card_of(directory: Path, train: list[Any], test: list[Any] | None = None, **changes: Any) -> Any:
    """A card of files, or with `kind: hub` one of published data to be given a path."""
    write_rows(directory / "train.jsonl", train)
    write_rows(directory / "test.jsonl", test or [])
    kind, splits = changes.pop("kind", "file"), changes.pop("splits", SPLITS)
    fields = {"prompt": changes.pop("prompt", "q"), "preference": changes.pop("preference", COLUMNS)}
    source = {"kind": kind, "splits": splits, "fields": fields} | ({"path": "owner/name"} if kind == "hub" else {})
    return load_card(write_card(directory / "mine.md", source, stages=["reward_model"], domain="chat", **changes))


def row(q: Any = "Why?", good: Any = "Because.", bad: Any = "No.", **more: Any) -> dict[str, Any]:
    return {"q": q, "good": good, "bad": bad} | more


def test_a_preference_is_complete(tmp_path: Path) -> None:
    card = card_of(tmp_path, [row(by=2, about="facts"), row("What?", by=None, about="facts")])
    first, second = load_preferences(card, "train").examples
    assert first == Preference(
        id="mine/train/0",
        messages=({"role": "user", "content": "Why?"},),
        chosen="Because.",
        rejected="No.",
        domain="facts",
        margin=2.0,
    )
    assert (second.id, second.margin) == ("mine/train/1", None)


def test_completions_and_prompts_may_be_conversations(tmp_path: Path) -> None:
    prompt = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    good = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    card = card_of(tmp_path, [row(prompt, good, [*good[:1], {"role": "assistant", "content": ""}], about="x")])
    with pytest.raises(
        UserError,
        match=r"train\.jsonl, line 1: column 'bad', message 2: content must be text that is not empty, not \'\'",
    ):
        load_preferences(card, "train")
    card = card_of(tmp_path, [row(prompt, good, "No.", about="x")])
    (preference,) = load_preferences(card, "train").examples
    assert (list(preference.messages), preference.chosen, preference.rejected) == (prompt, "Because.", "No.")


def test_dialogues_of_hh_rlhf(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello: how are you?\n\nHuman: Why?\n\nAssistant:"
    (preference,) = load_preferences(
        card_of(tmp_path, [row(None, f"{start} Because.\n\nSo it is.", f"{start} No.")], prompt="good", preference=HH),
        "train",
    ).examples
    assert [(m["role"], m["content"]) for m in preference.messages] == [
        ("user", "Hi"),
        ("assistant", "Hello: how are you?"),
        ("user", "Why?"),
    ]
    assert (preference.chosen, preference.rejected) == ("Because.\n\nSo it is.", "No.")


@pytest.mark.parametrize(
    "bad",
    [
        "\n\nHuman: Hi\n\nAssistant: Yes.",
        "\n\nHuman: Other\n\nAssistant: No.",
        "\n\nHuman: Hi\n\nHuman: again\n\nAssistant: No.",
        "\n\nHuman: Hi\n\nAssistant: ",
        "Hi",
    ],
    ids=["the same answer", "another prompt", "no alternation", "empty", "no dialogue"],
)
def test_published_pairs_that_prefer_nothing_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    good = "\n\nHuman: Hi\n\nAssistant: Yes."
    rows = [row(None, good, bad), row(None, good, "\n\nHuman: Hi\n\nAssistant: No.")]
    card = card_of(tmp_path, rows, kind="hub", prompt="good", preference=HH)
    with caplog.at_level(logging.WARNING):
        found = load_preferences(card, "train", path=tmp_path / "train.jsonl").examples
    assert [preference.id for preference in found] == ["mine/train/1"]
    assert "1 of 2 rows left out. The first: " in caplog.text
    assert "train.jsonl, line 1: " in caplog.text


def test_equal_completions_in_a_file_of_ones_own_are_an_error(tmp_path: Path) -> None:
    card = card_of(tmp_path, [row(about="x"), row("What?", "Same.", "Same.", about="x")])
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: the chosen completion is the rejected one too"):
        load_preferences(card, "train")


def test_two_responses_and_the_number_of_the_better_one(tmp_path: Path) -> None:
    rows = [{"q": "1?", "a": "x", "b": "y", "better": 0}, {"q": "2?", "a": "x", "b": "y", "better": 1}]
    found = load_preferences(card_of(tmp_path, rows, preference=NUMBERED), "train").examples
    assert [(p.chosen, p.rejected, p.margin) for p in found] == [("x", "y", None), ("y", "x", None)]
    card = card_of(tmp_path, [rows[0] | {"better": 2}], preference=NUMBERED)
    with pytest.raises(UserError, match=r"line 1: column 'better' must be 0 or 1, the better response, not 2"):
        load_preferences(card, "train")


def test_two_responses_and_how_much_better_the_second_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"q": f"{s}?", "a": "x", "b": "y", "strength": s} for s in (-2, 0, 3)]
    card = card_of(tmp_path, rows, preference=SIGNED, kind="hub")
    found = load_preferences(card, "train", path=tmp_path).examples
    assert [(p.chosen, p.rejected, p.margin) for p in found] == [("x", "y", 2.0), ("y", "x", 3.0)]
    assert "neither response is preferred" in caplog.text


def test_a_training_prompt_of_the_test_split_is_dropped_and_counted(tmp_path: Path) -> None:
    card = card_of(
        tmp_path, [row("What is  IT?\n", about="x"), row("Else?", about="x")], [row("what is it?", about="x")]
    )
    loaded = load_preferences(card, "train")
    assert [preference.prompt_text for preference in loaded.examples] == ["Else?"]
    assert (loaded.dropped_contaminated, loaded.unchecked) == (1, ())
    assert load_preferences(card, "train", path=tmp_path / "train.jsonl").unchecked == ("test",)


def test_the_turns_of_a_conversation_stay_in_one_split(tmp_path: Path) -> None:
    def turns(opening: str, count: int) -> list[dict[str, str]]:
        more = [
            m for _ in range(count) for m in ({"role": "assistant", "content": "?"}, {"role": "user", "content": "Yes"})
        ]
        return [{"role": "user", "content": opening}, *more]

    rows = [row(turns(f"Opening {i}", count), about="x") for i in range(40) for count in range(3)]
    splits = {
        "train": {"from": "train.jsonl", "percent": [30, 100]},
        "test": {"from": "train.jsonl", "percent": [0, 30]},
    }
    card = card_of(tmp_path, rows, splits=splits)
    found = {name: load_preferences(card, name).examples for name in splits}
    openings = {name: {p.messages[0]["content"] for p in preferences} for name, preferences in found.items()}
    assert not openings["train"] & openings["test"]
    assert len(found["train"]) + len(found["test"]) == len(rows)
    assert len(found["test"]) == 3 * len(openings["test"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": "Q?", "good": "x"}, r"line 1: no column 'bad'; there are q, good"),
        (row(good="", about="x"), r"line 1: column 'good' is empty"),
        (row(good=7, about="x"), r"line 1: column 'good' must hold text or a list of messages, not 7"),
        (row(q=[{"role": "assistant", "content": "Hi"}], about="x"), "column 'q' must end with a message of the user"),
        (row(good=[{"role": "user", "content": "Hi"}], about="x"), "must end with a message of the assistant"),
        (row(by="much", about="x"), r"line 1: column 'by' must hold a number, not 'much'"),
        (row(by=True, about="x"), r"line 1: column 'by' must hold a number, not True"),
        (row(good="half a \ud83d", about="x"), "half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_read_names_file_line_and_column(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"train\.jsonl, .*{message}"):
        load_preferences(card_of(tmp_path, [bad]), "train")


ASKED = [{"role": "user", "content": "Q?"}]
PUBLISHED = {
    "ultrafeedback_binarized": {
        "prompt": "Q?",
        "chosen": [*ASKED, {"role": "assistant", "content": "yes"}],
        "rejected": [*ASKED, {"role": "assistant", "content": "no"}],
    },
    "pku_saferlhf": {"prompt": "Q?", "response_0": "no", "response_1": "yes", "safer_response_id": 1},
    "helpsteer2": {"prompt": "Q?", "response_1": "yes", "response_2": "no", "preference_strength": -1},
    "hh_helpful": {"chosen": "\n\nHuman: Q?\n\nAssistant: yes", "rejected": "\n\nHuman: Q?\n\nAssistant: no"},
    "hh_harmless": {"chosen": "\n\nHuman: Q?\n\nAssistant: yes", "rejected": "\n\nHuman: Q?\n\nAssistant: no"},
    "own_preferences": {"id": "1", "messages": ASKED, "chosen": "yes", "rejected": "no", "domain": "code"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_as_each_card_says_it_is_published(tmp_path: Path, name: str) -> None:
    card = load_card(name)
    file = write_rows(tmp_path / "rows.jsonl", [PUBLISHED[name]])
    # "Q?" lies beyond the share of its hash that validation and test take.
    (found,) = load_preferences(card, "train", path=file).examples
    assert (found.prompt_text, found.chosen, found.rejected) == ("Q?", "yes", "no")
    assert found.domain == ("code" if name == "own_preferences" else card.domain)


def test_prompts_of_preferences_serve_grpo_too(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "test.jsonl", [{"prompt": "Q?", "response_0": "a", "response_1": "b", "safer_response_id": 1}]
    )
    (example,) = load_split(load_card("pku_saferlhf"), "test", path=file).examples
    assert (example.prompt_text, example.answer) == ("Q?", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preference": COLUMNS | {"format": "pairs"}},
            r"preference: .*'pairs'.*'chosen_rejected', 'hh', 'numbered', 'signed'",
        ),
        ({"preference": HH | {"chosenn": "x"}}, r"unknown key 'chosenn' \(did you mean 'chosen'\?\)"),
        ({"preference": None}, "reward_model needs preferences, and the source has none"),
        ({"instruction": "Be brief."}, "instruction: preferences are about answers that were given without it"),
    ],
)
def test_a_card_that_cannot_hold_preferences(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        card_of(tmp_path, [row()], **changes)


def test_a_card_without_preferences_says_so() -> None:
    with pytest.raises(UserError, match="nano_math has no preferences to train a reward model on"):
        load_preferences(load_card("nano_math"), "train")


def test_generated_preferences_are_about_one_aspect() -> None:
    card = load_card("nano_chat")
    with pytest.raises(UserError, match="are about one aspect; name it in params"):
        load_preferences(card, "test")
    loaded = load_preferences(card, "test", params={"aspect": "safety"}, limit=20)
    assert len(loaded.examples) == 20
    assert all(p.chosen != p.rejected and p.domain == card.domain for p in loaded.examples)
    assert loaded.examples != load_preferences(card, "test", params={"aspect": "safety"}, limit=20, seed=1).examples
    with pytest.raises(UserError, match="is generated: it takes no path"):
        load_preferences(card, "test", path="x.jsonl", params={"aspect": "safety"})
