"""What crosses the border of the sandbox: plain data, whole, and nothing that behaves."""

from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.code.cases import same
from reward.isolation.child import plain

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**50), max_value=10**50)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
KEYS = st.booleans() | st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    ATOMS | st.frozensets(KEYS) | st.sets(KEYS),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


@given(VALUES)
def test_a_value_returns_as_it_left(value: Any) -> None:
    back = plain.decode(plain.loads(plain.dumps(plain.encode(value))))
    assert back == value
    assert repr(type(back)) == repr(type(value))


@given(st.dictionaries(KEYS, st.integers()))
def test_a_dictionary_keeps_its_order(value: dict[Any, int]) -> None:
    assert list(plain.decode(plain.encode(value))) == list(value)


class Always:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Number(int):
    pass


@pytest.mark.parametrize(
    "value",
    [Always(), Number(4), [Number(4)], {"k": Always()}, namedtuple("P", "x")(1), (n for n in ()), len, int, range(3)],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_by_its_type(value: Any) -> None:
    with pytest.raises(plain.NotPlain, match="is not plain data"):
        plain.encode(value)


@pytest.mark.parametrize("value", [Counter("aab"), OrderedDict(a=2, b=1), defaultdict(list, a=[1])])
def test_the_dictionaries_of_collections_count_as_dictionaries(value: Any) -> None:
    back = plain.decode(plain.encode(value))
    assert back == value
    assert type(back) is dict


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"{}{}", b"9" * 5000, b"\xff"])
def test_what_is_no_json_is_malformed(data: bytes) -> None:
    with pytest.raises(plain.Malformed):
        plain.loads(data)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"set": [[]]},
        {"set": [], "dict": []},
        {"int": 4},
        {"dict": [[1]]},
        {"bytes": "xy"},
        {"iterator": 1},
        {"other": 1},
    ],
)
def test_what_is_no_tree_is_malformed(tree: Any) -> None:
    with pytest.raises(plain.Malformed):
        plain.decode(tree)


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda i: st.lists(i) | st.dictionaries(st.text(), i)), VALUES
)
def test_a_value_is_the_same_as_itself_and_no_forged_tree_breaks_the_comparison(forged: Any, value: Any) -> None:
    assert same(plain.loads(plain.dumps(plain.encode(value))), plain.encode(value), 0.0)
    assert same(forged, plain.encode(value), 1e-9) in (True, False)
