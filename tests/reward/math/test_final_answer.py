"""What counts as the final answer of a completion, and which answers are the same."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import Sample, UnusableAnswer, Verdict, boxed_answers, equal, extract_final_answer, normalise
from reward.math.final_answer import exact_answer, is_spray, last_answers, without_thought


def sample(completion: str, answer: str | None = "42") -> Sample:
    return Sample(id="s", prompt="?", completion=completion, ground_truth=answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{ 42 }", "42"),
        (r"\boxed {42}", "42"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"first \boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{1} and cut off in \boxed{2", None),
        (r"so it is $\boxed 8$.", "8"),
        (r"so it is \boxed -3/4.", "-3/4"),
        (r"so it is \fbox{58}", "58"),
        (r"put it into \boxed or \boxed and go on", None),
        (r"cut off \boxed{a then \boxed{7}", "7"),
        (r"a stray } before \boxed{7}", "7"),
        (r"a stray { before \boxed{7}", "7"),
        (r"\boxed{}", None),
        (r"\boxed{ $ }", None),
        (r"\boxed{1", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text: str, answer: str | None) -> None:
    assert extract_final_answer(text) == answer


def test_a_box_inside_a_box_is_not_a_second_answer() -> None:
    assert boxed_answers(r"\boxed{\boxed{5}} \boxed{6}") == [r"\boxed{5}", "6"]


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (r"a=\boxed{3}, b=\boxed{11}, so \boxed{14}", [("", "14")]),
        (r"\boxed{1} and $\boxed{2}$", [("", "1"), ("", "2")]),
        (r"x=\boxed{1}\text{ or } x=\boxed{2}", [("x", "1"), ("x", "2")]),
        (r"It is \boxed{1}. Or maybe it is \boxed{2}.", [("", "1"), ("", "2")]),
        (r"It is \boxed{1}. Wait, no: \boxed{2}.", [("", "2")]),
        (r"\boxed{1}, \boxed{2}, \boxed{3", []),
        (r"\boxed{3} + \boxed{4} = \boxed{7}", [("", "7")]),
    ],
)
def test_boxes_are_one_answer_where_only_conjunctions_and_names_stand_between(
    text: str, answers: list[tuple[str, str]]
) -> None:
    assert last_answers(text) == answers


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("<think>1</think>2", "2"),
        ("<think>1</think>2<think>3</think>4", "2 4"),
        ("1</think>2", "2"),
        ("<think>1", ""),
        ("12", "12"),
    ],
)
def test_a_thought_is_not_said(completion: str, said: str) -> None:
    assert " ".join(without_thought(completion).split()) == said


@given(st.text(alphabet=r"\boxed{}1 ", max_size=60))
def test_any_text_can_be_read(text: str) -> None:
    assert all(answer in text for answer in boxed_answers(text))


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 50_000,
        r"\boxed{" * 50_000 + "}" * 50_000,
        r"\text{" * 50_000,
        r"\text{" * 20_000 + "}" * 20_000,
    ],
    ids=["unclosed boxes", "boxes", "unclosed text", "text"],
)
def test_hostile_nesting_takes_linear_time(text: str) -> None:
    started = time.process_time()
    exact_answer(sample(rf"\boxed{{{text}}}"))
    boxed_answers(text)
    assert time.process_time() - started < 10.0


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (" 42\n", "42"),
        ("$42$", "42"),
        (r"\$42", "42"),
        ("1,234,567", "1234567"),
        ("12,34", "12,34"),
        ("1234,567", "1234,567"),
        ("0,125", "0,125"),
        ("+7", "7"),
        ("007", "7"),
        ("-007", "-7"),
        ("7.0", "7"),
        ("7.10", "7.1"),
        (".5", "0.5"),
        ("-0.0", "0"),
        ("\N{MINUS SIGN}3", "-3"),
        (r"\text{ B }", "B"),
        (r"\text{\text{B}}", "B"),
        ("x.0", "x.0"),
        (".", "."),
        ("+", "+"),
    ],
)
def test_normalising_takes_off_what_does_not_change_the_value(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


@given(st.text(alphabet="$\\text{}0123.,+-\N{MINUS SIGN} /", max_size=30) | st.text())
def test_normalising_twice_changes_nothing_more(answer: str) -> None:
    assert normalise(normalise(answer)) == normalise(answer)


@given(st.text())
def test_every_answer_equals_itself(answer: str) -> None:
    assert equal(answer, answer)


@given(st.integers(-(10**20), 10**20), st.integers(0, 5))
def test_an_integer_equals_itself_however_written(number: int, zeros: int) -> None:
    assert equal(str(number), f"{number}." + "0" * zeros)
    assert equal(str(number), f"{number:,}")
    assert equal(str(number), f"${number}$".replace("-", "\N{MINUS SIGN}"))


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**9), st.integers(1, 1000))
def test_rationals_are_equal_exactly_when_their_values_are(top: int, bottom: int, factor: int) -> None:
    assert equal(f"{top}/{bottom}", f"{top * factor}/{bottom * factor}")
    assert not equal(f"{top}/{bottom}", f"{top * factor + 1}/{bottom * factor}")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_a_decimal_equals_its_fraction(number: object) -> None:
    assert equal(f"{number:f}", str(Fraction(str(number))))


@given(st.integers(), st.integers())
def test_different_integers_differ(one: int, other: int) -> None:
    assert equal(str(one), str(other)) == (one == other)


def test_equality_is_exact_where_floating_point_is_not() -> None:
    assert not equal("0.1", "0.10000000000000000001")
    assert equal("1/4", "0.25")
    assert not equal("1/3", "0.3333333333333333")


@pytest.mark.parametrize(
    "lookalike",
    [
        "\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}",
        "\N{ARABIC-INDIC DIGIT FOUR}\N{ARABIC-INDIC DIGIT TWO}",
        "\N{DEVANAGARI DIGIT FOUR}\N{DEVANAGARI DIGIT TWO}",
        "\N{MATHEMATICAL BOLD DIGIT FOUR}\N{MATHEMATICAL BOLD DIGIT TWO}",
        "4\N{ZERO WIDTH SPACE}2",
        "4_2",
        "4 2",
        "0x2a",
        "4.2e1",
        "42e0",
        "6*7",
    ],
)
def test_only_plain_decimal_digits_are_a_number(lookalike: str) -> None:
    assert not equal(lookalike, "42")
    assert not equal(lookalike + ".0", "42")
    assert not equal(lookalike + "/1", "42")


def test_huge_numbers_cost_nothing() -> None:
    started = time.process_time()
    assert not equal("1e999999999", "1e999999998")
    assert not equal("9" * 100_000, "8" * 100_000)
    assert equal("9" * 100_000, "9" * 100_000)
    assert not equal("1/" + "9" * 100_000, "2/" + "9" * 100_000)
    assert not equal("1/0", "2/0")
    assert time.process_time() - started < 5.0


@pytest.mark.parametrize(
    ("completion", "verdict", "value"),
    [
        (r"\boxed{42}", Verdict.PASS, 1.0),
        (r"\boxed{84/2}", Verdict.PASS, 1.0),
        (r"\boxed{42} and again \boxed{42.0}", Verdict.PASS, 1.0),
        (r"\boxed{41}", Verdict.WRONG, -1.0),
        (r"\boxed{41} \boxed{42}", Verdict.WRONG, -1.0),
        (r"\boxed{42} \boxed{}", Verdict.WRONG, -1.0),
        (r"<think>\boxed{41}</think> \boxed{42}", Verdict.PASS, 1.0),
        (r"<think>\boxed{42}</think> \boxed{41}", Verdict.WRONG, -1.0),
        (r"<think>\boxed{42}", Verdict.NO_ANSWER, -1.0),
        (r"a=\boxed{40}, b=\boxed{2}, so \boxed{42}", Verdict.PASS, 1.0),
        (r"a=\boxed{42}, b=\boxed{2}, so \boxed{44}", Verdict.WRONG, -1.0),
        (r"\boxed{42}, or rather \boxed{43", Verdict.NO_ANSWER, -1.0),
        ("42", Verdict.NO_ANSWER, -1.0),
        (r"\boxed{}", Verdict.NO_ANSWER, -1.0),
    ],
)
def test_exact_answer(completion: str, verdict: Verdict, value: float) -> None:
    score = exact_answer(sample(completion), right=1.0, wrong=-1.0)
    assert (score.verdict, score.value) == (verdict, value)


@pytest.mark.parametrize(
    ("gold", "right", "miss"),
    [
        ("2, 3", r"\boxed{2} or \boxed{3}", r"\boxed{2} or \boxed{4}"),
        ("2, 3", r"$x=\boxed{2.0}$ or $x=\boxed{3}$", r"\boxed{3}"),
        ("2, 3", r"\boxed{2,3}", r"\boxed{2}, \boxed{3}, \boxed{4}"),
        ("x=2, y=3", r"$x=\boxed{2}$ and $y=\boxed{3}$", r"$x=\boxed{3}$ and $y=\boxed{2}$"),
        ("1,234, 5", r"\boxed{1234}, \boxed{5}", r"\boxed{1,234,5}"),
        ("1, 234", r"\boxed{1} and \boxed{234}", r"\boxed{1,234}"),
    ],
)
def test_a_list_is_its_members_in_their_order(gold: str, right: str, miss: str) -> None:
    assert [exact_answer(sample(said, gold)).verdict for said in (right, miss)] == [Verdict.PASS, Verdict.WRONG]


@given(st.permutations(["40", "41", "42"]), st.integers(2, 3))
def test_a_spray_is_wrong_wherever_the_right_answer_stands(tries: list[str], count: int) -> None:
    completion = " ".join(rf"\boxed{{{one}}}" for one in tries[:count])
    assert is_spray(boxed_answers(completion))
    score = exact_answer(sample(completion))
    assert score.verdict is Verdict.WRONG
    assert "several different answers" in score.detail


@pytest.mark.parametrize("missing", [None, "", " ", "$"])
def test_without_a_ground_truth_nothing_is_right_or_wrong(missing: str | None) -> None:
    with pytest.raises(UnusableAnswer, match="sample 's'"):
        exact_answer(sample(r"\boxed{}", missing))
