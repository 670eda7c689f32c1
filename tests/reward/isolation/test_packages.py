"""Packages that a recipe names are in the sandbox, as they are installed, and nothing else is."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reward import Mixture, RewardError, RewardTerm, Sample, Verdict
from reward.code.answer import code_tests
from reward.isolation import Limits, LocalExecutor, Program, namespace_executor, unsafe_executor, zygote

from ..corpus.code_corpus import NEEDS_ISOLATION

MAKERS = [
    pytest.param(namespace_executor, marks=NEEDS_ISOLATION, id="namespaces"),
    pytest.param(unsafe_executor, id="unsafe"),
]
LIMITS = Limits(cpu_seconds=5, wall_seconds=30, total_seconds=60)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of installed distributions: two that can be shown, one that fails, and two that share a folder."""
    site = tmp_path_factory.mktemp("site")
    for distribution, files in {
        "one-dist": {
            "one/__init__.py": "from two import two\nfrom one.part import three\n",
            "one/part.py": "three = 3\n",
        },
        "two-dist": {"two.py": "two = 2\n", "_two/__init__.py": ""},
        "broken": {"broken/__init__.py": "import missing_piece\n"},
        "busy": {
            "busy.py": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        },
        "left": {"shared/left.py": ""},
        "right": {"shared/right.py": "", "right.py": ""},
    }.items():
        info = f"{distribution.replace('-', '_')}-1.0.dist-info"
        files = {**files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"}
        files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD", "../../bin/tool"])
        for name, text in files.items():
            (site / name).parent.mkdir(exist_ok=True)
            (site / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        zygote.installed.cache_clear()
        yield site
    zygote.installed.cache_clear()


def printed(executor: LocalExecutor, source: str) -> Any:
    [case] = executor.run(Program(source, ("",)), LIMITS).cases
    executor.close()
    assert case.status == 0, case
    return json.loads(case.stdout)


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_named_can_be_imported_and_nothing_else(make: Callable[..., LocalExecutor], site: Path) -> None:
    source = """
import json
def able(name):
    try:
        return bool(__import__(name))
    except ImportError:
        return False
print(json.dumps([name for name in NAMES if able(name)]))
"""
    others = ["broken", "shared.left", "right", "numpy", "pydantic", "pytest", "pip", "reward", "align", "child"]
    source = f"NAMES = {['one', 'one.part', 'two', '_two', *others]}\n{source}"
    assert printed(make(["one", "two"]), source) == ["one", "one.part", "two", "_two"]
    assert printed(make(["two"]), source) == ["two", "_two"]
    assert printed(make(), source) == []


@NEEDS_ISOLATION
def test_it_is_where_it_is_installed_and_cannot_be_written(site: Path) -> None:
    source = f"""
import json, one, os
site = {str(site)!r}
def refused(path):
    try:
        open(path, "a").close()
    except OSError:
        return True
attempts = [site + "/new.py", one.__file__, site + "/one/new.py", site + "/two.py"]
writable = [folder for folder, _, _ in os.walk("/") if os.statvfs(folder).f_flag & os.ST_RDONLY == 0]
print(json.dumps([one.__file__, sorted(os.listdir(site)), [refused(path) for path in attempts], writable == [os.getcwd()]]))
"""
    here, shown, refused, only_the_work_folder = printed(namespace_executor(["one", "two"]), source)
    assert here == str(site / "one/__init__.py")
    assert shown == ["_two", "one", "one_dist-1.0.dist-info", "two.py", "two_dist-1.0.dist-info"]
    assert refused == [True] * 4
    assert only_the_work_folder
    assert not (site / "new.py").exists()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one", "nowhere"], r"no package 'nowhere' is installed in .*\. Name packages as an import does"),
        (["one-dist"], "no package 'one-dist' is installed"),
        (["json"], "the standard library needs no name"),
        (
            ["one"],
            r"'one' cannot be used in the sandbox: ModuleNotFoundError: No module named 'two'\. Name what it needs",
        ),
        (["broken"], "No module named 'missing_piece'"),
        (["shared"], "'shared' is a folder that left, right share"),
        (["right"], "'right' shares the folder shared with other packages"),
        (["busy"], "its import starts 1 threads"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_the_first_program(
    make: Callable[..., LocalExecutor], names: list[str], message: str, site: Path
) -> None:
    with pytest.raises(RewardError, match=message):
        make(names).zygote()


@NEEDS_ISOLATION
def test_a_mixture_refuses_it_before_the_run(site: Path) -> None:
    with pytest.raises(RewardError, match="no package 'nowhere' is installed"):
        Mixture([RewardTerm(name="code_tests", params={"packages": ["nowhere"]})]).make_ready()
    with pytest.raises(RewardError, match=r"packages must be a list of names, such as \[one\]"):
        Mixture([RewardTerm(name="code_tests", params={"packages": "one"})]).make_ready()
    with pytest.raises(RewardError, match="packages are of our own sandbox"):
        Mixture([RewardTerm(name="code_tests", params={"packages": ["one"], "executor": "x:y"})]).make_ready()


@pytest.mark.parametrize("unsafe", [pytest.param(False, marks=NEEDS_ISOLATION), True])
def test_programs_and_test_code_use_numpy_where_it_is_named(unsafe: bool) -> None:
    source = "import numpy as np\ndef total(items):\n    return np.sum(np.array(items))\n"
    code = "import numpy\nassert numpy.isclose(total([1.5, 2.5]), 4.0)\nassert total([1, 2]) == 3"
    tests = [
        {"kind": "assert", "entry_point": "total", "code": code},
        {"kind": "function", "entry_point": "total", "cases": [{"args": [[1, 2]], "expected": 3}]},
    ]
    samples = [Sample("s", "", f"```python\n{source}```", None, metadata={"tests": one}) for one in tests]
    found = code_tests(samples, packages=["numpy"], unsafe_no_isolation=unsafe)
    assert [score.verdict for score in found] == [Verdict.PASS] * 2, found
    [_, without] = code_tests(samples, unsafe_no_isolation=unsafe)
    assert "No module named 'numpy'" in without.detail
    assert "OPENBLAS_NUM_THREADS" not in os.environ
