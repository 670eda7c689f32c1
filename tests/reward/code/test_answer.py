"""The code reward: what passes, what each failure is called, and what is nobody's fault."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from reward import Mixture, RewardError, RewardTerm, Sample, Score, Verdict
from reward.code.answer import code_tests
from reward.isolation import Execution, Job, Limits, SandboxFailure, zygote

from ..corpus.code_corpus import ASSERTS, CALLS, NEEDS_ISOLATION, REFUSING, TASKS

GOOD = "def double(n):\n    return 2 * n\n"


FORGER = """
import os
def f(xs):
    reply = b'{"value": [], "left": [[]]}'
    os.write(5, len(reply).to_bytes(4, "big") + reply)
"""
"""It says in our place that it returned a value and emptied its argument."""


def sample(source: str, tests: Any, fence: str = "```python") -> Sample:
    return Sample("s", "", f"Here it is.\n{fence}\n{source}\n```\nDone.", None, "code", metadata={"tests": tests})


def score(source: str, tests: Any, **params: Any) -> Score:
    [found] = code_tests([sample(source, tests)], **params)
    return found


@NEEDS_ISOLATION
class TestVerdicts:
    @pytest.mark.parametrize("task", ["function", "assert", "check"])
    def test_a_right_function_passes(self, task: str) -> None:
        assert score(GOOD, TASKS[task]).verdict is Verdict.PASS

    def test_a_right_program_passes_whatever_white_space_ends_its_lines(self) -> None:
        tests = {"kind": "stdio", "cases": [{"input": "3", "output": "1 2\n3\n"}]}
        assert score("print('1 2 ')\nprint(input() + '\\n\\n')", tests).verdict is Verdict.PASS
        assert score("print('1  2')\nprint(input())", tests).verdict is Verdict.WRONG
        assert score("print('1  2')\nprint(input())", tests, any_whitespace=True).verdict is Verdict.PASS

    def test_printed_and_returned_numbers_may_differ_by_the_tolerance_which_may_be_text_as_yaml_reads_it(self) -> None:
        printed = {"kind": "stdio", "cases": [{"input": "", "output": "0.333333333333\n"}]}
        returned = {"kind": "function", "entry_point": "f", "cases": [{"args": [], "expected": 0.333333333333}]}
        for tolerance, verdict in ((1e-6, Verdict.WRONG), ("1e-3", Verdict.PASS)):
            assert score("print(0.3333)", printed, float_tolerance=tolerance).verdict is verdict
            assert score("def f(): return 0.3333", returned, float_tolerance=tolerance).verdict is verdict
        assert score("print(0.333333)", printed).verdict is Verdict.PASS
        for wrong in ("little", -1, None, math.nan):
            with pytest.raises(RewardError, match="float_tolerance must be a number from 0 on"):
                score("print(0.3333)", printed, float_tolerance=wrong)

    def test_integers_have_as_many_digits_as_they_have(self) -> None:
        printed = {"kind": "stdio", "cases": [{"input": "7" * 5000, "output": "7" * 4999 + "8\n"}]}
        assert score("print(int(input()) + 1)", printed).verdict is Verdict.PASS
        assert score("print(int(input()))", printed).verdict is Verdict.WRONG
        returned = {
            "kind": "function",
            "entry_point": "double",
            "cases": [{"args": [10**5000], "expected": 2 * 10**5000}],
        }
        assert score(GOOD, returned).verdict is Verdict.PASS
        assert score("def double(n): return n", returned).verdict is Verdict.WRONG
        asserts = {"kind": "assert", "entry_point": "double", "code": f"assert double({'7' * 5000}) == {'15' * 2500}"}
        assert score(GOOD, asserts).verdict is Verdict.WRONG

    def test_a_program_may_raise_the_limit_of_its_stack(self) -> None:
        source = "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (2**28, -1))\nprint(2 * int(input()))"
        assert score(source, TASKS["stdio"]).verdict is Verdict.PASS

    def test_tests_may_be_given_as_json_text(self) -> None:
        assert score(GOOD, json.dumps(TASKS["function"])).verdict is Verdict.PASS

    @pytest.mark.parametrize(
        ("source", "verdict", "detail"),
        [
            ("def double(n):\n    return n", Verdict.WRONG, "case 1: returned 2 instead of 4"),
            ("def double(n):\n    return 4", Verdict.WRONG, "1 of 2 cases passed; case 2: returned 4 instead of 42"),
            ("def double(n)\n    return n", Verdict.CRASH, "syntax error: SyntaxError: expected ':', line 1"),
            ("import torch", Verdict.CRASH, "import error: ModuleNotFoundError: No module named 'torch', line 1"),
            (
                "def double(n):\n    return 1 / 0",
                Verdict.CRASH,
                "runtime error: ZeroDivisionError: division by zero, line 2",
            ),
            ("def triple(n):\n    return 3 * n", Verdict.NO_ANSWER, "defines no function 'double'"),
            ("def double(n):\n    return object()", Verdict.WRONG, "no plain data: a value of type 'object'"),
            ("def double(n):\n    return [0] * 10**10", Verdict.MEMORY, "out of memory, line 2"),
            ("def double(n):\n    open('/x', 'w')", Verdict.DENIED, "forbidden in the sandbox: OSError"),
        ],
    )
    def test_the_detail_says_what_was_wrong(self, source: str, verdict: Verdict, detail: str) -> None:
        found = score(source, TASKS["function"])
        assert (found.value, found.verdict) == (0.0, verdict)
        assert detail in found.detail

    def test_the_detail_names_the_assertion_that_failed(self) -> None:
        found = score("def double(n):\n    return 4", TASKS["assert"])
        assert found.verdict is Verdict.WRONG
        assert "case 2: AssertionError, at assert double(21) == 42" in found.detail
        assert "line 2, at check(candidate)" in score("def double(n):\n    return n['x']", TASKS["check"]).detail

    def test_an_exit_status_is_part_of_the_answer_of_a_program_but_never_all_of_it(self) -> None:
        assert score("print(2 * int(input()))\nraise SystemExit(0)", TASKS["stdio"]).verdict is Verdict.PASS
        assert score("raise SystemExit(0)", TASKS["stdio"]).verdict is Verdict.WRONG
        found = score("print(2 * int(input()))\nraise SystemExit(3)", TASKS["stdio"])
        assert (found.verdict, found.detail) == (Verdict.CRASH, "0 of 2 cases passed; case 1: exit status 3")

    def test_what_a_program_writes_at_its_end_to_the_stream_that_it_replaced_counts(self) -> None:
        replaced = "import atexit, io, sys\nold, sys.stdout = sys.stdout, io.StringIO()\nprint(2 * int(input()))\n"
        for stream in ("sys.__stdout__", "old"):
            for end in (
                f"{stream}.write(sys.stdout.getvalue())",
                f"atexit.register({stream}.write, sys.stdout.getvalue())",
            ):
                assert score(replaced + end, TASKS["stdio"]).verdict is Verdict.PASS, (stream, end)

    def test_partial_credit_is_the_share_of_cases(self) -> None:
        half = "def double(n):\n    return 4"
        assert score(half, TASKS["function"], partial=True).value == 0.5
        assert score(half, TASKS["assert"], partial=True).value == 0.5
        assert score(half, TASKS["function"], partial=True, right=2.0, wrong=-1.0).value == 0.5
        assert score(half, TASKS["function"], right=2.0, wrong=-1.0).value == -1.0
        assert score(GOOD, TASKS["function"], right=2.0, wrong=-1.0).value == 2.0

    def test_a_case_that_is_killed_costs_the_others_only_where_there_is_no_partial_credit(self) -> None:
        source = "def double(n):\n    while n == 2: pass\n    return 2 * n"
        found = score(source, TASKS["function"], seconds=1, partial=True)
        assert (found.value, found.verdict) == (0.5, Verdict.TIMEOUT)

    def test_the_author_s_helpers_belong_in_the_setup(self) -> None:
        tests = {"kind": "assert", "entry_point": "double", "code": "assert double(helper(2)) == 6"}
        found = score(GOOD, tests)
        assert found.verdict is Verdict.INFRA_ERROR
        assert "name 'helper' is not defined" in found.detail
        tests["setup"] = "def helper(n):\n    return n + 1\n"
        assert score(GOOD, tests).verdict is Verdict.PASS
        assert score(GOOD + "helper = lambda n: 0\n", tests).verdict is Verdict.PASS

    def test_tests_may_expect_an_exception(self) -> None:
        code = (
            "try:\n    double('x')\n    assert False\nexcept TypeError as error:\n    assert 'no text' in str(error)\n"
        )
        tests = {"kind": "assert", "entry_point": "double", "code": code}
        source = "def double(n):\n    if isinstance(n, str):\n        raise TypeError('no text')\n    return 2 * n"
        assert score(source, tests).verdict is Verdict.PASS
        assert score(GOOD, tests).verdict is Verdict.WRONG

    @pytest.mark.parametrize(
        ("source", "code"),
        [
            ("def f(xs): xs.sort()", "xs = [2, 1]\nf(xs)\nassert xs == [1, 2]"),
            ("def f(xs): xs[0].append(1)", "xs = [[]]\nf(xs=xs)\nassert xs == [[1]]"),
            ("def f(seen, last): seen.add(last)", "seen = {1}\nf(seen, 2)\nassert seen == {1, 2}"),
            ("def f(d): del d['a']", "d = {'a': 1, 'b': 2}\nf(d)\nassert d == {'b': 2}"),
            ("def f(xs, ys): xs.sort()", "xs = [2, 1]\nf(xs, xs)\nassert xs == [1, 2]"),
            ("def f(xs, *, ys): ys.sort()", "xs = [2, 1]\nf(xs, ys=xs)\nassert xs == [1, 2]"),
            (
                "def f(d):\n    items = sorted(d.items())\n    d.clear()\n    d.update(items)",
                "d = {'b': 1, 'a': 2}\nf(d)\nassert list(d) == ['a', 'b']\nds = [{2: 1, 1: 2}]\nf(ds[0])\nassert list(ds[0]) == [1, 2]",
            ),
            (
                "def f(d):\n    last = d.pop('a')\n    d['c'] = 3\n    d['a'] = last",
                "from collections import OrderedDict\nd = OrderedDict(a=1, b=2)\nf(d)\n"
                "assert (list(d), type(d)) == (['b', 'c', 'a'], OrderedDict) and d.popitem() == ('a', 1)",
            ),
            (
                "def f(d): d['a'] += 1",
                "from collections import Counter\nd = Counter('aab')\nf(d)\nassert d == Counter('aaab')",
            ),
            ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
            (
                "def f(n): return map(str, range(n))",
                "first, *others = f(3)\nassert (first, others) == ('0', ['1', '2'])",
            ),
            ("def f(n): return {n: n}.items()", "assert dict(f(3)) == {3: 3}"),
            (
                "def f(n):\n    yield 1 // n",
                "try:\n    list(f(0))\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert 0",
            ),
        ],
    )
    def test_a_function_may_work_in_place_or_give_its_values_one_by_one(self, source: str, code: str) -> None:
        assert score(source, {"kind": "assert", "entry_point": "f", "code": code}).verdict is Verdict.PASS

    @pytest.mark.parametrize(
        ("source", "verdict"),
        [
            ("def f(xs):\n    xs.clear()\n    return xs", Verdict.WRONG),
            (FORGER, Verdict.WRONG),
            ("def f(xs): return iter(xs)", Verdict.WRONG),
            ("def f(xs):\n    while True:\n        yield 0", Verdict.OUTPUT),
        ],
    )
    def test_no_function_changes_what_its_value_is_compared_with_or_gives_values_for_ever(
        self, source: str, verdict: Verdict
    ) -> None:
        tests = {"kind": "assert", "entry_point": "f", "code": "xs = [2, 1]\nassert f(xs) == sorted(xs)"}
        assert score(source, tests).verdict is verdict

    def test_what_asks_the_candidate_nothing_is_no_case(self) -> None:
        code = "import random\nrandom.seed(0)\nprint(1)\nassert double(2) == 4\nfor n in (1, 2):\n    assert double(n) == 2 * n"
        tests = {"kind": "assert", "entry_point": "double", "code": code, "setup": None}
        assert score("def double(n):\n    return 0", tests, partial=True).value == 0
        assert score(GOOD, tests, partial=True).value == 1
        stored = "found = [double(n) for n in (1, 2)]\nimport operator\nall(map(operator.eq, found, [2, 4]))\ncheck = found[1] - 4 and 1 / 0"
        late = "out = double(2)\ndef same(a, b):\n    if a != b: raise AssertionError(a)\nsame(out, 4)"
        for code in (stored, late):
            assert score(GOOD, {"kind": "assert", "entry_point": "double", "code": code}).verdict is Verdict.PASS
        assert (
            score("def double(n):\n    return 0", {"kind": "assert", "entry_point": "double", "code": late}).verdict
            is Verdict.WRONG
        )

    def test_test_functions_that_call_themselves_are_cases(self) -> None:
        code = "def test_two():\n    assert double(2) == 4\ndef test_three():\n    assert double(3) == 6\ntest_two()\ntest_three()"
        tests = {"kind": "assert", "entry_point": "double", "code": code}
        found = score("def double(n):\n    return 4", tests, partial=True)
        assert (found.value, found.verdict) == (0.5, Verdict.WRONG)


class TestProgram:
    def test_without_a_block_there_is_no_answer(self) -> None:
        [found] = code_tests([Sample("s", "", GOOD, None, metadata={"tests": TASKS["function"]})], executor=FAKE)
        assert (found.value, found.verdict) == (0.0, Verdict.NO_ANSWER)

    @NEEDS_ISOLATION
    def test_it_is_the_block_that_defines_the_function(self) -> None:
        text = f"```python\n{GOOD}```\nUsage:\n```python\nprint(double(2))\n```\n```\n4\n```"
        for tests in (TASKS["function"], TASKS["assert"], json.dumps(TASKS["check"])):
            [found] = code_tests([Sample("s", "", text, None, metadata={"tests": tests})])
            assert found.verdict is Verdict.PASS
        [found] = code_tests([Sample("s", "", text, None, metadata={"tests": TASKS["stdio"]})])
        assert found.verdict is Verdict.CRASH  # of programs the last one counts, which here lacks the function


class Fake:
    """An executor of somebody else's, as a container runtime or a remote service would be."""

    name, isolated = "fake", True

    def run(self, job: Job, limits: Limits, *, stop: bool = False) -> Execution:
        raise SandboxFailure("the service is down")

    def close(self) -> None:
        pass


