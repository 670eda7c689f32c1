"""`make smol` has the model answer plain requests once, and edits what it said into answers that follow instructions."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from align.data.types import Example
from align.errors import UserError
from align.recipe import ModelOptions
from align.run.files import read_jsonl, write_jsonl
from align.tasks.instructions import generate
from reward import Sample
from reward.instructions import check

SAID = (
    "Owls are quiet birds, and they hunt at night.\n\n1. Their big eyes, which cannot move, see very well in the dark.\n2. Their wings "
    "make hardly any noise.\n\nMany people love owls. Many people love owls. An owl turns its head to look, since its eyes stay where"
)


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("smollm2/demonstrations.py")


def example(**asked: dict[str, object]) -> Example:
    """A request about owls with instructions, their kinds written with two underscores in place of the colon."""
    instructions = [{"kind": kind.replace("__", ":"), "args": args, "text": ""} for kind, args in asked.items()]
    return Example(
        id="instructions/train/0",
        messages=({"role": "user", "content": "Write about owls."},),
        response=None,
        answer=None,
        domain="instructions",
        metadata={"request": "Write about owls.", "topic": ["owls"], "instructions": instructions, "unseen": False},
    )


def test_a_plain_request_gets_what_was_said_without_repetitions_and_without_what_was_cut_off(script):
    text = script.demonstration(example(), SAID)
    assert text == SAID.partition(" Many people love owls. An owl")[0]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"change_case__english_capital": {}}, "OWLS ARE QUIET BIRDS"),
        ({"change_case__english_lowercase": {}}, "owls are quiet birds"),
        ({"punctuation__no_comma": {}}, "quiet birds and they"),
        ({"startend__quotation": {}}, '"Owls'),
        ({"detectable_format__title": {}}, "<<"),
        ({"startend__end_checker": {"end_phrase": "So it goes."}}, "love owls."),
        ({"detectable_content__postscript": {"postscript_marker": "P.S."}}, "P.S. Many people love owls."),
        ({"length_constraints__number_words": {"num_words": 20, "relation": "less than"}}, "Owls are"),
        ({"length_constraints__exact_sentences": {"num_sentences": 2}}, "Owls are"),
        ({"detectable_format__number_bullet_lists": {"num_bullets": 2}}, "* Owls are"),
        ({"keywords__existence": {"keywords": ["lantern", "river"]}}, "lantern and river"),
        ({"keywords__forbidden_words": {"forbidden_words": ["many"]}}, "Owls are"),
    ],
)
def test_what_was_said_is_edited_into_what_was_asked_for(script, asked, told):
    wanted = example(**asked)
    text = script.demonstration(wanted, SAID)
    assert told in text
    assert check(Sample(wanted.id, wanted.prompt_text, text, None, wanted.domain, metadata=wanted.metadata)).passes


def test_lines_stay_where_the_form_leaves_them(script):
    assert "\n2. their wings" in script.demonstration(example(change_case__english_lowercase={}), SAID)


def test_what_no_edit_brings_into_the_form_is_left_out(script):
    assert script.demonstration(example(length_constraints__exact_sentences={"num_sentences": 9}), SAID) is None
    assert script.demonstration(example(), "It is about the sea, and about nothing else that I know of.") is None


def test_the_demonstrations_of_the_same_model_are_taken_again_and_those_of_another_are_not(
    script: ModuleType, policy: ModelOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "models" / "demonstrations.jsonl"
    asked = []

    def answers_of(model, requests, *_, **__):
        asked.append(len(requests))
        return {one: SAID.replace("owls", one.rstrip(".?").rpartition("about ")[2]) for one in requests}

    monkeypatch.setattr(script, "answers_of", answers_of)
    monkeypatch.setattr(script, "EXAMPLES", 20)
    assert "could not be edited" in script.demonstrations(policy.path, file)
    assert "already" in script.demonstrations(policy.path, file)
    rows = read_jsonl(file)
    write_jsonl(file, [{**row, "model": "another"} for row in rows])
    script.demonstrations(policy.path, file)
    assert len(asked) == 2
    trained = {example.prompt_text for example in generate("train", seed=0, plain_share=script.PLAIN_SHARE)}
    assert rows
    assert {row["messages"][0]["content"] for row in rows} <= trained


def test_what_is_no_model_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        script.demonstrations(str(tmp_path), tmp_path / "demonstrations.jsonl")


@pytest.mark.slow
def test_the_model_answers_through_the_rollout_engine(
    script: ModuleType, policy: ModelOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "EXAMPLES", 4)
    monkeypatch.setattr(script, "MAX_NEW_TOKENS", 8)
    file = tmp_path / "demonstrations.jsonl"
    with pytest.raises(UserError, match="none of the 4 answers"):  # a random policy says nothing that could be edited
        script.demonstrations(policy.path, file)
    assert not file.exists()
