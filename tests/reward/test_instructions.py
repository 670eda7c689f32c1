"""Checkable instructions: what IFEval's checkers say of an answer, and which answers are none."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reward import Mixture, RewardTerm, Sample, Score, UnusableAnswer, Verdict
from reward.instructions import _COUNTS as COUNTED
from reward.instructions import JSON, PARAGRAPH, SENTENCES, check, checkers, instructions

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
        (
            "keywords:letter_frequency",
            {"letter": "#", "let_frequency": 1, "let_relation": "at least"},
            f"{PARROTS} #1",
            PARROTS,
        ),
        (
            "keywords:letter_frequency",
            {"letter": "!", "let_frequency": 1, "let_relation": "less than"},
            PARROTS,
            f"{PARROTS}!",
        ),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, PARROTS, PARROTS[:66]),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 2, "capital_relation": "less than"},
            f"VERY often {PARROTS}",
            f"VERY often I see them. {PARROTS}",
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "they"},
            PARROTS.replace(". ", ".\n\n\n\n"),
            PARROTS,
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


@pytest.mark.parametrize(
    ("kind", "args", "completion", "near"),
    [
        ("change_case:english_capital", {}, "PARROTS ARE BIRDS that can talk", 1 / 2),
        ("change_case:english_lowercase", {}, "Parrots are birds that can Talk", 4 / 6),
        ("punctuation:no_comma", {}, "Parrots, which are birds, can talk to you.", 1 / 3),
        ("startend:quotation", {}, '"Parrots are birds that can talk to you.', 1 / 2),
        ("startend:end_checker", {"end_phrase": "That is all."}, "That is all. Parrots are birds that can talk.", 1),
        ("detectable_format:title", {}, "<<Parrots>: birds that can talk to you.", 1 / 2),
        (
            "detectable_format:number_bullet_lists",
            {"num_bullets": 4},
            "* Parrots are birds.\n* They can talk to you.",
            1 / 2,
        ),
        (
            "length_constraints:number_words",
            {"num_words": 4, "relation": "less than"},
            "Parrots are birds that can talk to you",
            1 / 2,
        ),
        ("length_constraints:exact_sentences", {"num_sentences": 3}, "Parrots are birds that can talk to you.", 1 / 3),
        ("keywords:existence", {"keywords": ["talk", "honest"]}, "Parrots are birds that can talk to you.", 1 / 2),
        (
            "keywords:forbidden_words",
            {"forbidden_words": ["Can", "par"]},
            "Parrots are birds that can talk to you.",
            1 / 2,
        ),
        ("keywords:letter_frequency", {"letter": "z", "let_frequency": 4, "let_relation": "at least"}, PARROTS, 0),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, PARROTS, 0),
    ],
)
def test_with_partial_what_comes_near_gets_up_to_a_half(
    kind: str, args: dict[str, Any], completion: str, near: float
) -> None:
    assert judged(completion, (kind, args)).value == 0
    [found] = check(sample(completion, (kind, args))).near
    assert found == pytest.approx(near / 2)


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
    assert check(sample(f"It is a bird that can talk to you if you ask a {ending}")).degenerate == ""


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"topic": ["parrots"]},
        {"topic": ["parrots"], "instructions": None},
        {"topic": "parrots", "instructions": [{"kind": "punctuation:no_comma", "args": {}}]},
        {"instructions": [{"kind": "punctuation:no_coma", "args": {}}]},
        {"instructions": [{"kind": "punctuation:no_comma"}]},
        {"instructions": [{"kind": "punctuation:no_comma", "args": {"most": 3}}]},
        {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}]},
        {"instruction_id_list": ["punctuation:no_comma"]},
        {"ground_truth": "[{'instruction_id': ["},
        {"instructions": ""},
        {"instructions": {}},
        {"instruction_id_list": [], "kwargs": [], "instructions": "Answer politely."},
        {"instruction_id_list": [], "kwargs": []},
    ],
)
def test_data_that_cannot_be_judged_are_the_datas_fault(metadata: dict[str, Any]) -> None:
    with pytest.raises(UnusableAnswer):
        instructions(Sample("1", REQUEST, PARROTS, None, "instructions", metadata=metadata))


def test_an_empty_list_of_ids_does_not_hide_instructions() -> None:
    asked = {"instruction_id_list": [], "kwargs": [], "instructions": [{"kind": "punctuation:no_comma", "args": {}}]}
    assert check(Sample("1", REQUEST, f"{PARROTS} Yes, yes.", None, metadata=asked)).met == (False,)


def test_a_request_without_instructions_wants_an_answer_without_marks() -> None:
    assert (judged(PARROTS).value, judged("They are great!").value) == (1, 0)
    quoted = judged(f'"{PARROTS}"', partial=True)
    assert (quoted.value, quoted.verdict) == (0.25, Verdict.WRONG)


def asks(kind: str, **args: Any) -> dict[str, Any]:
    return {"instruction_id_list": [kind], "kwargs": [args]}


ODD = [
    asks("length_constraints:number_words", relation="at least"),
    asks("length_constraints:number_words", num_words=None, relation="at least"),
    asks("length_constraints:number_words", num_words=math.nan, relation="at least"),
    asks("length_constraints:number_words", num_words=5),
    asks("length_constraints:number_words", num_words=-5, relation="at least"),
    asks("length_constraints:number_words", num_words=5, relation="at most"),
    asks("length_constraints:number_words", num_words="5", relation="at least"),
    asks("length_constraints:number_words", num_words=True, relation="at least"),
    asks("length_constraints:number_sentences", num_sentences=2),
    asks("length_constraints:number_sentences", num_sentences="2", relation="at least"),
    asks("length_constraints:nth_paragraph_first_word", num_paragraphs=1, nth_paragraph=3, first_word="parrots"),
    asks("length_constraints:exact_sentences"),
    asks("change_case:capital_word_frequency", capital_frequency=3, capital_relation=["at least"]),
    asks("keywords:letter_frequency", letter="ab", let_frequency=1, let_relation="at least"),
    asks("keywords:letter_frequency", letter="", let_frequency=1, let_relation="at least"),
    asks("keywords:existence", keywords=[]),
    asks("keywords:existence", keywords="parrots"),
    asks("keywords:existence", keywords=["parrots", ""]),
    asks("keywords:existence", keywords=[5]),
    asks("keywords:forbidden_words"),
    asks("keywords:frequency", keyword="(", frequency=1, relation="at least"),
    asks("language:response_language", language="xx"),
    asks("startend:end_checker", end_phrase=" "),
    asks("detectable_format:number_bullet_lists", num_bullets=2.5),
    asks("combination:repeat_prompt"),
]


@pytest.mark.parametrize("row", ODD, ids=str)
def test_an_argument_that_is_missing_or_odd_masks_its_row_alone(row: dict[str, Any]) -> None:
    good = Sample("good", REQUEST, PARROTS, None, metadata=asks("punctuation:no_comma"))
    odd = Sample("odd", REQUEST, PARROTS, None, metadata=row)
    before, judged_odd, after = Mixture([RewardTerm(name="instructions")], infra_error_limit=1.0).score(
        [good, odd, good]
    )
    assert (judged_odd.value, judged_odd.verdict) == (None, Verdict.INFRA_ERROR)
    assert row["instruction_id_list"][0] in judged_odd.components["instructions"].detail
    assert before.value == after.value == 1


def test_what_is_missing_is_not_drawn() -> None:
    """Whatever the state of the generator that IFEval's checkers draw from."""
    for seed in range(20):
        random.seed(seed)
        with pytest.raises(UnusableAnswer, match="needs the arguments"):
            check(Sample("1", REQUEST, PARROTS, None, metadata=asks("length_constraints:number_words", num_words=None)))