def make() -> Fake:
    return Fake()


FAKE = f"{__name__}:make"


class TestNobodysFault:
    def test_a_failing_executor_is_no_verdict_on_the_model(self) -> None:
        found = score(GOOD, TASKS["function"], executor=FAKE)
        assert found.verdict is Verdict.INFRA_ERROR
        assert math.isnan(found.value)
        assert "the service is down" in found.detail

    @pytest.mark.parametrize(
        ("tests", "message"),
        [
            (None, "tests must be one of"),
            ({"kind": "unittest"}, "tests must be one of"),
            ("{", "tests given as text must be JSON"),
            ({"kind": "stdio", "cases": []}, "with at least one case"),
            ({"kind": "stdio", "cases": [{"input": "1"}]}, "tests of kind 'stdio' must be"),
            ({"kind": "stdio", "cases": [{"input": 1, "output": "1"}]}, "tests of kind 'stdio' must be"),
            ({"kind": "function", "cases": CALLS}, "tests of kind 'function' must be"),
            ({"kind": "function", "entry_point": "f", "cases": [{"args": [1]}]}, "tests of kind 'function' must be"),
            ({"kind": "function", "entry_point": "f", "cases": [{"args": [object()], "expected": 1}]}, "plain data"),
            ({"kind": "assert", "entry_point": "f"}, "tests of kind 'assert' must be"),
        ],
    )
    def test_unusable_tests_are_told_apart(self, tests: Any, message: str) -> None:
        found = score(GOOD, tests, executor=FAKE)
        assert found.verdict is Verdict.INFRA_ERROR
        assert message in found.detail

    @NEEDS_ISOLATION
    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("", "they hold no assert and define no check(candidate)"),
            ("assert True", "never calls 'double'"),
            ("assert double(2) == ", "SyntaxError"),
            ("import numpy\n" + ASSERTS, "No module named 'numpy'"),
            ("assert double(print) == 4", "an argument cannot be passed to the candidate"),
            ("import os\nos._exit(0)\n" + ASSERTS, "ended without a word"),
            ("raise SystemExit(0)", "SystemExit"),
        ],
    )
    def test_test_code_that_tests_nothing_is_unusable(self, code: str, message: str) -> None:
        found = score(GOOD, {"kind": "assert", "entry_point": "double", "code": code})
        assert found.verdict is Verdict.INFRA_ERROR
        assert message in found.detail

    def test_an_executor_that_cannot_be_made_is_named(self) -> None:
        with pytest.raises(RewardError, match="executor 'nowhere:make' must be 'namespaces' or"):
            score(GOOD, TASKS["function"], executor="nowhere:make")


