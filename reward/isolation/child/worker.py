"""A worker: a process that answers requests by a trusted job, such as algebra on what a model wrote, until it is killed.

A job is a file with `warm() -> None` and `work(request, enter) -> dict`; `enter(name)` tells the parent which phase begins,
so that it knows whose fault an overrun is. The zygote loads and warms the job once, and never sees a request: a worker is
forked warm and clean in milliseconds, however badly the last one ended.
"""

from __future__ import annotations

import importlib.util
import os
import resource
from types import ModuleType
from typing import Any

from . import confine, plain

_CONNECTION = 3


def load(path: str) -> ModuleType:
    """The job in the file, warm. Raises whatever it raises."""
    spec = importlib.util.spec_from_file_location("job", path)
    assert spec is not None
    assert spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    job.warm()
    return job


def serve(job: ModuleType, connection: int, memory_bytes: int) -> None:
    """Answer the requests of the socket `connection` until it closes; from now on without files, processes or a core dump.

    The process may grow by `memory_bytes`, and calls itself worn when it has grown by half of that.
    """
    confine.keep_descriptors([0, 1, 1, connection])
    os.setsid()
    most = _virtual_bytes() + memory_bytes
    for name, limit in (("CORE", 0), ("FSIZE", 0), ("NPROC", 0), ("AS", most)):
        confine.limit(name, limit, limit)
    plain.send(_CONNECTION, plain.dumps({"pid": os.getpid()}))
    while (order := plain.receive(_CONNECTION)) is not None:
        _send(order, _answer(job, order) | {"worn": _virtual_bytes() > most - memory_bytes // 2})


def _answer(job: ModuleType, order: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"reply": job.work(order["request"], lambda phase: _send(order, {"phase": phase}))}
    except MemoryError:
        return {"memory": True}
    except Exception as error:  # only its type: the text of an expression can take for ever to write
        return {"raised": type(error).__name__}


def _send(order: dict[str, Any], message: dict[str, Any]) -> None:
    plain.send(_CONNECTION, plain.dumps({"id": order["id"], **message}))


def _virtual_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
