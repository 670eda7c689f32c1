"""What counts as the printed text, or the returned value, that was expected."""

import math
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.code.cases import same, same_text
from reward.isolation.child import plain

BIG = 10**5000


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("1.333333\n", "1.333333333333\n"),
        ("7.0", "7"),
        ("7", "7.00"),
        ("7.0000001", "7"),
        ("-0.0", "0"),
        ("1e-05", "0.00001"),
        ("1e20", "100000000000000000000"),
        ("1234567.8", "1234567.81"),
        ("Case #1: 0.50", "Case #1: 0.5"),
        ("[0.3333333333, 2.0]", "[0.333333333333, 2]"),
        ("x=1.5,y=2.50", "x=1.50,y=2.5"),
        ("The mean is 7.5.", "The mean is 7.50."),
        ("50.0%", "50%"),
        ("nan inf -inf", "nan inf -inf"),
        ("3 4 \n\n", "3 4"),
        ("3\r\n4", "3\n4\n"),
    ],
)
def test_printed_numbers_may_differ_by_the_tolerance(printed: str, expected: str) -> None:
    assert same_text(printed, expected, 1e-6)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("1.3333", "1.333333333333"),
        ("7.01", "7"),
        ("8", "7.0"),
        ("10000001.0", "10000000"),
        ("10000001.0", "10000000.0"),
        ("10000001", "1e7"),
        ("10000001", "10000000"),
        ("007", "7"),
        ("+7", "7"),
        ("-7.0", "7"),
        ("1.5 2", "1.5"),
        ("1.5\n2", "1.5 2"),
        ("1  2.0", "1 2"),
        (" 7.0", "7"),
        ("192.168.1.10", "192.168.1.1"),
        ("v1.10", "v1.1"),
        ("0x10", "0x1e1"),
        ("a1.50", "a1.5"),
        ("nan", "0.0"),
        ("nan", "NaN"),
        ("inf", "1e999"),
        ("1e999999999999999999999", "1.0"),
        ("1e99999999999999999999999", "1e99999999999999999999998"),
        ("1e-400", "1.0"),
        ("YES", "Yes"),
        ("", "0.0"),
    ],
)
def test_anything_else_must_be_equal(printed: str, expected: str) -> None:
    assert not same_text(printed, expected, 1e-6)
    assert not same_text(expected, printed, 1e-6)


@pytest.mark.parametrize("printed", ["1e20", "100000000000000000001.5", "99999999999999999999.0"])
def test_an_expected_integer_is_compared_in_all_its_digits(printed: str) -> None:
    assert not same_text(printed, "100000000000000000001", 1e-6)
    assert same_text("100000000000000000001.0", "100000000000000000001", 1e-6)


def test_without_a_tolerance_numbers_are_equal_or_not() -> None:
    assert same_text("7.0 0.50", "7 5e-1", 0.0)
    assert not same_text("0.1000000000000000000000001", "0.1", 0.0)


def test_words_are_compared_whatever_white_space_is_between_them_if_that_is_asked_for() -> None:
    printed, expected = "  1  2.0\n\n3\t", "1 2 3\n"
    assert not same_text(printed, expected, 1e-6)
    assert same_text(printed, expected, 1e-6, any_whitespace=True)
    assert not same_text("12 3", "1 23", 1e-6, any_whitespace=True)
    assert not same_text("1 2", "1 2 3", 1e-6, any_whitespace=True)


@given(st.decimals(allow_nan=False, allow_infinity=False), st.decimals(allow_nan=False, allow_infinity=False))
def test_text_without_a_tolerance_is_the_same_as_its_value(one: Decimal, other: Decimal) -> None:
    integers = "." not in f"{one}{other}" and "E" not in f"{one}{other}"
    assert same_text(str(one), str(other), 0.0) is (str(one) == str(other) if integers else one == other)


def test_no_printed_text_takes_long_to_compare() -> None:
    started = time.monotonic()
    for printed in (
        "1" * 10**5 * 2 + "x",
        "1." + "1" * 10**5 * 2 + "x",
        "1.1." * 10**5,
        "-" * 10**5 * 2,
        "1e" * 10**5,
        "9" * 10**5 + ".0",
    ):
        assert not same_text(printed, "1.0", 1e-6)
        assert not same_text(printed, printed + ".5", 1e-6)
    assert time.monotonic() - started < 30


def test_integers_of_any_length_are_compared() -> None:
    assert same(plain.encode(BIG), plain.encode(BIG), 1e-6)
    assert not same(plain.encode(BIG + 1), plain.encode(BIG), 1e-6)
    assert not same(10**400, 1.0, 1e-6)


@pytest.mark.parametrize(
    ("got", "expected", "equal"),
    [
        ((1, 2), [1, 2], True),
        ([(1, 2)], [[1, 2]], True),
        ([1, 2], (1, 2), False),
        (True, 1, False),
        (1, True, False),
        ([1], [True], False),
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({1: "a", 2.5: "b", None: "c"}, {"1": "a", "2.5": "b", "null": "c"}, True),  # JSON has no other keys
        ({1: "a", "1": "b"}, {"1": "a"}, False),
        ({2: "a"}, {"1": "a"}, False),
        ({"1": "a"}, {1: "a"}, False),
        ({1, 2}, [1, 2], False),
        (10**30, 10**30, True),
        (10**30, 10**30 + 1, False),
        ("4", 4, False),
        (None, 0, False),
        (1.333333, 1.333333333333, True),
        (1.3333, 1.333333333333, False),
        (7.0, 7, True),
        (10000001.0, 10000000, False),
        (10000001.0, 10000000.0, False),
        (10000001, 10000000.0, False),
        (10000000.4, 10000000, False),
        (10000000.4, 10000000.0, True),
        (math.nan, 1.0, False),
        (0.1 + 0.2, 0.3, True),
        (math.inf, 1e308, False),
        (math.inf, 1.0, False),
        (1.0, math.inf, False),
        (1e300, 1e300 * (1 + 1e-9), True),
    ],
)
def test_what_counts_as_the_expected_value(got: Any, expected: Any, equal: bool) -> None:
    """No tolerance makes one whole number of another."""
    assert same(plain.encode(got), plain.encode(expected), 1e-6) is equal
