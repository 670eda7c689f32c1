"""The trainer's side of a reward in a file: what its function takes, and its scores from a process that can be killed.

The function runs in a process of its own, with the environment and the rights of the user whose function it is. A sample on which it
raises, hangs, ends the process or returns what is no score is INFRA_ERROR with the reason; the other samples of its batch keep their scores.
The text of the file is read once and travels with the reward, so that no later change of the file reaches a run that is under way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from modulefinder import ModuleFinder
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from reward.own import columns_of
from reward.registry import Parameter, Reward
from reward.rows import PROMPTS
from reward.types import Abstention, RewardError, Sample, Score, Verdict

NAME = re.compile(r"(?P<file>.+\.py):(?P<function>[^\W\d]\w*)")
_NAMESPACE = object()
TIMEOUT_S = 30.0
"""How long a call may take where the recipe does not say."""
IMPORT_S = 120.0
GRACE_S = 2.0
MOST_LOST, SCORED_FOR_A_LOSS = 4, 16
"""So many hanging or dying calls of a batch are waited for, and one more for so many samples with a score; what is left then is not tried."""


def split(name: str) -> tuple[Path, str] | None:
    """The file and the function that a reward's name gives, as in "my_rewards.py:says_unit"; None for another name."""
    found = NAME.fullmatch(name)
    return (Path(found["file"]).expanduser(), found["function"]) if found else None


class _Finder(ModuleFinder):
    """Goes through directories without `__init__.py` too, whose specs have no loader."""

    def find_module(self, name: str, path: Any, parent: Any = None) -> Any:
        try:
            return super().find_module(name, path, parent)
        except AttributeError:
            places = (Path(place) / name for place in path or self.path)
            return None, str(next(place for place in places if place.is_dir())), ("", "", _NAMESPACE)

    def load_module(self, fqname: str, fp: Any, pathname: str, file_info: Any) -> Any:
        if file_info[2] is not _NAMESPACE:
            return super().load_module(fqname, fp, pathname, file_info)
        module: Any = self.add_module(fqname)
        module.__path__ = [pathname]
        return module


def files_of(path: Path) -> list[Path]:
    """A reward file and the modules beside it that it imports, directly or by way of one another. Nothing of them is run.

    What cannot be parsed imports nothing; modules of this project are left out.
    """
    finder = _Finder(path=[str(path.parent)], excludes=["align", "reward", "rollout"])
    with suppress(SyntaxError, ValueError):
        finder.run_script(str(path))
    found = {Path(file) for module in finder.modules.values() if (file := getattr(module, "__file__", None))}
    return [path, *sorted(found - {path})]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reward_of(path: Path, function: str, timeout_s: float | None = None) -> Reward:
    """The reward that is `function` in a file; a call of it may take `timeout_s` seconds, 30 when None.

    The file is imported in a process of its own. Raises RewardError, with the file, where that fails or the function cannot be a reward.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RewardError(f"the reward file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"the reward file {path} cannot be read: {error}") from None
    taken = described(str(path.absolute()), text, function)
    return Reward(
        name=function,
        function=OwnReward(str(path.absolute()), text, function, taken, timeout_s or TIMEOUT_S),
        description=taken["summary"],
        parameters=tuple(Parameter(name, default, required) for name, default, required in taken["parameters"]),
        batched=True,
        columns=tuple(taken["columns"]),
    )


@lru_cache(maxsize=32)
def described(path: str, text: str, function: str) -> Mapping[str, Any]:
    """What `child.Loaded.described` says of a function. Raises RewardError."""
    process = Process(path, text, function)
    process.close()
    return process.description


class OwnReward:
    """The function of a reward in a file, batched: it starts the process when it is first called. Can be pickled."""

    def __init__(self, path: str, text: str, function: str, description: Mapping[str, Any], timeout_s: float) -> None:
        self._file = path, text, function
        self._description, self._timeout_s = description, timeout_s
        self._process: Process | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnReward, (*self._file, self._description, self._timeout_s)

    def __call__(self, samples: Sequence[Sample], **params: Any) -> list[Score]:
        """A score for each sample. Raises RewardError where the file cannot be imported here."""
        if not samples:
            self._running()
        wanted = [name for name in self._description["columns"] if name not in params]
        batch = _Batch(self, samples, params)
        for place, sample in enumerate(samples):
            there = columns_of(sample.metadata, sample.ground_truth)
            if lacking := [name for name in wanted if name not in there]:
                batch.mask(place, f"{self._where} it wants {told_lack(lacking, there)}")
        if self._description["kind"] == "single" and not self._description["is_async"]:
            batch.score_in_order()
        else:
            batch.score_together()
        return batch.scores()

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a sample's score may depend on the others of its batch."""
        return self._description["kind"] != "single"

    @property
    def _where(self) -> str:
        return f"{self._file[0]}, line {self._description['line']}:"

    def ask(self, samples: Sequence[Sample], params: Mapping[str, Any]) -> tuple[dict[int, Score], str | None, bool]:
        """The scores of samples by place, why not all of them have one (None: they have), and whether the process was lost."""
        process = self._running()
        patience = self._timeout_s + (GRACE_S if self._description["is_async"] else 0.0)
        found: dict[int, Score] = {}
        try:
            process.send((list(samples), dict(params), self._timeout_s))
            while True:
                message = process.receive(patience)
                if message is None:
                    why = f"{self._where} it took longer than {self._timeout_s:g} s"
                    break
                if "done" in message:
                    return found, None, False
                if "broken" in message:
                    process.receive(patience)
                    return found, message["broken"], False
                found[message["at"]] = _score(message)
        except (EOFError, OSError):
            why = f"{self._where} its process ended with {process.ended()}"
        process.close()
        self._process = None
        return found, why, True

    def _running(self) -> Process:
        if self._process is None or not self._process.is_alive():
            self._process = Process(*self._file)
        return self._process


