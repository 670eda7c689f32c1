"""The process of a reward in a file: it imports the file, says what the function takes, and scores batch after batch.

    python -m reward.own.child DESCRIPTOR

The parent sends pickles: the path of the file, its text and the name of the function; then batches of samples. The answers are JSON, a message
for each sample, so that the parent knows which one a process was at when it hung or died.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from reward.isolation.child import kernel
from reward.own import BATCHED, COLUMNS, columns_of
from reward.rows import messages_of
from reward.types import Sample, Score, Verdict

CONCURRENT = 32
"""So many calls of an `async` function for single samples are awaited at once."""
ONLY_IN_TRL = ("completion_ids", "trainer_state", "environments", "log_extra", "log_metric")
"""What TRL's trainer passes to its reward functions, and nobody has here."""
LONGEST = 500
"""Characters of a reason."""


class BadFile(Exception):  # noqa: N818
    """The file or its function cannot be used as a reward; the message says why."""


@dataclass(frozen=True)
class Loaded:
    """The function of a file. `parameters` are those that `params` may set; `columns` must be in a sample's metadata."""

    path: str
    function: Callable[..., Any]
    kind: str
    is_async: bool
    line: int
    parameters: Sequence[inspect.Parameter]
    columns: Sequence[str]
    takes_every_column: bool = False

    def described(self) -> dict[str, Any]:
        """What the parent needs to know, ready for JSON."""
        summary = (inspect.getdoc(self.function) or "").splitlines()
        return {
            "kind": self.kind,
            "is_async": self.is_async,
            "line": self.line,
            "parameters": [[p.name, repr(p.default), self._is_required(p)] for p in self.parameters],
            "columns": list(self.columns),
            "summary": summary[0] if summary else "",
        }

    def _is_required(self, parameter: inspect.Parameter) -> bool:
        return parameter.default is parameter.empty and self.kind != "trl"


def main(descriptor: int) -> None:
    """Serve the parent at the other end of a socket until it closes that, and end with the parent."""
    parent = os.getppid()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(descriptor)
    path, text, name = connection.recv()
    try:
        loaded = examine(path, function_of(path, text, name))
    except BaseException as error:
        why = str(error) if isinstance(error, BadFile) else raised(error, path)
        say(connection, {"failed": why})
        return
    say(connection, {"ready": loaded.described()})
    with asyncio.Runner() as runner:
        while os.getppid() == parent:
            try:
                samples, params, timeout_s = connection.recv()
            except EOFError:
                return
            score(loaded, samples, params, timeout_s, runner, lambda message: say(connection, message))
            say(connection, {"done": True})


