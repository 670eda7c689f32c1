"""Break the code on purpose, one change after the other: the tests that `mutations.toml` names for a change must fail with it.

    python tests/mutations.py [--only WORD ...] [--jobs N] [--list]

Each change is made in a temporary copy of the tree. First all named tests must pass there without any. With a change each of its
tests must fail in its own body, and not because the code can no longer be imported or called. Exits 0 when all changes were caught.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = ROOT / "tests" / "mutations.toml"
LIMIT_S = 400
BROKEN = (SyntaxError, ImportError, NameError, AttributeError, TypeError)
"""What code raises that is no program any more: no test has caught that."""
SKIPPED = "Skipped"
CAUGHT, SKIPPED_HERE = "caught", "its tests are skipped on this machine"
HEAVY = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "pydantic",
    "pytest",
)
"""Imported once, before the processes of the tests part from this one."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """`old`, which must be in `file` exactly once, becomes `new`; each of `tests` must then fail, in one of its cases at least."""

    name: str
    file: str
    old: str
    new: str
    tests: Sequence[str]

    @property
    def mistake(self) -> str | None:
        """Why it cannot be made, where it cannot."""
        path = ROOT / self.file
        count = path.read_text().count(self.old) if path.is_file() else 0
        if count != 1:
            return f"{self.name}: its old text is {count} times in {self.file}, and must be there once"
        for test in self.tests:
            file, function = test.split("::")[0], test.split("::")[-1].partition("[")[0]
            if f"def {function}(" not in (ROOT / file).read_text():
                return f"{self.name}: there is no test {test}"
        return None if self.tests and self.new != self.old else f"{self.name}: it changes or tests nothing"


def mutations() -> list[Mutation]:
    """All entries, those of the same tests together."""
    entries = tomllib.loads(ENTRIES.read_text())["mutation"]
    return sorted((Mutation(**entry) for entry in entries), key=lambda entry: list(entry.tests))


class Witness:
    """A pytest plugin that notes, by test, in which phase it ended and with which exception ("" for none)."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, str, bool]] = {}

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.excinfo is not None:
            self.found[item.nodeid] = call.when, call.excinfo.typename, issubclass(call.excinfo.type, BROKEN)
        elif call.when == "call":
            self.found[item.nodeid] = "call", "", False

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found[report.nodeid] = "collect", str(report.longrepr).strip().splitlines()[-1], True


def run_tests(tree: Path, tests: Sequence[str], out: Path) -> dict[str, tuple[str, str, bool]]:
    """Run tests of a tree in a process of their own; what a `Witness` found, nothing where it took too long."""
    out.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import pytest

        witness = Witness()
        pytest.main(["-p", "no:cacheprovider", "-m", "", *tests], plugins=[witness])
        out.write_text(json.dumps(witness.found))
        os._exit(0)
    end = time.monotonic() + LIMIT_S
    try:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                raise TimeoutError
            time.sleep(0.1)
    except BaseException as error:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not isinstance(error, TimeoutError):
            raise
    return json.loads(out.read_text()) if out.exists() else {}


def verdict(mutation: Mutation, found: dict[str, tuple[str, str, bool]]) -> str:
    """CAUGHT where each of its tests failed as it should, else why not."""
    if not found:
        return f"no result within {LIMIT_S} s"
    if collected := [what for when, what, _ in found.values() if when == "collect"]:
        return f"the code is broken: {collected[0]}"
    for test in mutation.tests:
        cases = [result for node, result in found.items() if node == test or node.startswith(f"{test}[")]
        if cases and all(what == SKIPPED for _, what, _ in cases):
            return SKIPPED_HERE
        failed = [(when, what, broken) for when, what, broken in cases if what not in ("", SKIPPED)]
        if not failed:
            return f"SURVIVES {test}"
        if all(broken or when != "call" for when, _, broken in failed):
            return f"the code is broken: {failed[0][1]} in {failed[0][0]} of {test}"
    return CAUGHT


def work(tree: Path, part: Sequence[Mutation], results: Path) -> None:
    """Make each of some changes in a tree, one at a time, and append what came of it to `results`."""
    for mutation in part:
        started, file = time.monotonic(), tree / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
        found = run_tests(tree, mutation.tests, tree.with_suffix(".json"))
        shutil.copy2(ROOT / mutation.file, file)
        line = [mutation.name, verdict(mutation, found), time.monotonic() - started]
        with results.open("a") as opened:
            opened.write(json.dumps(line) + "\n")
        print(f"{line[2]:6.0f} s  {line[0]}: {line[1]}", flush=True)


def copy_tree(to: Path) -> Path:
    """What git knows or would take of the working tree, as it is now."""
    listed = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    subprocess.run([sys.executable, "-m", "compileall", "-q", *("align", "rollout", "reward")], cwd=to, check=True)
    return to


def in_processes(calls: Sequence[Callable[[], None]]) -> None:
    """Make all calls at once, each in a process that parts from this one, and wait for them."""
    children = []
    for call in calls:
        if (child := os.fork()) == 0:
            try:
                call()
            finally:
                os._exit(0)
        children.append(child)
    try:
        for child in children:
            os.waitpid(child, 0)
    except BaseException:
        for child in children:
            os.kill(child, signal.SIGTERM)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="changes whose name, file or tests have a word of these"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="changes that are tried at once")
    parser.add_argument("--list", action="store_true", help="only show the changes")
    options = parser.parse_args(arguments)
    chosen = [m for m in mutations() if any(word in f"{m.name} {m.file} {m.tests}" for word in options.only)]
    if options.list:
        print("\n".join(f"{m.name}  ({m.file})" for m in chosen))
        return 0
    if mistakes := list(filter(None, (m.mistake for m in chosen))):
        print("\n".join(mistakes), file=sys.stderr)
        return 2
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in HEAVY:
        __import__(name)
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        trees = [copy_tree(Path(directory) / f"tree{number}") for number in range(options.jobs)]
        tests = list(dict.fromkeys(test for m in chosen for test in m.tests))
        found = run_tests(trees[0], tests, Path(directory) / "unchanged.json")
        if not found or any(what not in ("", SKIPPED) for _, what, _ in found.values()):
            print((Path(directory) / "unchanged.log").read_text()[-6000:], file=sys.stderr)
            print("the tests do not pass without a change", file=sys.stderr)
            return 2
        print(f"{time.monotonic() - started:6.0f} s  unchanged: {len(found)} tests pass", flush=True)
        results = Path(directory) / "results.jsonl"
        parts = [chosen[number :: options.jobs] for number in range(options.jobs)]
        in_processes([partial(work, tree, part, results) for tree, part in zip(trees, parts, strict=True)])
        made = [json.loads(line) for line in results.read_text().splitlines()]
    missed = [line for line in made if line[1] not in (CAUGHT, SKIPPED_HERE)]
    print()
    for name, what, _ in missed:
        print(f"{name:72}  {what}")
    caught = sum(line[1] == CAUGHT for line in made)
    print(f"{caught} of {len(chosen)} changes caught, in {time.monotonic() - started:.0f} s")
    return int(len(made) - len(missed) < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
