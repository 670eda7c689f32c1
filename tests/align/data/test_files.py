"""Files as people have them: what is read, and where and why a row or a file is refused."""

import gzip
import json
import re
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.data.files import files_of, read_rows, readable, stem_of
from align.data.rows import Row
from align.data.stored import StoredRows
from align.errors import UserError

ROWS = [{"question": 'a, "b"\nc\u2028d?', "answer": "007"}, {"question": "é", "answer": "0.50"}]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    quoted = [[*rows[0]], *([*row.values()] for row in rows)]
    lines = [delimiter.join('"' + cell.replace('"', '""') + '"' for cell in cells) for cells in quoted]
    return "\r\n".join(lines).encode() + b"\r\n"


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def written(tmp_path: Path, name: str, content: bytes) -> Path:
    file = tmp_path / name
    file.write_bytes(content)
    return file


def values(file: Path) -> list[Any]:
    return [row.values for row in readable(file)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(ROWS)),
        ("rows.ndjson", jsonl(ROWS)),
        ("rows.json", jsonl(ROWS)),
        ("rows.json", json.dumps(ROWS, indent=1).encode()),
        ("bom.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode()),
        ("rows.csv", table(ROWS, ",")),
        ("rows.tsv", table(ROWS, "\t")),
        ("bom.csv", b"\xef\xbb\xbf" + table(ROWS, ",")),
        ("blank.csv", b"\r\n" + table(ROWS, ",") + b"\r\n\r\n"),
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS))),
        ("rows.csv.zst", zst(table(ROWS, ","))),
        ("odd.jsonl", b"\xef\xbb\xbf" + b"\r\n\r\n  \n".join(jsonl([row]).strip() for row in ROWS)),
    ],
)
def test_the_same_rows_are_read_of_every_format(name: str, content: bytes, tmp_path: Path) -> None:
    file = written(tmp_path, name, content)
    assert values(file) == ROWS
    stored = StoredRows([file])
    for number, row in enumerate(readable(file), start=1):
        stored.append(row, 0, number)
    for _ in range(2):
        again = [stored[place] for place in range(len(stored))]
        assert [(row.values, row.where) for row in again] == [(row.values, row.where) for row in readable(file)]


def test_objects_of_parquet_have_no_keys_but_their_own(tmp_path: Path) -> None:
    def called(**arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        tools = [{"name": "f", "parameters": {name: {"type": "string"} for name in arguments}}]
        tests = {
            "kind": "function",
            "entry_point": "f",
            "cases": [{"args": [], "kwargs": arguments, "expected": None}],
        }
        messages = [{"role": "assistant", "tool_calls": [call]}]
        return {"messages": messages, "tools": tools, "tests": tests, "facts": arguments}

    rows = [called(city="Paris"), called(amount="3")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = values(tmp_path / "rows.parquet")
    for name in ("messages", "tools", "tests"):
        assert [row[name] for row in read] == [row[name] for row in rows]
    assert read[0]["facts"] == {"city": "Paris", "amount": None}


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"note": "cut \ud83d"}, "column 'note': character 5 is half of a surrogate pair"),
        ({"facts": [{"a": "\udc00"}]}, "column 'facts': a character in it is half of a surrogate pair"),
    ],
)
def test_half_a_character_in_any_column_is_refused(form: str, row: Any, message: str, tmp_path: Path) -> None:
    whole = {"note": "\U0001f600"}
    text = json.dumps([whole, row]) if form == "array" else f"{json.dumps(whole)}\n{json.dumps(row)}\n"
    (tmp_path / "rows.json").write_text(text)
    first, second = read_rows(tmp_path / "rows.json")
    assert isinstance(first, Row)
    assert re.search(rf"(line|row) 2: {message}", str(second))


def test_a_large_list_with_escapes_is_read_in_linear_time(tmp_path: Path) -> None:
    rows = [{"text": f"{n} \U0001f600" * 20} for n in range(6000)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    start = time.process_time()
    assert sum(isinstance(row, Row) for row in read_rows(tmp_path / "rows.json")) == 6000
    assert time.process_time() - start < 2


def test_parquet_keeps_its_types_and_counts_rows_from_one(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}], "facts": {"index": n}} for n in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == rows
    assert [row.where for row in readable(tmp_path / "rows.parquet")][-1].endswith("rows.parquet, row 2500")


def test_what_parquet_has_and_json_has_not_is_numbers_and_text_as_stored_samples_have_it(tmp_path: Path) -> None:
    when, price = datetime(2026, 1, 2, 3, 4, tzinfo=UTC), Decimal("2.50")
    row = {
        "at": when,
        "day": when.date(),
        "took": timedelta(seconds=90),
        "price": price,
        "tenth": Decimal("0.1"),
        "bytes": b"\x00\xff",
        "exact": Decimal("3.141592653589793238462643"),
        "facts": {"all": [price, Decimal(3)]},
    }
    pq.write_table(pa.Table.from_pylist([row | {"plain": {"n": None}}]), tmp_path / "rows.parquet")
    [read] = values(tmp_path / "rows.parquet")
    assert read == json.loads(json.dumps(read))
    assert read == {
        "at": "2026-01-02 03:04:00+00:00",
        "day": "2026-01-02",
        "took": "0:01:30",
        "price": 2.5,
        "tenth": 0.1,
        "bytes": "AP8=",
        "exact": "3.141592653589793238462643",
        "facts": {"all": [2.5, 3]},
        "plain": {"n": None},
    }


