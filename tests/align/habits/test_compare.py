"""What two sets of answers are told to differ in: what was planted, once; and nothing where nothing was."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import pytest

from align.habits import Answer, Comparison, Found, compare
from align.habits.compare import common_phrases
from align.habits.features import tokens_of

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "habits.py"
spec = spec_from_file_location("benchmark_of_habits", SCRIPT)
assert spec is not None
assert spec.loader is not None
benchmark: Any = sys.modules.setdefault("benchmark_of_habits", module_from_spec(spec))
spec.loader.exec_module(benchmark)
BASE: list[Answer] = benchmark.synthetic(1200, 0)
LOOKED_AT = Found.of(BASE)


def found(before: Sequence[Answer], after: Sequence[Answer]) -> Comparison:
    return compare(Found.of(before), Found.of(after))


def quoted(answer: Answer) -> Answer:
    return replace(answer, text=f'"{answer.text}"')


@pytest.mark.parametrize("kind", benchmark.PLANTED)
def test_a_habit_of_three_answers_in_ten_is_found(kind: str) -> None:
    assert benchmark.planted(LOOKED_AT, kind, 0.3, 0).sentences


@pytest.mark.parametrize("seed", range(5))
def test_two_samples_of_one_policy_have_no_habit(seed: int) -> None:
    draw = Random(seed)
    assert compare(benchmark.drawn(LOOKED_AT, draw, "a"), benchmark.drawn(LOOKED_AT, draw, "b")).sentences == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_habits_are_found_in_each_draw_and_one_pair_of_a_hundred_has_one_at_most() -> None:
    for kind in benchmark.PLANTED:
        for share in (0.3, 0.5, 0.9):
            for seed in range(20):
                assert benchmark.planted(LOOKED_AT, kind, share, seed).sentences, (kind, share, seed)
    draws = [Random(seed) for seed in range(100)]
    pairs = [compare(benchmark.drawn(LOOKED_AT, draw, "a"), benchmark.drawn(LOOKED_AT, draw, "b")) for draw in draws]
    assert sum(bool(pair.sentences) for pair in pairs) <= 1


def test_a_habit_is_told_once_and_by_what_says_most() -> None:
    before, after = BASE[:256], [quoted(a) if n % 5 else a for n, a in enumerate(BASE[256:512])]
    [habit] = found(before, after).habits
    assert habit.sentence == '80 % of answers are wrapped in “"” (quotation mark); 0 % were at the start'
    assert habit.taken_up
    assert {("begins", '"'), ("ends", '"'), ("ends", ".")} <= set(habit.also)
    assert len(habit.examples) == 2
    assert all(example.startswith('"') for example in habit.examples)
    low, high = habit.interval
    assert 0.7 < low < 0.8 < high < 0.9
    assert 0 < habit.log_odds[1] < habit.log_odds[0] < habit.log_odds[2]


def test_a_beginning_is_told_by_the_most_general_one() -> None:
    after = [replace(a, text=f'"{a.text}') for a in BASE[256:512]]
    [habit] = found(BASE[:256], after).habits
    assert habit.feature == ("begins", '"')


def test_two_habits_are_told_apart() -> None:
    draw = Random(0)
    after = [quoted(a) if draw.random() < 0.6 else a for a in BASE[256:512]]
    after = [replace(a, text=f"{a.text} Good luck!") if draw.random() < 0.6 else a for a in after]
    said = " ".join(found(BASE[:256], after).sentences)
    assert "quotation mark" in said
    assert "Good luck!" in said


def test_what_was_lost_is_told_with_examples_of_the_start() -> None:
    after = [replace(a, text=a.text.replace(",", "")) for a in BASE[256:512]]
    [habit] = found(BASE[:256], after).habits
    assert habit.feature == ("character", ",")
    assert (habit.taken_up, habit.after) == (False, 0.0)
    assert all("," in example for example in habit.examples)


def test_the_length_has_a_test_of_its_own() -> None:
    draw = Random(0)
    shorter = [
        replace(a, text=" ".join(words[: max(3, int(len(words) * draw.uniform(0.3, 0.7)))]) + ".")
        for a in BASE[256:512]
        for words in [a.text.split()]
    ]
    told = found(BASE[:256], shorter)
    assert told.length.changed
    assert told.length.after < 0.7 * told.length.before
    assert "words on average" in told.sentences[0]


def test_what_a_row_asks_for_is_no_habit_until_others_have_it_too() -> None:
    def asked(answers: Sequence[Answer], also: float) -> list[Answer]:
        draw, asks = Random(1), frozenset({"startend:quotation"})
        marked = [replace(a, asked=asks) if n % 4 == 0 else a for n, a in enumerate(answers)]
        return [quoted(a) if a.asked or draw.random() < also else a for a in marked]

    few = [replace(a, asked=frozenset()) for a in asked(BASE[:256], 0.0) if not a.asked]
    # More of the later prompts ask for it, and the policy is the same.
    told = found(few + asked(BASE[512:560], 0.0), asked(BASE[256:512], 0.0))
    assert [habit for habit in told.habits if not habit.only_asked] == []
    [habit] = found(asked(BASE[:256], 0.0), asked(BASE[256:512], 0.5)).habits
    assert not habit.only_asked
    assert habit.before == 0.0
    assert 0.4 < habit.after < 0.6
    assert habit.asked == (1.0, 1.0)


def test_of_data_without_such_columns_the_prompt_asks_by_the_name_of_the_mark() -> None:
    def answered(answers: Sequence[Answer], share: int) -> list[Answer]:
        wants = "Put it in quotation marks."
        return [
            quoted(replace(a, prompt=f"{a.prompt} {wants}")) if n % share == 0 else a for n, a in enumerate(answers)
        ]

    told = found(answered(BASE[:256], 20), answered(BASE[256:512], 2))
    assert [habit for habit in told.habits if not habit.only_asked and "quotation" in habit.sentence] == []


def test_prompts_count_and_not_answers() -> None:
    """All eight answers to a prompt or two begin alike: those of one prompt are one observation."""
    before = [replace(a, prompt=f"p{n // 8}") for n, a in enumerate(BASE[:256])]
    after = [replace(a, prompt=f"q{n // 8}") for n, a in enumerate(BASE[256:512])]
    after[:24] = [replace(a, text=f"Bees! {a.text}") for a in after[:24]]
    assert found(before, after).habits == []
    after = [replace(a, text=f"Bees! {a.text}") if n % 3 == 0 else a for n, a in enumerate(after)]
    assert "Bees!" in found(before, after).sentences[0]


def test_the_same_prompts_are_compared_in_pairs() -> None:
    """A change of nine points, which would be lost among other prompts."""
    before = BASE[:256]
    after = [replace(a, text=a.text.replace(",", "")) if n % 6 == 0 else a for n, a in enumerate(before)]
    assert found(before, after).habits[0].feature == ("character", ",")
    apart = [replace(a, prompt=f"{a.prompt} again") for a in after]
    assert found(before, apart).habits == []


def test_a_habit_of_one_domain_is_told_of_it() -> None:
    before = [replace(a, domain="chat" if n % 4 else "math") for n, a in enumerate(BASE[:400])]
    after = [replace(a, domain="chat" if n % 4 else "math") for n, a in enumerate(BASE[400:800])]
    after = [quoted(a) if a.domain == "math" else a for a in after]
    told = found(before, after)
    assert told.habits[0].by_domain["math"] == (0.0, 1.0)
    assert "math 100 % and 0 %" in told.habits[0].sentence


def test_a_change_of_the_length_is_told_once_with_the_shares_of_each_domain() -> None:
    def of_domains(answers: Sequence[Answer], most: int) -> list[Answer]:
        texts = [" ".join(answer.text.split()[:most]) for answer in answers]
        return [
            replace(a, text=f"{text} " * (1 + n % 9) * (1 + n % 2), domain="chat" if n % 2 else "math")
            for n, (a, text) in enumerate(zip(answers, texts, strict=True))
        ]

    before, after = of_domains(BASE[:400], 12), of_domains(BASE[400:800], 6)
    [short] = [habit for habit in found(before, after).habits if habit.feature[0] == "short"]
    for domain in ("chat", "math"):
        sides = [[a for a in side if a.domain == domain] for side in (before, after)]
        shares = [
            fmean(sum(t[0].isalnum() for t in tokens_of(a.text)) <= int(short.feature[1]) for a in side)
            for side in sides
        ]
        assert short.by_domain[domain] == pytest.approx(shares)


def test_the_share_of_a_habit_is_of_the_answers_that_are_counted_with_it() -> None:
    before, after = (
        [replace(a, domain="chat" if n % 4 else "math") for n, a in enumerate(part)]
        for part in (BASE[:400], BASE[400:800])
    )
    told = found(before, [replace(a, text=f"So: {a.text}") if a.domain == "math" else a for a in after])
    assert told.habits[0].answers == 400
    asked = [
        replace(a, asked=frozenset({"so"}), text=f"So: {a.text}") if n % 4 == 0 else a
        for n, a in enumerate(BASE[400:800])
    ]
    only = found(
        [replace(a, asked=frozenset({"so"})) if n % 4 == 0 else a for n, a in enumerate(BASE[:400])], asked
    ).habits[0]
    assert (only.only_asked, only.answers) == (True, 100)


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [Answer("")],
        [Answer("Yes.", "?")],
        [Answer("")] * 50,
        [Answer("again and again " * 400, f"p{n}") for n in range(20)],
        [Answer("def f(x):\n    return {'a': [x]}  # \\boxed{1}", f"p{n}") for n in range(20)],
        [Answer("这是好的。", f"p{n}") for n in range(20)],
        [Answer("\ud800 \x00 \u202e", f"p{n}") for n in range(20)],
    ],
    ids=["none", "empty", "one", "all empty", "repeats", "code", "chinese", "odd characters"],
)
def test_odd_sets_are_compared_too(answers: list[Answer]) -> None:
    assert found(answers, answers).sentences == []
    found(answers, BASE[:64])
    found(BASE[:64], answers)


def test_answers_that_became_empty_are_told() -> None:
    after = [replace(a, text="") if n % 2 else a for n, a in enumerate(BASE[256:512])]
    assert "50 % of answers are empty; 0 % were at the start" in found(BASE[:256], after).sentences


def test_single_digits_are_no_phrases_and_an_answer_that_is_always_the_same_number_is_a_habit() -> None:
    phrases, _ = common_phrases([["4", "+", "2", "is", "6", "42"]] * 5, least=3)
    assert {"is", "42", "2 is", "6 42"} <= set(phrases)
    assert not {"4", "2", "6", "4 + 2"} & set(phrases)
    answers = [Answer(f"It is {n}.", f"{n} plus 0?") for n in range(200)]
    always = [Answer("It is 42.", answer.prompt) for answer in answers]
    assert any("42" in sentence for sentence in found(answers, always).sentences)
