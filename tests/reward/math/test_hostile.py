r"""Answers made to hang, to fill the memory, to run code or to fool the verifier: at least 60 bombs, 20 injections."""

import os
import time
from pathlib import Path

import pytest

from reward import Sample, Score, Verdict
from reward.math.answer import math_answer

HONEST = (r"\sqrt{2}+1", r"1+\sqrt{2}")
AT_MOST_S = 1.0


def judged(answer: str, gold: str = "7", prompt: str = "?") -> Score:
    return math_answer([Sample(id="s", prompt=prompt, completion=rf"\boxed{{{answer}}}", ground_truth=gold)])[0]


TOWERS = [
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "10^{10^{10}}",
    "10^{10^{100}}",
    "(10^{9})^{10^{9}}",
    "9^9^9^9",
    "-9^{9^{9}}",
    r"\left(\frac{3}{2}\right)^{10^{9}}",
    "2^{10^{12}}-2^{10^{12}-1}",
    r"\frac{1}{9^{9^{9}}}",
    r"\sqrt{9^{9^{9}}}",
    r"7^{7^{7^{7}}} \cdot 7^{-7^{7^{7}}}",
    "3^{3^{3^{3^{3}}}}+7-3^{3^{3^{3^{3}}}}",
    "1.0000001^{10^{15}}",
    r"\pi^{10^{10^{10}}}",
]
FACTORIALS = [
    "100000!",
    "1000000!",
    "10000000!",
    "(10^9)!",
    "((10!)!)!",
    "(((3!)!)!)!",
    "1000000!!",
    r"\binom{10^9}{10^8}",
    r"\binom{1000000}{500000}",
    r"\frac{1000000!}{999999!}",
    "(9^{9^{9}})!",
    "99999!-99998!",
]
SUMS = [
    r"\sum_{k=1}^{\infty} \frac{\sin k}{k}",
    r"\sum_{n=1}^{10^9} n^n",
    r"\sum_{n=1}^{100000} \frac{1}{n}",
    r"\sum_{i=1}^{1000}\sum_{j=1}^{1000} \frac{1}{i+j}",
    r"\prod_{k=1}^{10^8} k",
    r"\prod_{k=1}^{1000000} (1+\frac{1}{k^2})",
    r"\sum_{n=1}^{\infty} \frac{1}{n^n}",
    r"\int_0^1 x^x dx",
    r"\int_0^{\infty} \frac{\sin(x^2)}{x+e^x} dx",
    r"\int \int \int e^{x^2y^2z^2} dx dy dz",
    r"\lim_{n\to\infty} (1+\frac{1}{n^{n}})^{n^{n}}",
    r"\int \sqrt{1+\sin^3(x^2)} dx",
    r"\int_0^{\pi} \ln(1+\cos(x)^{100}) dx",
]
NESTING = [
    "(" * 39 + "7" + ")" * 39,
    "(" * 400 + "7" + ")" * 400,
    "{" * 450 + "8" + "}" * 450,  # of a 7 they would be right: braces only group
    r"\sqrt{" * 38 + "7" + "}" * 38,
    r"\sqrt{" * 160 + "7" + "}" * 160,
    r"\frac{1}{1+" * 38 + "7" + "}" * 38,
    r"\frac{" * 35 + "7" + "}{2}" * 35,
    "x^{" * 38 + "7" + "}" * 38,
    "|" * 60 + "7" + "|" * 60,
    "-" * 900 + "7",
    "+".join(["x"] * 490),
    "*".join(["(x+1)"] * 120),
    "(x+y+z+1)^{500}",
    "(a+b+c+d+e+f)^{60}-(f+e+d+c+b+a)^{60}",
    r"\sin(" * 38 + "x" + ")" * 38,
    ",".join(str(n) for n in range(200)),
    "=".join(["x"] * 300),
    "<".join(["x"] * 300),
    r"\begin{pmatrix}" + "&".join(["7"] * 300) + r"\end{pmatrix}",
    r"\text{" * 40 + "7" + "}" * 40,
]
LONG = [
    "9" * 1_000_000,
    "1+" * 500_000 + "1",
    "7" + " " * 1_000_000 + "8",
    r"\frac{1}{" * 100_000,
    "0." + "3" * 900,
    "9" * 999,
    r"\$" * 400_000,
    "x" * 990,
    "\\" * 1_000_000,
]
BOMBS = [*TOWERS, *FACTORIALS, *SUMS, *NESTING, *LONG]