def test_rows_are_read_as_ifeval_and_open_instruct_publish_them() -> None:
    """Columns of other kinds are null, numbers beside a null are floats, and kinds without arguments have null for all of them."""
    kinds = ["length_constraints:number_words", "punctuation:no_comma", "detectable_format:title"]
    number = {"num_words": 5.0, "relation": "at least", "keywords": None, "let_frequency": math.nan}
    kwargs = [number, dict.fromkeys(number), None]
    in_json = [{"num_words": 5, "relation": "at least", "keywords": None}, None, None]
    for metadata in (
        {"instruction_id_list": kinds, "kwargs": kwargs, "topic": None},
        {"ground_truth": str([{"instruction_id": kinds, "kwargs": [{**number, "let_frequency": None}, *kwargs[1:]]}])},
        {"ground_truth": json.dumps([{"instruction_id": kinds, "kwargs": in_json}])},
    ):
        found = check(Sample("1", REQUEST, PARROTS, None, metadata=metadata))
        assert (found.kinds, found.met, found.degenerate) == (tuple(kinds), (True, True, False), "")


def test_json_that_is_nested_too_deeply_is_the_answers_fault() -> None:
    assert judged("[" * 100_000, ("detectable_format:json_format", {})).verdict is Verdict.NO_ANSWER


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("a b", True, True),
        ("Sure, here it is:\na b", False, True),
        ("a b\nIs that all right, my friend?", False, True),
        ("Sure, here:\na b\nAnything else, perhaps?", False, True),
        ("Sure, here:\na, b\nAnything else, perhaps?", False, False),
        ("Sure, here it is:", False, False),
        (" \n ", False, False),
    ],
)
def test_the_loose_criterion_forgives_the_first_and_the_last_line(text: str, strict: bool, loose: bool) -> None:
    assert (check(sample(text)).met, check(sample(text), loose=True).met) == ((strict,), (loose,))


