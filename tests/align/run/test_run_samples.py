"""What is written is what is read; what is broken is refused by file and line."""

import math
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.run import read_jsonl, read_samples, write_jsonl, write_samples


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "1 + 1 = ", "tokens": [5, 2**40], "log_probs": [-0.1, -math.inf], "reward": 1.0},
        {"prompt": "日本語\n", "tokens": [], "log_probs": [], "reward": 0.0},
    ]
    path = tmp_path / "samples" / "step_00012.parquet"
    write_samples(path, rows)
    assert read_samples(path) == rows
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_column_is_lost_when_rows_have_different_keys(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.parquet", [{"a": 1}, {"b": "x"}])
    assert read_samples(tmp_path / "a.parquet") == [{"a": 1, "b": None}, {"a": None, "b": "x"}]


def test_no_rows_are_a_table_too(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.parquet", [])
    assert read_samples(tmp_path / "a.parquet") == []


def test_rows_that_fit_no_table_leave_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_samples(path, [{"a": 1}])
    with pytest.raises(ValueError, match="tried to convert"):
        write_samples(path, [{"a": 1}, {"a": "one"}])
    assert read_samples(path) == [{"a": 1}]


def test_objects_without_any_key_are_null(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.parquet", [{"id": 1, "components": {}}, {"id": 2, "components": {}}])
    assert read_samples(tmp_path / "a.parquet") == [{"id": 1, "components": None}, {"id": 2, "components": None}]


def test_a_missing_or_foreign_file_is_no_table_of_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.parquet does not exist"):
        read_samples(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match=r"text\.parquet is not a readable Parquet file"):
        read_samples(tmp_path / "text.parquet")


def test_json_lines_come_back_as_they_were(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "line\u2028separator\n", "answer": 2}, {"答": [1.5, None]}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    assert len((tmp_path / "a.jsonl").read_bytes().splitlines()) == 2


def test_blank_lines_byte_order_mark_and_line_ends_of_windows_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"a": 1', "not JSON"),
        (b"[1, 2]", "a JSON list"),
        (b'"text"', "a JSON str"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, complaint: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: {complaint}"):
        read_jsonl(tmp_path / "a.jsonl")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            read_jsonl(path)


def test_a_row_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert read_jsonl(path) == [{"a": 1}]