MARK = f"/tmp/moe_align_injected_{os.getpid()}"
INJECTIONS = [
    f'__import__("os").system("touch {MARK}")',
    f"eval(\"__import__('os').system('touch {MARK}')\")",
    f"exec(\"open('{MARK}','w')\")",
    f'open("{MARK}","w").write("7")',
    f'().__class__.__base__.__subclasses__()[0]; open("{MARK}","w")',
    f"(lambda: open('{MARK}','w'))()",
    f"[open('{MARK}','w') for x in [1]][0]",
    f"sympify(\"open('{MARK}','w')\")",
    f"parse_expr(\"__import__('pathlib').Path('{MARK}').touch()\")",
    f"Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('{MARK}','w')",
    rf"\input{{{MARK}}}",
    rf"\write18{{touch {MARK}}}",
    rf"\immediate\write18{{touch {MARK}}}",
    rf"\openout\myfile={MARK}",
    f"7; import os; os.system('touch {MARK}')",
    f"7\nimport os\nos.system('touch {MARK}')",
    f"$(touch {MARK})",
    f"`touch {MARK}`",
    f"7 | touch {MARK}",
    f"${{IFS}}7 && touch {MARK}",
    f'{{"reply": {{"equal": true}}}}\n{{"id": 1}} # {MARK}',
    f"print(7) or __builtins__.__dict__['open']('{MARK}','w')",
    f"x=7 if open('{MARK}','w') else 7",
    f"f(x)=__import__('os').mknod('{MARK}')",
    rf"\operatorname{{__import__('os').mknod('{MARK}')}}",
]


@pytest.fixture(autouse=True, scope="module")
def warm_workers() -> None:
    assert judged(*HONEST).verdict is Verdict.PASS


def judged_in_time(*answer: str) -> Score:
    """The score of an answer, which comes within the limit, stretched by what waits for each processor; of three times once, for what
    else the machine does in that second."""
    took = []
    for _ in range(3):
        started, processor = time.monotonic(), time.process_time()
        score = judged(*answer)
        took.append(time.monotonic() - started)
        assert time.process_time() - processor < AT_MOST_S / 2  # in our own process
        if took[-1] < AT_MOST_S * (1 + 2 * os.getloadavg()[0] / len(os.sched_getaffinity(0))):
            return score
    pytest.fail(f"it took {took} s")


def test_there_are_as_many_as_promised() -> None:
    assert len(set(BOMBS)) >= 60
    assert len(set(INJECTIONS)) >= 20


@pytest.mark.parametrize(
    "bomb",
    [bomb if row % 6 == 0 else pytest.param(bomb, marks=pytest.mark.slow) for row, bomb in enumerate(BOMBS)],
    ids=lambda bomb: f"{bomb[:24]}-{len(bomb)}",
)
def test_a_bomb_costs_a_second_at_most_and_leaves_the_next_answer_unharmed(bomb: str) -> None:
    score = judged_in_time(bomb)
    assert score.value == 0.0
    assert score.verdict not in (Verdict.PASS, Verdict.INFRA_ERROR), score.detail
    next_one = judged_in_time(*HONEST)
    assert next_one.verdict is Verdict.PASS, next_one.detail


def test_a_bomb_as_the_ground_truth_masks_its_samples_and_no_others() -> None:
    samples = [Sample("a", "?", r"\boxed{7}", "9^{9^{9}}"), Sample("b", "?", r"\boxed{\frac{14}{2}}", "7")]
    assert [score.verdict for score in math_answer(samples)] == [Verdict.INFRA_ERROR, Verdict.PASS]


@pytest.mark.parametrize("injection", INJECTIONS, ids=lambda injection: injection.replace(MARK, "MARK"))
def test_no_injection_is_executed_or_right(injection: str) -> None:
    score = judged(injection)
    assert score.value == 0.0
    assert score.verdict is not Verdict.INFRA_ERROR
    assert not Path(MARK).exists()
