"""The process that runs a candidate. Everything in it is the candidate's to patch, read and break.

So it knows the inputs and no expected output, and whatever it sends is data that the parent compares. The
descriptors: 0 to 2 as usual, 3 for the result, and in a dialogue 4 and 5 from and to the other process.
"""

from __future__ import annotations

import atexit
import errno
import io
import linecache
import os
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Mapping, MappingView
from itertools import islice
from typing import Any, NoReturn

from . import plain, tester

FILE = "candidate.py"
_RESULT, _IN, _OUT = 3, 4, 5
_DENIED = (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def main(job: Mapping[str, Any], inputs: Mapping[str, Any]) -> NoReturn:
    """Run the job's part on one case's inputs, say what came of it on descriptor 3, and exit."""
    _open_streams()
    sys.argv, sys.path = [FILE], [path for path in sys.path if path]
    role = job["role"]
    if role == "program":
        _program(job)
    elif role == "function":
        _function(job, inputs)
    elif role == "server":
        _server(job)
    _say(job, tester.run(job, calls=_OUT, replies=_IN))
    _exit(0)


def _program(job: Mapping[str, Any]) -> NoReturn:
    """As `python candidate.py` would, exit status included."""
    try:
        _execute(job["source"], "__main__")
        threading._shutdown()  # type: ignore[attr-defined]
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        _exit(0 if stop.code is None else stop.code & 0xFF if isinstance(stop.code, int) else 1)
    except BaseException as error:
        _fail(job, described(error, "run"))
    _exit(0)


def _function(job: Mapping[str, Any], inputs: Mapping[str, Any]) -> NoReturn:
    """Send the plain data that one call returns."""
    function = _load(job)
    args, kwargs = plain.decode(inputs["args"]), plain.decode(inputs["kwargs"])
    try:
        value = function(*args, **kwargs)
    except BaseException as error:
        _fail(job, described(error, "call"))
    try:
        _say(job, {"value": plain.encode(value)})
    except BaseException as error:
        _fail(job, described(error, "result"))
    _exit(0)


def _server(job: Mapping[str, Any]) -> NoReturn:
    """Answer the tester's calls until it closes the pipe."""
    function = _load(job)
    while (call := plain.receive(_IN)) is not None:
        args, kwargs = plain.decode(call["args"]), plain.decode(call["kwargs"])
        stage = "call"
        try:
            value = function(*args, **kwargs)
            lazy = isinstance(value, Iterator | MappingView | range)
            value = list(islice(value, plain.LONGEST // 2)) if lazy else value
            stage = "result"
            tree = plain.encode(value)
            left = _left([*args, *kwargs.values()]) if value is None else []
            reply = plain.dumps({"value": {"iterator": tree} if lazy else tree, "left": left})
        except BaseException as error:
            reply = plain.dumps({"error": described(error, stage)})
        if len(reply) > plain.LONGEST:
            reply = plain.dumps({"error": {"stage": "size"}})
        plain.send(_OUT, reply)
    _exit(0)


def _left(args: list[Any]) -> Any:
    """The arguments as a call left them; none where it put in what is no plain data."""
    try:
        return plain.encode(args)
    except (plain.NotPlain, RecursionError):
        return []


def _load(job: Mapping[str, Any]) -> Any:
    """The entry point; exits with an error where the source does not run or does not define it."""
    try:
        module = _execute(job["source"], "candidate")
    except BaseException as error:
        _fail(job, described(error, "load"))
    function = module.__dict__.get(job["entry_point"])
    if not callable(function):
        _fail(job, {"stage": "missing", "type": "", "message": "", "line": None})
    return function


def _execute(source: str, name: str) -> types.ModuleType:
    code = compile(source, FILE, "exec", dont_inherit=True)
    module = types.ModuleType(name)
    module.__dict__.update(__file__=FILE, __builtins__=__builtins__)
    sys.modules[name] = module
    linecache.cache[FILE] = (len(source), None, source.splitlines(True), FILE)
    exec(code, module.__dict__)
    return module


def described(error: BaseException, stage: str) -> dict[str, Any]:
    """An exception as data: where it came up, its class, its message, its line in the candidate."""
    try:
        message = str(error)[:300]
    except BaseException:
        message = ""
    line = None
    if isinstance(error, SyntaxError):
        line = error.lineno
        message = str(error.msg)[:300]
    else:
        for frame, number in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == FILE:
                line = number
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    return {
        "stage": stage,
        "type": type(error).__name__[:100],
        "builtin": names[0],
        "message": message,
        "line": line,
        "memory": isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM),
        "denied": isinstance(error, OSError) and error.errno in _DENIED,
    }


def _fail(job: Mapping[str, Any], error: Mapping[str, Any]) -> NoReturn:
    _say(job, {"error": error})
    _exit(1)


def _say(job: Mapping[str, Any], message: Mapping[str, Any]) -> None:
    plain.write_all(_RESULT, plain.dumps({"nonce": job["nonce"], **message}))


def _open_streams() -> None:
    sys.stdin = _text_stream(0, "r")
    sys.stdout = sys.__stdout__ = _text_stream(1, "w")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text_stream(2, "w")  # type: ignore[misc]


def _text_stream(number: int, mode: str) -> io.TextIOWrapper:
    stream = open(number, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    assert isinstance(stream, io.TextIOWrapper)
    return stream


def _exit(status: int) -> NoReturn:
    """End as Python would, but without a way to leave a frame of ours behind."""
    try:
        atexit._run_exitfuncs()
        # A candidate that put another stream in place of ours may have written to ours at its end.
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
    except BaseException:
        status = status or 120
    os._exit(status)
