"""Plain data as JSON and back, also over a pipe: what a candidate may return, whatever it tries.

A tree is what JSON holds, with a dictionary of one tagged entry for each type that JSON lacks. Equal values have
equal trees but for the order of dictionaries, so that the parent compares trees and never builds a set or a
dictionary out of what a candidate chose (numbers with colliding hashes would make that quadratic).
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, OrderedDict, defaultdict
from typing import Any

_SMALL = 2**53
LONGEST = 8 * 2**20
"""Bytes of one message; a longer one ends the dialogue."""
_MAPPINGS = (dict, Counter, OrderedDict, defaultdict)


class NotPlain(Exception):  # noqa: N818
    """The value is not plain data; the message names its type."""


class Malformed(Exception):  # noqa: N818
    """What claims to be a tree is none."""


def encode(value: Any) -> Any:
    """The tree of a value of exact built-in types (or of Counter, OrderedDict, defaultdict: as dict; or numpy's scalars).

    Raises NotPlain for anything else, subclasses too, and RecursionError for what contains itself.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else {"int": hex(value)}
    if kind is list:
        return [encode(item) for item in value]
    if kind is tuple:
        return {"tuple": [encode(item) for item in value]}
    if kind in (set, frozenset):
        return {kind.__name__: sorted((encode(item) for item in value), key=text)}
    if kind in _MAPPINGS:
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if kind in (bytes, bytearray):
        return {kind.__name__: bytes(value).hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return encode(value.item())
    raise NotPlain(f"a value of type {kind.__name__!r} is not plain data")


def decode(tree: Any) -> Any:
    """The value of a tree. Raises Malformed."""
    if tree is None or isinstance(tree, bool | str | float | int):
        return tree
    if isinstance(tree, list):
        return [decode(item) for item in tree]
    if isinstance(tree, dict) and len(tree) == 1:
        [(tag, content)] = tree.items()
        try:
            return _decode_tagged(tag, content)
        except (TypeError, ValueError) as error:
            raise Malformed(f"{tag}: {error}") from None
    raise Malformed("not a tree of plain data")


def _decode_tagged(tag: str, content: Any) -> Any:
    match tag:
        case "int":
            return int(content, 16)
        case "iterator":
            return iter(decode(list(content)))
        case "tuple":
            return tuple(decode(list(content)))
        case "set":
            return set(decode(list(content)))
        case "frozenset":
            return frozenset(decode(list(content)))
        case "dict":
            return {decode(key): decode(item) for key, item in content}
        case "bytes":
            return bytes.fromhex(content)
        case "bytearray":
            return bytearray.fromhex(content)
        case "complex":
            real, imag = content
            return complex(real, imag)
    raise ValueError("unknown tag")


def dumps(message: Any) -> bytes:
    """One line of ASCII JSON, without the line break."""
    return text(message).encode("ascii")


def loads(data: bytes | str) -> Any:
    """The reverse of `dumps`. Raises Malformed, for too deep a nesting too."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from None


def text(message: Any) -> str:
    """As `dumps`, as text: what trees are sorted by."""
    return json.dumps(message, separators=(",", ":"))


def send(number: int, data: bytes) -> None:
    """Write one message: four bytes of length, then JSON. Raises BrokenPipeError where nobody reads."""
    write_all(number, len(data).to_bytes(4, "big") + data)


def write_all(number: int, data: bytes) -> None:
    """Write all the data to a descriptor, however much it takes at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]


def receive(number: int, longest: int = LONGEST) -> Any:
    """The next message, None at the end. Raises Malformed, for a message of more than `longest` bytes too."""
    head = _read(number, 4)
    if len(head) < 4:
        return None
    length = int.from_bytes(head, "big")
    if length > longest:
        raise Malformed(f"a message of {length} bytes; at most {longest} are read")
    body = _read(number, length)
    return loads(body) if len(body) == length else None


def _read(number: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        new = os.read(number, count - len(data))
        if not new:
            break
        data += new
    return data
