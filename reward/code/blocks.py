"""Which part of an answer is its program."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_OPENING = re.compile(r"(?P<before>.*?)(?P<fence>(?<!`)`{3,}+|(?<!~)~{3,}+)[ \t]*+(?P<info>[^`]*+)")
_MARKERS = re.compile(r"[ \t]*(?:(?:[-*+]|[0-9]+[.)])[ \t]+)*")
_LANGUAGE = re.compile(r"[{.\s]*([\w.+#-]*)")
_PYTHON = re.compile(r"i?py(?:thon|py)?[0-9.]*", re.IGNORECASE)
_THOUGHT_OPENS = re.compile(r"\s*<think(?:ing)?>")
_THOUGHT_ENDS = re.compile(r".*?</think(?:ing)?>")
_STRING_OR_COMMENT = re.compile(
    r"""(?P<mark>"{3}|'{3})(?:\\.|[^\\])*?(?:(?P=mark)|(?P<open>\Z))|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*""",
    re.DOTALL,
)
_SESSION = re.compile(r"\s*(?:>>>|In \[)")
_PROGRAM = re.compile(
    r"^[ \t]*(?:import\s|from\s.*\simport\s|(?:def|class|for|while)\s.*:)|\b(?:print|write|input|exec)\s*\(",
    re.MULTILINE,
)


@dataclass(frozen=True)
class _Fence:
    """The line that opens a block."""

    mark: str
    indent: int
    language: str

    @property
    def python(self) -> bool:
        return bool(_PYTHON.fullmatch(self.language))


def program(answer: str, entry_point: str | None = None) -> str | None:
    """The program among the blocks that an answer has between fences of backticks or tildes; None if there is none.

    It is the last block of Python that defines `entry_point`, or, where that is None, that prints or reads anything;
    else the last such block without a language; else the last block of Python, or without a language. So an example
    behind the program is none. Interactive sessions are not programs, and thoughts (`<think>`) hold none. A last block
    without an end goes to the end of the answer. What all lines of a block are indented by, as in a list, is taken off.
    """
    blocks = [(fence, source) for fence, source in _blocks(answer) if not _SESSION.match(source)]
    wanted = _defines(entry_point) if entry_point is not None else _PROGRAM
    for sought in (wanted, re.compile("")):
        for python in (True, False):
            for fence, source in reversed(blocks):
                if fence.python is python and sought.search(source):
                    return source
    return None


def _defines(name: str) -> re.Pattern[str]:
    word = re.escape(name)
    return re.compile(rf"\b(?:def|class)\s+{word}\b|^[ \t]*{word}[ \t]*(?::[^=\n]*)?=(?!=)", re.MULTILINE)


def _blocks(answer: str) -> list[tuple[_Fence, str]]:
    """The blocks of Python and of no language, in order, thoughts left out."""
    text = answer.replace("\r\n", "\n")
    lines = text.split("\n")
    offsets = list(accumulate((len(line) + 1 for line in lines), initial=0))
    found: list[tuple[_Fence, str]] = []
    number = 0
    while number < len(lines):
        if _THOUGHT_OPENS.match(lines[number]):
            while number < len(lines) and not _THOUGHT_ENDS.match(lines[number]):
                number += 1
            if number == len(lines):
                break
        line = lines[number]
        while thought := _THOUGHT_ENDS.match(line):
            found.clear()
            line = line[thought.end() :]
        number += 1
        if (fence := _opened(line)) is None:
            continue
        start = number
        number, end = _end(lines, offsets, start, fence, _Strings(text, offsets[start]))
        if fence.python or not fence.language:
            found.append((fence, textwrap.dedent(text[offsets[start] : end]).rstrip() + "\n"))
    return found


def _opened(line: str) -> _Fence | None:
    match = _OPENING.fullmatch(line)
    if match is None:
        return None
    language = _LANGUAGE.match(match["info"])
    assert language is not None  # it matches nothing too
    fence = _Fence(match["fence"], len(match["before"].expandtabs(4)), language[1])
    if _MARKERS.fullmatch(match["before"]):
        return fence
    # Behind other text the name of the language must end the line, or else it is code in a sentence.
    return fence if fence.python and language[0] == match["info"].rstrip() else None


def _closed(line: str, fence: _Fence) -> str | None:
    """What stands before the closing fence on its line; None where the line holds none."""
    mark = fence.mark[0]
    match = re.fullmatch(rf"([^{mark}]*){mark}{{{len(fence.mark)},}}\s*", line)
    if match is None or (match[1].isspace() and len(match[1].expandtabs(4)) > fence.indent + 3):
        return None
    return match[1]


def _end(lines: Sequence[str], offsets: Sequence[int], start: int, fence: _Fence, strings: _Strings) -> tuple[int, int]:
    """The number of the line behind the block that `fence` opens before line `start`, and the block's end in the text.

    What could end it ends it, unless that stands in a string of the program, which then goes on to a later end.
    """
    first = None
    for number in range(start, len(lines)):
        line = lines[number]
        inner, rest = _opened(line), _closed(line, fence)
        if line.startswith("</think"):
            return first or (number, offsets[number])
        if inner is not None and inner.python:
            end = number, offsets[number]
        elif rest is not None:
            end = number + 1, offsets[number] + len(rest)
        else:
            continue
        if not strings.cover(end[1]):
            return end
        first = first or end
    return first or (len(lines), offsets[-1])


class _Strings:
    """Which places of a program are within a string of several lines; they are asked for from left to right."""

    def __init__(self, text: str, start: int) -> None:
        self.text, self.seen, self.end = text, start, start

    def cover(self, place: int) -> bool:
        if place < self.end:
            return True
        for token in _STRING_OR_COMMENT.finditer(self.text, max(self.seen, self.end), place):
            if token["open"] is not None:
                whole = _STRING_OR_COMMENT.match(self.text, token.start())
                self.end = whole.end() if whole else place
                return place < self.end
        self.seen = place
        return False