class _Batch:
    """The samples of a call, with the scores found so far by place."""

    def __init__(self, reward: OwnReward, samples: Sequence[Sample], params: Mapping[str, Any]) -> None:
        self._reward, self._samples, self._params = reward, samples, params
        self._found: dict[int, Score] = {}
        self._lost = self._scored = 0

    def mask(self, place: int, why: str) -> None:
        """Note that a sample cannot be scored."""
        self._found[place] = Score(math.nan, Verdict.INFRA_ERROR, why)

    def scores(self) -> list[Score]:
        return [self._found[place] for place in range(len(self._samples))]

    def score_in_order(self) -> None:
        """One sample after the other: the first without an answer is the one that the process was at."""
        while left := self._left():
            if why := self._ask(left):
                self.mask(self._left()[0], why)

    def score_together(self) -> None:
        """All samples in one call. Where that fails, those that fail alone are masked, and the others are scored together."""
        while left := self._left():
            why = self._ask(left)
            left = self._left()
            if why is None or not left:
                continue
            if len(left) == 1:
                self.mask(left[0], why)
                continue
            alone: dict[int, Score] = {}
            for place in left:
                if (failed := self._ask([place])) is not None:
                    self.mask(place, failed)
                elif self._reward.needs_whole_batch and self._found[place].verdict is not Verdict.INFRA_ERROR:
                    alone[place] = self._found.pop(place)
            if len(alone) == len(left):
                for place in left:
                    self.mask(place, f"{why} (on {len(left)} samples together, on none of them alone)")

    def _left(self) -> list[int]:
        return [place for place in range(len(self._samples)) if place not in self._found]

    def _ask(self, places: Sequence[int]) -> str | None:
        """Have samples scored. Returns why one of them was not."""
        if self._lost >= MOST_LOST + self._scored // SCORED_FOR_A_LOSS:
            for place in places:
                self.mask(
                    place, f"not tried, since {self._lost} calls before it in the same batch hung or ended the process"
                )
            return None
        found, why, was_lost = self._reward.ask([self._samples[place] for place in places], self._params)
        self._lost += was_lost
        self._scored += len(found)
        self._found.update({places[at]: score for at, score in found.items()})
        return why


def told_lack(lacking: Sequence[str], there: Mapping[str, Any]) -> str:
    """Which columns are missing, and which there are, in a message."""
    what = "the column" if len(lacking) == 1 else "the columns"
    return f"{what} {', '.join(map(repr, lacking))}, which the data lack; they have {', '.join(sorted(there)) or 'none'}{prompt_hint(lacking)}"


def prompt_hint(columns: Sequence[str]) -> str:
    """What a message adds where a reward wants a column by a name that the prompt has, which is not among the others."""
    asked = [name for name in columns if name in PROMPTS]
    return (
        f". Is {asked[0]!r} the prompt? Read it from `sample.prompt`, or in a function for TRL from `prompts`"
        if asked
        else ""
    )


def _score(message: Mapping[str, Any]) -> Score:
    if "why" in message:
        kind = Abstention if message.get("abstains") else Score
        return kind(math.nan, Verdict.INFRA_ERROR, str(message["why"]))
    value, verdict, detail = message["score"]
    return Score(float(value), Verdict(verdict), str(detail))


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    """Kill a process and what it started, and close our end of its socket."""
    connection.close()
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Process:
    """A process that has imported a file. Raises RewardError, with the file, where it cannot."""

    def __init__(self, path: str, text: str, function: str) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "reward.own.child", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what the function prints is no output of ours
            env=os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.close = weakref.finalize(self, _end, self._process, self._connection)
        try:
            self.send((path, text, function))
            message = self.receive(IMPORT_S)
        except (EOFError, OSError):
            message = {"failed": f"the process that imported it ended with {self.ended()}"}
        if message is None:
            message = {"failed": f"its import took longer than {IMPORT_S:g} s"}
        if "failed" in message:
            self.close()
            raise RewardError(f"the reward {Path(path).name}:{function} cannot be used: {path}: {message['failed']}")
        self.description: Mapping[str, Any] = message["ready"]

    def send(self, message: Any) -> None:
        self._connection.send(message)

    def receive(self, seconds: float) -> Mapping[str, Any] | None:
        """The next message; None where none has come after so many seconds. Raises EOFError where the process is gone."""
        if not self._connection.poll(seconds):
            return None
        message: Mapping[str, Any] = json.loads(self._connection.recv_bytes())
        return message

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ended(self) -> str:
        """How the process ended, in words."""
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return "its socket closed"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
