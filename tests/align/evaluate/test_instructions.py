"""Verifiable instructions: each check, strict and loose, and requests that can be met."""

import dataclasses
import json
from typing import Any

import pytest

from align.evaluate.hooks import Checkpoint, run
from align.evaluate.instruction_checks import CHECKS, SEPARATOR, follows, follows_loosely, sentences
from align.evaluate.instructions import Request, make_requests

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("all_capitals", {}, ["A SHIP.", "ÉTÉ 1999!"], ["A ship.", "123", "A SHIp"]),
    ("all_small", {}, ["a ship, 2 masts.", "été"], ["A ship", "12 + 3"]),
    (
        "word_count",
        {"relation": "at least", "count": 3},
        ["one two three", "it's well-known here"],
        ["one, two!", "- - -"],
    ),
    ("word_count", {"relation": "at most", "count": 2}, ["one two", "well-known fact"], ["one two three"]),
    (
        "sentence_count",
        {"relation": "at least", "count": 2},
        ["Yes. No!", "是的。不是。", "Yes? no"],
        ["Mr. Brown has 3.5 cats"],
    ),
    ("sentence_count", {"relation": "at most", "count": 1}, ["It is 3.5 m, e.g. here..."], ["Yes. No."]),
    (
        "bullet_count",
        {"count": 2},
        ["* a\n* b", "Here:\n- a\n  - b\n"],
        ["* a", "* a\n* b\n* c", "2 * 3\n* b", "*a*\n*b*"],
    ),
    ("paragraph_count", {"count": 2}, ["a\n\nb", "a\nb\n \n\n\nc\n"], ["a\nb", "a\n\nb\n\nc"]),
    ("has_words", {"wanted": ["sea", "old"]}, ["The OLD sea", "old, the sea's"], ["season of old", "sea"]),
    ("lacks_words", {"unwanted": ["good"]}, ["goodness", "bad"], ["Good!", "so-good"]),
    ("repeats_word", {"word": "sea", "count": 2}, ["Sea and sea", "sea, sea's"], ["sea seas", "sea"]),
    ("repeats_letter", {"letter": "b", "count": 2}, ["Bob", "abb"], ["b", "cd"]),
    ("no_commas", {}, ["a; b"], ["a, b", "一，二", "一、二"]),
    ("begins_with", {"phrase": "Once upon"}, ["once upon a time", "  Once upon"], ["So once upon a time"]),
    ("ends_with", {"phrase": "The end."}, ["a. The end.\n", "THE END."], ["The end. Good night.", "The end"]),
    ("quoted", {}, ['"a"', "“a”\n"], ['"a', "a", '""', "'a'"]),
    ("titled", {}, ["<<The sea>>\ntext"], ["<The sea>", "<< >>", "<<a\nb>>"]),
    ("placeholder_count", {"count": 2}, ["[name] [street 1]", "[a][b]"], ["[name]", "[] [ ]", "[[a"]),
    ("postscript", {}, ["a\nP.S. b", "a\n p.s.: b", "a\nP. S. b"], ["a", "a P.S. b", "a\nP.S."]),
    ("repeats_request", {"request": "Say a. "}, ["say a. b", "Say a.\nb"], ["Say a.", "b. Say a."]),
    (
        "two_answers",
        {},
        [f"a{SEPARATOR}b", f"a\n{SEPARATOR}\nb\n"],
        ["a", f"a{SEPARATOR}a", f"a{SEPARATOR}b{SEPARATOR}c"],
    ),
    (
        "is_json",
        {"keys": ["a", "b"]},
        ['{"a": 1, "b": [2]}', '```json\n{"b": 1,\n "a": 2}\n```\n'],
        ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', "[1]", "a", 'Here: {"a": 1, "b": 2}', "[" * 100_000],
    ),
]


@pytest.mark.parametrize(("kind", "params", "good", "bad"), CASES)
def test_a_check_tells_what_follows_from_what_does_not(
    kind: str, params: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not follows(kind, params, text)] == []
    assert [text for text in bad if follows(kind, params, text)] == []
    assert not follows(kind, params, " \n")


def test_every_check_has_cases_and_is_asked_for() -> None:
    assert {kind for kind, *_ in CASES} == CHECKS.keys()
    assert {one.kind for request in make_requests(300, 0) for one in request.instructions} == CHECKS.keys()


@pytest.mark.parametrize(
    ("text", "loosely"),
    [
        ("a b", True),
        ("Sure, here it is:\na b", True),
        ("a b\nIs that all right, my friend?", True),
        ("Sure, here:\na b\nAnything else, perhaps?", True),
        ("Sure, here:\na, b\nAnything else, perhaps?", False),
    ],
)
def test_the_loose_criterion_forgives_the_first_and_the_last_line(text: str, loosely: bool) -> None:
    assert follows_loosely("no_commas", {}, text) is loosely


def test_the_loose_criterion_forgives_emphasis() -> None:
    assert not follows("begins_with", {"phrase": "Once"}, "**Once** more")
    assert follows_loosely("begins_with", {"phrase": "Once"}, "**Once** more")


def test_sentences_end_at_stops_that_end_them() -> None:
    assert sentences('Dr. No paid $3.50, e.g. for tea. "Really?" Yes… 好的。 - ') == [
        "Dr․ No paid $3.50, e․g․ for tea",
        '"Really',
        "Yes",
        "好的",
    ]


