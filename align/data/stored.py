"""Rows that stay on the disk: read again by their number when they are needed, so that data may be larger than memory."""

import codecs
import os
import pickle
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from align.data.rows import Row
from align.errors import UserError
from align.run.files import parse_json_line

OPEN_FILES = 64
NUMBERS = 5
"""What is remembered of a row: its file, its number there, the first byte and the length of what it is read from, and its line."""


class StoredRows:
    """Rows of files by their place, of which only some numbers are in memory.

    Lines of JSON are read where they are. What cannot be read in parts (Parquet, CSV, JSON arrays, compressed files) is unpacked into a temporary
    file without a name, which ends with this object. All reads are by position, so that processes and threads may share it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._stamps: dict[int, tuple[int, int]] = {}
        self._opened: dict[int, BinaryIO] = {}
        self._unpacked: BinaryIO | None = None
        self._numbers = array("q")

    def __len__(self) -> int:
        return len(self._numbers) // NUMBERS

    def append(self, row: Row, file: int, number: int) -> None:
        """Add a row, the `number`th of a file. Raises UserError where the disk has no room to unpack it."""
        if row.line and file not in self._stamps:
            self._stamps[file] = stamp(self._paths[file])
        start, length, line = row.line or (*self._unpack(row), 0)
        self._numbers.extend((file, number, start, length, line))

    def __getitem__(self, place: int) -> Row:
        """The row at a place, as it was appended. Raises UserError where its file has changed since, or is gone."""
        file, _, start, length, line = self._numbers[place * NUMBERS : (place + 1) * NUMBERS]
        if not line:
            assert self._unpacked is not None
            self._unpacked.flush()
            values, where = pickle.loads(os.pread(self._unpacked.fileno(), length, start))
            return Row(values, where)
        path = self._paths[file]
        where = f"{path}, line {line}"
        try:
            content, now = os.pread(self._open(file).fileno(), length, start), stamp(path)
        except OSError as error:
            raise UserError(
                f"{where} cannot be read any more: {error.strerror}. Put the file back as it was, and start again"
            ) from None
        if now != self._stamps[file]:
            raise UserError(
                f"{path} has changed since the run began to read it: put it back as it was, and start again"
            )
        return Row(parse_json_line(content.removeprefix(codecs.BOM_UTF8), where), where)

    def number(self, place: int) -> tuple[int, int]:
        """Which file a row is in, counted from 0, and its number there, counted from 1."""
        return self._numbers[place * NUMBERS], self._numbers[place * NUMBERS + 1]

    def _open(self, file: int) -> BinaryIO:
        if file not in self._opened:
            if len(self._opened) == OPEN_FILES:
                self._opened.pop(next(iter(self._opened))).close()
            self._opened[file] = self._paths[file].open("rb")
        return self._opened[file]

    def _unpack(self, row: Row) -> tuple[int, int]:
        if self._unpacked is None:
            self._unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the object)
        content, start = pickle.dumps((row.values, row.where)), self._unpacked.tell()
        try:
            self._unpacked.write(content)
        except OSError as error:
            raise UserError(
                f"{row.where} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}. Set TMPDIR to a directory with more room"
            ) from None
        return start, len(content)


def stamp(path: Path) -> tuple[int, int]:
    """What tells a file from what it was before."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
