"""Checkable instructions: what IFEval's checkers say of an answer, and which answers are none."""

import os
import subprocess
import sys
from typing import Any

import pytest

from reward import Sample, Score, UnusableAnswer, Verdict, get
from reward.instructions import SENTENCES, instructions, judge, sentences

PARROTS = "Parrots are clever birds that can copy the words which people say. They live for many years in warm forests."
REQUEST = "Tell me something interesting about parrots. Use no commas."


def sample(completion: str, *asked: tuple[str, dict[str, Any]], truncated: bool = False) -> Sample:
    kinds = asked or (("punctuation:no_comma", {}),)
    metadata = {"topic": ["parrots"], "instructions": [{"kind": kind, "args": args} for kind, args in kinds]}
    return Sample("1", REQUEST, completion, None, "instructions", truncated, metadata)


def judged(completion: str, *asked: tuple[str, dict[str, Any]], **more: Any) -> Score:
    return instructions(sample(completion, *asked), **more)


@pytest.mark.parametrize(
    ("kind", "args", "good", "bad"),
    [
        ("punctuation:no_comma", {}, PARROTS, PARROTS.replace(" that", ", that")),
        ("change_case:english_capital", {}, PARROTS.upper(), PARROTS),
        ("change_case:english_lowercase", {}, PARROTS.lower(), PARROTS),
        ("startend:quotation", {}, f'"{PARROTS}"', PARROTS),
        ("startend:end_checker", {"end_phrase": "The end."}, f"{PARROTS} The end.", f"The end. {PARROTS}"),
        ("detectable_format:title", {}, f"<<Parrots>> {PARROTS}", f"<Parrots> {PARROTS}"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, f"{PARROTS}\nP.S. They bite.", PARROTS),
        (
            "length_constraints:number_words",
            {"num_words": 30, "relation": "less than"},
            PARROTS,
            f"{PARROTS} {PARROTS[:60]}",
        ),
        ("length_constraints:number_words", {"num_words": 20, "relation": "at least"}, PARROTS, PARROTS[:66]),
        (SENTENCES, {"num_sentences": 2}, PARROTS, f"{PARROTS} They bite."),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, f"* {PARROTS}\n* They bite.", f"* {PARROTS}"),
        ("keywords:existence", {"keywords": ["garden"]}, f"{PARROTS} Some live in a garden.", PARROTS),
        ("keywords:forbidden_words", {"forbidden_words": ["very"]}, PARROTS, f"Very often {PARROTS}"),
        (
            "keywords:letter_frequency",
            {"letter": "w", "let_frequency": 3, "let_relation": "at least"},
            PARROTS,
            PARROTS[:66],
        ),
        ("detectable_format:json_format", {}, '{"parrots": "They are birds that live in the warm forests"}', PARROTS),
        ("detectable_format:json_format", {}, f'```json\n["{PARROTS}"]\n```', f'"{PARROTS}"'),
    ],
)
def test_a_kind_is_met_or_not(kind: str, args: dict[str, Any], good: str, bad: str) -> None:
    met = judged(good, (kind, args))
    assert (met.value, met.verdict) == (1.0, Verdict.PASS), met.detail
    assert met.detail == f"{kind.partition(':')[2]}: yes"
    missed = judged(bad, (kind, args))
    assert (missed.value, missed.verdict) == (0.0, Verdict.WRONG), missed.detail
    assert "NO" in missed.detail


def test_all_instructions_count_and_with_partial_each_of_them() -> None:
    asked = (("punctuation:no_comma", {}), ("startend:quotation", {}))
    assert judged(PARROTS, *asked).value == 0
    partly = judged(PARROTS, *asked, partial=True)
    assert (partly.value, partly.verdict, partly.detail) == (0.5, Verdict.WRONG, "no_comma: yes; quotation: NO")
    assert judged(f'"{PARROTS}"', *asked).value == 1


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        ("", "0 words of its own"),
        ("Parrots!", "1 words of its own"),
        ("parrots feathers beaks colours forests seeds fruit claws wings eggs", "a list of words, not sentences"),
        (f"{PARROTS} {PARROTS}", "the same words over and over"),
        (
            "They fly to the parrots. They fly to the parrots. And so it is with them in all of the woods.",
            "comes twice",
        ),
        ("The parrots are very very very nice to all of us in the woods.", "'very' three times in a row"),
        ("Here is something interesting about parrots. Use no commas.", "it repeats the request"),
        ("Owls are birds that hunt at night and sleep in the trees by day.", "nothing about the topic (parrots)"),
    ],
)
def test_a_degenerate_answer_gets_nothing_whatever_its_form(completion: str, why: str) -> None:
    found = judged(completion, partial=True)
    assert (found.value, found.verdict) == (0.0, Verdict.NO_ANSWER)
    assert why in found.detail


def test_what_it_must_repeat_is_not_its_own() -> None:
    ending = ("startend:end_checker", {"end_phrase": "And that is all that there is to say about them."})
    assert "words of its own" in judged("Parrots. And that is all that there is to say about them.", ending).detail
    assert judged(f"{PARROTS} And that is all that there is to say about them.", ending).value == 1


def test_an_answer_that_was_cut_off_gets_nothing() -> None:
    found = instructions(Sample(**{**sample(PARROTS).__dict__, "truncated": True}), partial=True)
    assert (found.value, found.verdict) == (0.0, Verdict.WRONG)
    assert found.detail == "cut off; no_comma: yes"


@pytest.mark.parametrize("ending", ["parrot", "Parrots", "PARROTS"])
def test_the_topic_may_be_inflected(ending: str) -> None:
    assert judge(sample(f"It is a bird that can talk to you if you ask a {ending}")).degenerate == ""


def test_sentences_are_counted_with_abbreviations_decimals_and_lines() -> None:
    assert len(sentences('Dr. Smith ate 3.5 plums, e.g. green ones. "Really?" she asked! ')) == 3
    assert len(sentences("* one\n* two\n\n***")) == 2


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"topic": ["parrots"]},
        {"topic": "parrots", "instructions": [{"kind": "punctuation:no_comma", "args": {}}]},
        {"topic": ["parrots"], "instructions": [{"kind": "punctuation:no_coma", "args": {}}]},
        {"topic": ["parrots"], "instructions": [{"kind": "punctuation:no_comma"}]},
        {"topic": ["parrots"], "instructions": [{"kind": "punctuation:no_comma", "args": {"most": 3}}]},
    ],
)
def test_data_that_cannot_be_judged_are_the_datas_fault(metadata: dict[str, Any]) -> None:
    with pytest.raises(UnusableAnswer):
        instructions(Sample("1", REQUEST, PARROTS, None, "instructions", metadata=metadata))


def test_the_same_answer_is_always_judged_the_same() -> None:
    short = sample("parrots wir sind les oiseaux and they can be in the woods", ("change_case:english_lowercase", {}))
    assert len({judge(short).met for _ in range(50)}) == 1


def test_nothing_is_fetched_and_the_environment_stays_as_it_is() -> None:
    """In a process of its own, where any name that is looked up ends it."""
    program = (
        "import os, socket, sys\n"
        "socket.getaddrinfo = lambda *a, **k: os._exit(3)\n"
        "from reward.instructions import _checkers\n"
        "assert _checkers()\n"
        "assert 'LOCAL_RANK' not in os.environ\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0


def test_it_is_registered() -> None:
    assert [parameter.name for parameter in get("instructions").parameters] == ["partial"]