def test_bytes_in_the_place_of_a_text_are_refused_by_row_and_column(tmp_path: Path) -> None:
    """Parquet of Spark may hold texts so; in base64 they would be trained on."""
    for column in ("prompt", "answer"):
        row: dict[str, Any] = {"prompt": "2 + 2?", "answer": "4"}
        pq.write_table(pa.Table.from_pylist([row | {column: row[column].encode()}]), tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=rf"row 1: column '{column}' has bytes, where text must stand"):
            values(tmp_path / "rows.parquet")


def test_a_row_that_cannot_be_read_is_handed_on_with_its_line_and_the_others_are_read(tmp_path: Path) -> None:
    content = (
        b'{"a": 1}\n\n{"a": \n[2]\n{"a": ' + b"[" * 100_000 + b'\n{"a": ' + b"9" * 5000 + b'}\n{"a": "\xff"}\n{"a": 3}'
    )
    found = list(read_rows(written(tmp_path, "rows.jsonl", content)))
    assert [
        str(one).partition("rows.jsonl, ")[2][:8] if isinstance(one, UserError) else one.values for one in found
    ] == [
        {"a": 1},
        "line 3: ",
        "line 4: ",
        "line 5: ",
        "line 6: ",
        "line 7: ",
        {"a": 3},
    ]


def test_a_row_of_a_table_with_too_few_or_many_cells_is_handed_on_with_its_first_line(tmp_path: Path) -> None:
    found = list(read_rows(written(tmp_path, "rows.csv", b'a,b\n"1\n1",2\n3\n4,5,6\n')))
    assert [str(one).partition("rows.csv, ")[2] for one in found if isinstance(one, UserError)] == [
        "line 4: 1 cells, where the first line names 2 columns",
        "line 5: 3 cells, where the first line names 2 columns",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl.gz", b"", r"none\.jsonl\.gz is empty: it has no bytes"),
        ("none.jsonl.zst", b"", r"none\.jsonl\.zst is empty: it has no bytes"),
        (
            "cut.jsonl.gz",
            gzip.compress(jsonl(ROWS))[:-9],
            r"cut\.jsonl\.gz is cut off or damaged .*copy or download it again",
        ),
        ("cut.jsonl.zst", zst(jsonl(ROWS))[:-9], r"cut\.jsonl\.zst is cut off or damaged .*copy or download it again"),
        ("no.jsonl.gz", jsonl(ROWS), r"no\.jsonl\.gz is cut off or damaged"),
        ("cut.json", b'[{"a": 1},\n{"a"', r"cut\.json, line 2: not JSON .*must be one list of objects"),
        ("one.json", b'{\n "a": 1\n}', r"one\.json is one JSON object over several lines"),
        ("latin.json", b'[{"a": "\xe9"}]', r"latin\.json: not UTF-8"),
        ("latin.csv", b"a,b\n1,\xe9\n", r"latin\.csv: not UTF-8"),
        ("open.csv", b'a,b\n1,2\n3,"4\n5,6\n', r"open\.csv, line 3: unexpected end of data"),
        ("twice.csv", b"a,a\n1,2", r"twice\.csv, line 1: each column must have a name of its own: a, a"),
        ("rows.parquet", b"PAR1 is not enough", r"rows\.parquet is not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        list(read_rows(written(tmp_path, name, content)))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 2**60], pa.timestamp("us")),
        pa.array([0, 1], pa.timestamp("us", tz="Mars/Phobos")),
        pa.Array.from_buffers(
            pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"a\xff")]
        ),
    ],
)
def test_values_of_parquet_that_python_has_not_are_refused_with_their_rows(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["x", "y"], "other": column}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet, rows 1 to 2: a value cannot be read"):
        list(read_rows(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.csv", r"\*\.csv: no file has a name of this pattern"),
        ("none.jsonl", r"none\.jsonl does not exist: give a file or a pattern"),
        ("", "is a directory: give a file or a pattern"),
        ("notes.*", r"notes\.docx: the name says nothing .* must end in one of \.jsonl"),
    ],
)
def test_what_names_no_file_is_refused(pattern: str, message: str, tmp_path: Path) -> None:
    written(tmp_path, "notes.docx", b"?")
    with pytest.raises(UserError, match=message):
        files_of(tmp_path / pattern)


def test_a_pattern_names_its_files_in_their_order_and_a_name_with_its_characters_is_a_name(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.jsonl", "below/c.jsonl", "x[1].jsonl"]
    (tmp_path / "below").mkdir()

    for name in names:
        written(tmp_path, name, b"{}\n")
    found = [str(file.relative_to(tmp_path)) for file in files_of(tmp_path / "**/[a-c].jsonl")]
    assert found == ["a.jsonl", "b.jsonl", "below/c.jsonl"]
    assert files_of(tmp_path / "x[1].jsonl") == [tmp_path / "x[1].jsonl"]
    assert stem_of(Path("data/chat.v2.jsonl.gz")) == "chat.v2"