class TestWithoutIsolation:
    @pytest.fixture(autouse=True)
    def no_namespaces(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        from reward.code import answer as module

        monkeypatch.setattr(zygote, "_BOOT", REFUSING)
        executors: dict[str, Any] = {}
        monkeypatch.setattr(module, "_executors", executors)
        yield
        for executor in executors.values():
            executor.close()

    def test_a_mixture_stops_with_the_reason(self) -> None:
        with pytest.raises(RewardError, match=r"code_tests.*cannot isolate.*user namespaces"):
            Mixture([RewardTerm(name="code_tests")]).score([sample(GOOD, TASKS["function"])])

    def test_the_unsafe_flag_runs_it_and_marks_every_score(self) -> None:
        right, wrong = (score(s, TASKS["check"], unsafe_no_isolation=True) for s in (GOOD, "def double(n): return 0"))
        assert (right.verdict, wrong.verdict) == (Verdict.PASS, Verdict.WRONG)
        assert right.detail.startswith("not isolated; ")
        assert wrong.detail.startswith("not isolated; ")

    def test_the_unsafe_flag_and_an_executor_exclude_each_other(self) -> None:
        with pytest.raises(RewardError, match=r"leave executor=.* out"):
            score(GOOD, TASKS["function"], unsafe_no_isolation=True, executor=FAKE)