def meet(request: Request) -> str:
    """A response that follows all that a request asks for, however dull: the proof that it can be met."""
    asked = {one.kind: one.params for one in request.instructions}
    core = ["stone", *asked.get("has_words", {}).get("wanted", [])]
    core += [asked["repeats_word"]["word"]] * asked["repeats_word"]["count"] if "repeats_word" in asked else []
    core += [asked["repeats_letter"]["letter"]] * asked["repeats_letter"]["count"] if "repeats_letter" in asked else []
    if "is_json" in asked:
        return json.dumps({key: " ".join(core) for key in asked["is_json"]["keys"]})
    core += [f"[x{i}]" for i in range(asked.get("placeholder_count", {}).get("count", 0))]
    core += ["<<Stone>>"] if "titled" in asked else []
    words, count = asked.get("word_count", {}), asked.get("sentence_count", {})
    core += ["stone"] * words["count"] if words.get("relation") == "at least" else []
    start = asked.get("begins_with", {}).get("phrase", "") + asked.get("repeats_request", {}).get("request", "")
    text = f"{start} {' '.join(core)}".strip()
    text += ". Stone" * (count["count"] if count.get("relation") == "at least" else 0)
    text += "\n* stone" * asked.get("bullet_count", {}).get("count", 0)
    text += "\n\nstone" * (asked.get("paragraph_count", {}).get("count", 1) - 1)
    text += f"\n{SEPARATOR}\npebble" if "two_answers" in asked else ""
    text += "\nP.S. stone" if "postscript" in asked else ""
    text += ". " + asked["ends_with"]["phrase"] if "ends_with" in asked else ""
    text = f'"{text}"' if "quoted" in asked else text
    return text.upper() if "all_capitals" in asked else text.lower() if "all_small" in asked else text


def test_every_request_can_be_met() -> None:
    requests = make_requests(2000, 1)
    failed = [
        (request.prompt, one.kind)
        for request in requests
        for one in request.instructions
        if not follows(one.kind, one.params, meet(request))
    ]
    assert failed == []
    assert {len(request.instructions) for request in requests} == {1, 2, 3}
    assert all(one.text in request.prompt for request in requests for one in request.instructions)


def test_requests_follow_from_the_seed() -> None:
    assert make_requests(20, 3) == make_requests(30, 3)[:20]
    assert [r.prompt for r in make_requests(20, 3)] != [r.prompt for r in make_requests(20, 4)]


def test_accuracy_is_of_prompts_and_of_instructions(checkpoint: Checkpoint, scripted: Any) -> None:
    """Every other response begins with a line of greeting, which only the loose criterion forgives."""
    requests = make_requests(40, 0)
    by_prompt = {request.prompt: (i, request) for i, request in enumerate(requests)}

    def answer(prompt: str) -> str:
        i, request = by_prompt[prompt.removeprefix("User: ").removesuffix("\n\nAssistant:")]
        return meet(request) if i % 2 == 0 else "Hello\n" + meet(request)

    roomy = dataclasses.replace(checkpoint, max_length=4096)
    metrics = run("instructions", roomy, scripted(answer), {"count": 40, "max_new_tokens": 2000})
    strict = [row["strict"] for row in metrics.rows]
    assert all(all(one) for one in strict[::2])
    assert metrics.values["prompt_strict"] == sum(map(all, strict)) / 40 < 1
    assert metrics.values["instruction_strict"] == sum(map(sum, strict)) / sum(map(len, strict)) < 1
    assert metrics.values["prompt_loose"] == metrics.values["instruction_loose"] == 1.0
    kinds = {one.kind for request in requests for one in request.instructions}
    assert {name.split("/")[1] for name in metrics.values if "/" in name} == kinds


HARNESS = {
    "no_commas": ("punctuation:no_comma", {}),
    "bullet_count": ("detectable_format:number_bullet_lists", {"num_bullets": "count"}),
    "has_words": ("keywords:existence", {"keywords": "wanted"}),
    "lacks_words": ("keywords:forbidden_words", {"forbidden_words": "unwanted"}),
    "ends_with": ("startend:end_checker", {"end_phrase": "phrase"}),
    "titled": ("detectable_format:title", {}),
    "quoted": ("startend:quotation", {}),
    "placeholder_count": ("detectable_content:number_placeholders", {"num_placeholders": "count"}),
    "two_answers": ("combination:two_responses", {}),
    "repeats_request": ("combination:repeat_prompt", {"prompt_to_repeat": "request"}),
}


def test_ifeval_itself_says_the_same_of_such_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the harness's implementation of IFEval has a check of the same meaning, over responses of many forms."""
    pytest.importorskip("lm_eval")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda *args, **kwargs: None)  # or it downloads what these checks do not use
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    requests = make_requests(150, 7)
    responses = [meet(request) for request in requests]
    disagreed = []
    compared = 0
    for one in (one for request in requests for one in request.instructions if one.kind in HARNESS):
        name, renamed = HARNESS[one.kind]
        theirs = INSTRUCTION_DICT[name](name)
        theirs.build_description(**{key: one.params[ours] for key, ours in renamed.items()})
        for response in responses:
            compared += 1
            if bool(theirs.check_following(response)) != follows(one.kind, one.params, response):
                disagreed.append((one.kind, response))
    assert compared > 10_000
    assert disagreed == []