def test_the_loose_criterion_forgives_emphasis() -> None:
    asked = ("startend:quotation", {})
    assert check(sample('**"A b c"**', asked)).met == (False,)
    assert check(sample('**"A b c"**', asked), loose=True).met == (True,)


PUBLISHED = next(
    (file for up in Path(__file__).resolve().parents if (file := up / "shared/real/ifeval_gpt4.jsonl").is_file()), None
)


@pytest.mark.skipif(PUBLISHED is None, reason="needs the published answers of GPT-4 in ../shared/real")
def test_published_answers_have_their_published_verdicts_and_hardly_one_is_degenerate() -> None:
    assert PUBLISHED is not None
    rows = [json.loads(line) for line in PUBLISHED.open()]
    found = [check(Sample(str(row["key"]), row["prompt"], row["response"], None, metadata=row)) for row in rows]
    assert [list(one.met) for one in found] == [row["follow_instruction_list"] for row in rows]
    refused = [one.degenerate for one in found if all(one.met) and one.degenerate]
    assert len(refused) <= 0.01 * sum(all(one.met) for one in found), refused


@pytest.mark.skipif(PUBLISHED is None, reason="needs the published answers of GPT-4 in ../shared/real")
def test_the_loose_criterion_is_the_published_one() -> None:
    checkers()
    from lm_eval.tasks.ifeval import utils

    assert PUBLISHED is not None
    rows = [json.loads(line) for line in PUBLISHED.open()]
    plain = [row for row in rows if not {*COUNTED, JSON, PARAGRAPH} & set(row["instruction_id_list"])]
    for row in plain:
        theirs = utils.InputExample(row["key"], row["instruction_id_list"], row["prompt"], row["kwargs"])
        expected = utils.test_instruction_following_loose(theirs, row["response"]).follow_instruction_list
        sample = Sample(str(row["key"]), row["prompt"], row["response"], None, metadata=row)
        assert list(check(sample, loose=True).met) == expected
    assert len(plain) > 200


def test_the_same_answer_is_always_judged_the_same() -> None:
    short = sample("parrots wir sind les oiseaux and they can be in the woods", ("change_case:english_lowercase", {}))
    assert len({check(short).met for _ in range(50)}) == 1


def test_nothing_is_fetched_and_the_environment_stays_as_it_is() -> None:
    """In a process of its own, where any name that is looked up ends it."""
    program = (
        "import os, socket, sys\n"
        "socket.getaddrinfo = lambda *a, **k: os._exit(3)\n"
        "from reward.instructions import checkers\n"
        "assert checkers()\n"
        "assert 'LOCAL_RANK' not in os.environ\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
