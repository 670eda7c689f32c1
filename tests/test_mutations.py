"""The changes that `make mutations` makes can be made, and only a test that fails by itself has caught one."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_name("mutations.py")


@pytest.fixture(scope="module")
def mutations() -> Any:
    spec = spec_from_file_location("mutations", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["mutations"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_change_is_of_code_that_is_there_once_and_names_tests_that_are_there(mutations: Any) -> None:
    entries = mutations.mutations()
    assert [entry.mistake for entry in entries if entry.mistake] == []
    assert len({entry.name for entry in entries}) == len(entries)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({"t.py::a[1]": ("call", "", False), "t.py::a[2]": ("call", "AssertionError", False)}, "caught"),
        ({"t.py::a": ("call", "Failed", False)}, "caught"),
        ({"t.py::a": ("call", "", False)}, "SURVIVES t.py::a"),
        ({"t.py::ab": ("call", "AssertionError", False)}, "SURVIVES t.py::a"),
        ({"t.py::a": ("call", "NameError", True)}, "broken: NameError"),
        ({"t.py::a": ("setup", "ValueError", False)}, "broken: ValueError in setup"),
        ({"t.py": ("collect", "ImportError: no", True)}, "broken: ImportError"),
        ({"t.py::a": ("setup", "Skipped", False)}, "skipped"),
        ({}, "no result"),
    ],
)
def test_a_change_is_caught_by_a_test_that_fails_and_by_nothing_else(
    mutations: Any, found: dict[str, tuple[str, str, bool]], verdict: str
) -> None:
    change = mutations.Mutation("a change", "f.py", "old", "new", ["t.py::a"])
    assert verdict in mutations.verdict(change, found)