def say(connection: Connection, message: Mapping[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def function_of(path: str, text: str, name: str) -> Callable[..., Any]:
    """The function `name` of a file with the text, which is run here. Raises BadFile where there is none, and whatever the file itself raises."""
    stem = Path(path).stem
    module = ModuleType(f"own_{stem}" if stem in sys.modules or stem in sys.stdlib_module_names else stem)
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    sys.path.insert(0, str(Path(path).parent))
    exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
    found: Callable[..., Any] | None = vars(module).get(name)
    if not callable(found):
        ours = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        functions = ", ".join(key for key in ours if callable(vars(module)[key])) or "none"
        raise BadFile(f"it has no function {name!r}; its functions: {functions}")
    return found


def examine(path: str, function: Callable[..., Any]) -> Loaded:
    """How a function is to be called. Raises BadFile where it cannot be a reward."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    line = code.co_firstlineno if code else 1
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    signature = list(inspect.signature(function).parameters.values())
    declared = tuple(getattr(function, COLUMNS, ()))
    if any(p.name == "completions" for p in signature):
        named = [p for p in signature if p.kind is not p.VAR_KEYWORD and p.name not in ("prompts", "completions")]
        named = [p for p in named if p.name not in ONLY_IN_TRL or p.default is p.empty]
        for p in named:
            if p.name in ONLY_IN_TRL or p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY):
                raise BadFile(f"line {line}: the parameter {p.name!r} is one that only TRL's own trainer can give")
        wanted = [p.name for p in named if p.default is p.empty]
        every = len(signature) > len(named) and signature[-1].kind is inspect.Parameter.VAR_KEYWORD
        return Loaded(path, function, "trl", is_async, line, named, (*wanted, *declared), every)
    if not signature or signature[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise BadFile(
            f"line {line}: the function must take a sample first, or `completions` as TRL's reward functions do"
        )
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in signature):
        raise BadFile(f"line {line}: the function must name its parameters, and takes * or **")
    kind = "batched" if getattr(function, BATCHED, False) else "single"
    return Loaded(path, function, kind, is_async, line, signature[1:], declared)


def score(
    loaded: Loaded,
    samples: Sequence[Sample],
    params: Mapping[str, Any],
    timeout_s: float,
    runner: asyncio.Runner,
    tell: Callable[[Mapping[str, Any]], None],
) -> None:
    """Score a batch, and tell what came of each sample by its place, or that the whole call was `broken` and why."""
    if loaded.kind != "single":
        try:
            made = together(loaded, samples, params)
            made = runner.run(made) if inspect.iscoroutine(made) else made
            values = listed(made, len(samples))
        except BaseException as error:
            bad = isinstance(error, BadFile)
            tell({"broken": f"{at(loaded)} {error}" if bad else raised(error, loaded.path)})
            return
        for place, value in enumerate(values):
            tell({"at": place, **answer(value, loaded)})
    elif loaded.is_async:
        runner.run(each_at_once(loaded, samples, params, timeout_s, tell))
    else:
        for place, sample in enumerate(samples):
            try:
                found = answer(loaded.function(sample, **params), loaded)
            except BaseException as error:
                found = {"why": raised(error, loaded.path)}
            tell({"at": place, **found})


async def each_at_once(
    loaded: Loaded,
    samples: Sequence[Sample],
    params: Mapping[str, Any],
    timeout_s: float,
    tell: Callable[[Mapping[str, Any]], None],
) -> None:
    """Await the function's calls for all samples, `CONCURRENT` of them at once, each for `timeout_s` at most."""
    places = asyncio.Semaphore(CONCURRENT)

    async def one(place: int, sample: Sample) -> None:
        async with places:
            try:
                async with asyncio.timeout(timeout_s) as clock:
                    value = await loaded.function(sample, **params)
                found = answer(value, loaded)
            except BaseException as error:
                late = isinstance(error, TimeoutError) and clock.expired()
                found = {
                    "why": f"{at(loaded)} took longer than {timeout_s:g} s" if late else raised(error, loaded.path)
                }
            tell({"at": place, **found})

    await asyncio.gather(*(one(place, sample) for place, sample in enumerate(samples)))


def together(loaded: Loaded, samples: Sequence[Sample], params: Mapping[str, Any]) -> Any:
    """What a function returns that takes a whole batch."""
    if loaded.kind == "batched":
        return loaded.function(list(samples), **params)
    rows = [columns_of(sample.metadata, sample.ground_truth) for sample in samples]
    defaults = {p.name: p.default for p in loaded.parameters}
    found = set.union(*map(set, rows))
    names = found if loaded.takes_every_column else found.intersection(defaults)
    given: dict[str, list[Any]] = {}
    for name in sorted(names):
        # What a sample lacks is what it would be if the sample were alone: the default, or None among all other columns.
        other = defaults.get(name)
        if other is not inspect.Parameter.empty or all(name in row for row in rows):
            given[name] = [row.get(name, other) for row in rows]
    taken = inspect.signature(loaded.function).parameters
    if "prompts" in taken or loaded.takes_every_column:
        given["prompts"] = [TextOrMessages(sample.prompt, messages_of(sample)) for sample in samples]
    given["completions"] = [
        TextOrMessages(sample.completion, [{"role": "assistant", "content": sample.completion}]) for sample in samples
    ]
    return loaded.function(**{**given, **params})


class _Text(str):
    """A text, and what it stands for."""

    _meaning: Any

    def __new__(cls, text: str, meaning: Any) -> Self:
        made = super().__new__(cls, text)
        made._meaning = meaning
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self._meaning)


class TextOrMessages(_Text):
    """A text that can also be read as the list of messages that it stands for: `text[0]["content"]`, `text[-1]["role"]`.

    TRL passes texts or lists of messages, by the form of its data, and a reward function reads one or the other.
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and -len(self._meaning) <= key < len(self._meaning):
            character = str(self)[key : key + 1 or None]
            return _CharacterOrMessage(character, self._meaning[key])
        return super().__getitem__(key)


class _CharacterOrMessage(_Text):
    def __getitem__(self, key: Any) -> Any:
        return self._meaning[key] if key in ("role", "content") else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of the message's dictionary."""
        return self._meaning.get(key, default)


def listed(made: Any, count: int) -> list[Any]:
    """A value for each of `count` samples. Raises BadFile where the function returned something else."""
    if made is None or isinstance(made, str | bytes | Mapping) or not hasattr(made, "__iter__"):
        raise BadFile(f"returned {shown(made)}, not a list with a value for each sample")
    values = list(made)
    if len(values) != count:
        raise BadFile(f"returned {len(values)} values for {count} samples")
    return values


def answer(value: Any, loaded: Loaded) -> dict[str, Any]:
    """What the function returned for a sample, as a message: `score`, or `why` there is none."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a scalar of NumPy or PyTorch
    if value is None:
        return {"why": f"{at(loaded)} returned None: the sample is not scored", "abstains": loaded.kind == "trl"}
    if isinstance(value, Score) and isinstance(value.verdict, Verdict):
        number, verdict, detail = value.value, value.verdict, str(value.detail)
        if verdict is Verdict.INFRA_ERROR:
            return {"why": f"{at(loaded)} returned INFRA_ERROR: {detail or 'no detail'}"[:LONGEST]}
    else:
        number, verdict, detail = value, None, ""
    if not isinstance(number, Real):
        return {"why": f"{at(loaded)} returned {shown(value)}, not a number, a Score or None"}
    if not math.isfinite(number):
        return {"why": f"{at(loaded)} returned {float(number)}, not a finite number"}
    verdict = verdict or (Verdict.PASS if number > 0 else Verdict.WRONG)
    return {"score": [float(number), str(verdict), detail]}


def at(loaded: Loaded) -> str:
    """Where the function is."""
    return f"{loaded.path}, line {loaded.line}: it"


def shown(value: Any) -> str:
    """A value in a message."""
    try:
        return f"{repr(value)[:80]} ({type(value).__name__})"
    except Exception:
        return f"a {type(value).__name__}"


def raised(error: BaseException, path: str) -> str:
    """Where in the file an exception was raised, and which."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}, line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{path}, line {lines[-1]}" if lines else path
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{where}: {type(error).__name__}{': ' if text else ''}{text}"[:LONGEST]


if __name__ == "__main__":
    main(int(sys.argv[1]))
