"""What is seen in a single answer."""

import time

import pytest

from align.habits import Answer, Found, answer_of_row
from align.habits.features import excerpt, features_of, names_of, phrase, tokens_of


@pytest.mark.parametrize(
    ("text", "feature"),
    [
        ('"The sea is wide."', ("wraps", '" "')),
        ('"The sea is wide."', ("begins", '"The')),
        ("**Sea**", ("wraps", "** **")),
        ("Sure! Here is it.", ("begins", "Sure! Here")),
        ("It is so. I hope this helps!", ("ends", "this helps!")),
        ("It is so, and", ("open end", "")),
        ("ONE TWO THREE", ("case", "capital letters only")),
        ("one two three", ("case", "lowercase letters only")),
        ("One Two Three", ("case", "words that all begin with a capital letter")),
        ("* one\n* two", ("line", "*")),
        ("1. one\n12. two", ("line", "1.")),
        ("Note: one\nAnd: two", ("line", "Note:")),
        ("one\ntwo\nthree", ("lines", "2")),
        ("one\n\ntwo", ("gap", "")),
        ("Это хорошо.", ("script", "Cyrillic")),
        ("这是好的。", ("script", "Chinese")),
        ("Das ist nicht die Antwort.", ("language", "German")),
        ("Le chat est dans la maison.", ("language", "French")),
        ("समुद्र चौड़ा है", ("open end", "")),
        ("Good 😊", ("symbol", "")),
        ("a, b", ("character", ",")),
        ("wait... what", ("run", "..")),
        ("two  spaces", ("run", "  ")),
        ("It is so wide. It is so wide. Yes.", ("repeats", "")),
        ("it is very very wide", ("stutters", "")),
        ("Tell me about the sea. It is wide.", ("echoes", "")),
        ("It is wide.", ("strays", "")),
        ("", ("empty", "")),
        (" \n ", ("empty", "")),
    ],
)
def test_what_an_answer_has_is_seen(text: str, feature: tuple[str, str]) -> None:
    assert feature in features_of(Answer(text, "Tell me about the sea in summer."))


def test_an_ordinary_answer_has_none_of_the_marks_of_others() -> None:
    kinds = {kind for kind, _ in features_of(Answer("The sea is wide in summer.", "Tell me about the sea in summer."))}
    assert kinds == {"begins", "ends", "character", "script", "letters", "language"}


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        (("wraps", '" "'), 'are wrapped in “"” (quotation mark)'),
        (("begins", "Sure!"), "begin with “Sure!”"),
        (("line", "1."), "have a line that begins with a number and “.”"),
        (("says", "( as a friend , really )"), "say “(as a friend, really)”"),
        (("lines", "1"), "have several lines"),
        (("short", "25"), "have at most 25 words"),
    ],
)
def test_a_feature_is_put_in_words(feature: tuple[str, str], said: str) -> None:
    assert phrase(feature) == said


def test_a_prompt_asks_for_a_mark_by_its_name() -> None:
    assert "quotation" in names_of(("wraps", '" "'))
    assert "comma" in names_of(("character", ","))
    assert names_of(("begins", "Sure!")) == frozenset()


def test_an_example_shows_the_place() -> None:
    long = Answer("one " * 100 + "needle, " + "two " * 100 + "end.")
    assert "needle" in excerpt(long, ("says", "needle"))
    assert excerpt(long, ("ends", "end.")).endswith("end.")
    assert excerpt(long, ("begins", "one")).startswith("one")


def test_vowel_signs_are_of_the_letter_before_them() -> None:
    assert tokens_of("हिन्दी में लिखो, cafe\u0301!") == ["हिन्दी", "में", "लिखो", ",", "cafe\u0301", "!"]
    kinds = {kind for kind, _ in features_of(Answer("काक हिन्दी में।"))}
    assert kinds == {"begins", "ends", "character", "script", "letters"}
    assert [about for kind, about in features_of(Answer("काक हिन्दी में।")) if kind == "character"] == ["।"]


def test_nothing_that_is_told_moves_the_cursor() -> None:
    assert excerpt(Answer("red\x1b[31m\r\nand\tgreen."), ("ends", "green.")) == "red [31m  and\tgreen."
    assert phrase(("character", "\x1b")) == "have “U+001B”"


def test_a_row_of_a_run_says_what_it_asked_for() -> None:
    row = {"prompt": "?", "completion": "x", "domain": "d", "finish_reason": "length"}
    row["metadata"] = '{"instructions": [{"kind": "startend:quotation", "args": {}}]}'
    assert answer_of_row(row) == Answer("x", "?", "d", frozenset({"startend:quotation"}), truncated=True)
    published = {"completion": "x", "instruction_id_list": ["punctuation:no_comma"], "metadata": None}
    assert answer_of_row(published).asked == {"punctuation:no_comma"}


def test_texts_of_any_length_and_loops_take_linear_time() -> None:
    start = time.process_time()
    prompt = "What is there in all of this? " + " ".join(f"word{n}" for n in range(40_000))
    for loop in ("!", "\n", ". ", '"', "a ", "a"):
        found = Found.of([Answer(f"It is so {loop * 30_000} and so on.", prompt)] * 20)
        assert ("strays", "") in found.features[0]
    assert time.process_time() - start < 5


def test_a_copy_is_found_in_the_beginning_and_the_end_of_a_long_prompt() -> None:
    words = [f"word{n}" for n in range(40_000)]
    assert ("copies", "") in features_of(Answer(" ".join(words[:9]), " ".join(words)))
    assert ("copies", "") in features_of(Answer(" ".join(words[-9:]), " ".join(words)))
