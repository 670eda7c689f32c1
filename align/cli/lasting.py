"""Standard output and error for as long as somebody reads them."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

UNREAD = (errno.EPIPE, errno.EIO)
"""A pipe without a reader; a terminal that was closed."""


class Lasting:
    """A stream that ends no run when nobody reads it any more: from then on what is written to it goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, act: Callable[..., Any], *arguments: str) -> None:
        try:
            act(*arguments)
        except OSError as error:
            if error.errno not in UNREAD:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let nothing fail in the block because what it prints is read no more."""
    streams: list[Any] = [stream and Lasting(stream) for stream in (sys.stdout, sys.stderr)]  # None where it is closed
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in filter(None, streams):
                stream.flush()
