"""Pairs of a model's own words: the chosen completion does what was asked, and the rejected one differs in what makes it worse."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from align.run.files import read_jsonl, write_jsonl
from align.tasks.instructions import generate

SENTENCES = [
    "A harbour is where ships rest, and where people meet them.",
    "Many a town began around one, for trade came with the ships.",
    "The water there is calm, since a wall of stone keeps the waves out.",
    "Fishing boats leave before dawn, and come back with the evening.",
    "Some harbours are deep enough for ships with thousands of boxes.",
    "Others have only small boats, a few nets and a lamp at the end of the pier.",
]


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("smollm2/pairs.py")


@pytest.fixture
def requests(script: ModuleType) -> list[Any]:
    return script.about_few_requests(map(script.Request.of, generate("train", seed=0, plain_share=0.3)))[:300]


def said_of(requests: list[Any]) -> dict[str, str]:
    """Six sentences on the topic of each request."""
    return {
        request.plain: " ".join(f"{line[:-1]} of {' '.join(request.topic)}." for line in SENTENCES)
        for request in requests
    }


@pytest.fixture
def made(script: ModuleType, requests: list[Any]) -> list[tuple[Any, str, str, str]]:
    said = said_of(requests)
    neighbours = zip(requests, [*requests[1:], requests[0]], strict=True)
    return [(r, *pair) for r, other in neighbours for pair in script.pairs_of(r, other, said, "No idea.")]


def test_the_chosen_completion_passes_and_the_rejected_one_is_another(
    script: ModuleType, made: list[tuple[Any, str, str, str]]
) -> None:
    assert {kind for _, kind, _, _ in made} == set(script.SHARES)
    for request, kind, chosen, rejected in made:
        assert request.judged(chosen).passes
        assert rejected not in ("", chosen)
        if kind in ("left out", "own", "loop", "short"):
            assert not request.judged(rejected).passes, (kind, rejected)


def test_what_nobody_asked_for_is_rejected_for_plain_requests_as_for_others(
    made: list[tuple[Any, str, str, str]],
) -> None:
    unasked = [(request, chosen, rejected) for request, kind, chosen, rejected in made if kind == "unasked"]
    plain = [(chosen, rejected) for request, chosen, rejected in unasked if not request.asked]
    assert len(plain) > 20
    assert len(plain) < len(unasked)
    for mark in ('"', "<<"):
        assert any(rejected.startswith(mark) and not chosen.startswith(mark) for chosen, rejected in plain)


def test_an_answer_that_loops_begins_as_the_chosen_one_and_ends_in_the_same_words_over_and_over(
    script: ModuleType,
) -> None:
    for seed in range(20):
        for text in ("one two three", " ".join(SENTENCES * 3)):
            looped = script.looped(text, Random(seed)).split()
            assert looped[0] == text.split()[0]
            assert looped[-12:] != text.split()[-12:]
            assert looped.count(looped[-1]) >= 5
            assert len(looped) <= len(text.split()) + max(script.WORDS_OF_AN_ANSWER)


def test_an_instruction_that_is_at_odds_with_another_is_not_added(script: ModuleType) -> None:
    assert script.fits(script.QUOTED, {})
    assert not script.fits(script.QUOTED, {script.QUOTED: {}})
    assert not script.fits(script.SMALL, {script.CAPITALS: {}})


def test_a_request_about_a_topic_is_asked_in_few_wordings_and_no_prompt_comes_twice(requests: list[Any]) -> None:
    wordings: dict[str, set[str]] = {}
    for request in requests:
        wordings.setdefault(" ".join(request.topic), set()).add(request.plain)
        assert request.example.prompt_text.startswith(request.plain)
    assert max(map(len, wordings.values())) <= 8
    assert len({request.example.prompt_text for request in requests}) == len(requests)


def test_the_same_models_pairs_are_left_as_they_are(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    few = generate("train", seed=0, plain_share=0.3)[:400]
    monkeypatch.setattr(script, "generate", lambda split, **_: few)
    monkeypatch.setattr(script, "PAIRS", 100)

    def answers(model: Any, prompts: dict[float, list[str]]) -> list[dict[str, str]]:
        asked.extend(prompts)
        return [said_of(script.about_few_requests(map(script.Request.of, few)))] * len(prompts)

    monkeypatch.setattr(script, "answers", answers)
    monkeypatch.setattr(script, "check_model_directory", lambda path, options: None)
    file = tmp_path / "pairs.jsonl"
    assert script.pairs("one", file) == f"{script.PAIRS} pairs of one's own words are in {file}"
    rows = list(read_jsonl(file))
    assert len(rows) == script.PAIRS
    assert {row["model"] for row in rows} == {"one"}
    assert "already" in script.pairs("one", file)
    assert asked == [script.TEMPERATURE, 0.0]
    for model, kept in (("other", rows[:3]), ("one", [rows[0] | {"made_by": "an earlier script"}])):
        write_jsonl(file, kept)
        before = len(asked)
        script.pairs(model, file)
        assert len(asked) == before + 2


def test_a_sentence_that_is_longer_than_an_answer_makes_no_pair(script: ModuleType, requests: list[Any]) -> None:
    endless = f"{' and '.join(SENTENCES[0].split()[:1] * 200)}."
    said = {request.plain: endless for request in requests}
    made = [pair for r in requests[:50] for pair in script.pairs_of(r, requests[60], said, None)]
    assert all(chosen.strip() and rejected.strip() for _, chosen, rejected in made)
