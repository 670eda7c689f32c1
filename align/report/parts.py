"""What a report is made of: cells, tables and sections; and numbers as it writes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from align.run.progress import compact

Tone = Literal["", "good", "bad"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A text with a note behind it, which is good or bad news or neither.

    `kind` are CSS classes of the page, `bar` the segments (class, start, width in percent) of a bar over the text.
    """

    text: str
    kind: str = ""
    note: str = ""
    tone: Tone = ""
    bar: Sequence[tuple[str, float, float]] = ()

    def __str__(self) -> str:
        return self.text


# What stands in a table: None for a value that is not known.
Value = Cell | str | int | None


@dataclass(frozen=True, slots=True)
class Table:
    """`heads` [N], of which those in `numbers` are numeric, over `rows` [M][N]; `note` and `url` stand below.

    A row of one value is a heading of those that follow it.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Value]]
    title: str = ""
    note: str = ""
    url: str = ""
    kind: str = ""
    numbers: range = range(0)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report; `only` names the one medium that has it, if not both."""

    key: str
    title: str
    note: str = ""
    tables: Sequence[Table] = ()
    only: Literal["", "page", "markdown"] = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The whole report. `tiles` are the key figures with their labels; `curves` and `samples` are the script's data.

    `live` says how the run is, in a page that follows it; such a page has of the samples only which there are. Else it is empty.
    """

    name: str
    path: str
    live: str
    tiles: Sequence[tuple[Value, str]]
    sections: Sequence[Section]
    curves: Sequence[Mapping[str, Any]]
    samples: Mapping[str, Any]


def percent(value: float | None) -> str:
    """A share of 1 in percent; a dash for None and what is not finite."""
    return f"{value:.1%}" if value is not None and isfinite(value) else "–"


def plain(value: float | None) -> str:
    """Any other number in a few digits; a dash for None and what is not finite."""
    return compact(value) if value is not None and isfinite(value) else "–"


def signed(value: float, form: str) -> str:
    """A difference with its sign, a true minus; zero has none."""
    text = f"{abs(value):{form}}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return signed(100 * value, ".1f")
