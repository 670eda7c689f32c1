"""Messages over a pipe: four bytes of length, then JSON."""

from __future__ import annotations

import os
from typing import Any

from . import plain

LONGEST = 8 * 2**20
"""Bytes of one message; a longer one ends the dialogue."""


def send(number: int, data: bytes) -> None:
    """Write one message. Raises BrokenPipeError where nobody reads."""
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(number, data) :]


def receive(number: int) -> Any:
    """The next message, None at the end. Raises plain.Malformed."""
    head = _read(number, 4)
    if len(head) < 4:
        return None
    length = int.from_bytes(head, "big")
    if length > LONGEST:
        raise plain.Malformed(f"a message of {length} bytes; at most {LONGEST} are read")
    body = _read(number, length)
    return plain.loads(body) if len(body) == length else None


def _read(number: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        new = os.read(number, count - len(data))
        if not new:
            break
        data += new
    return data
