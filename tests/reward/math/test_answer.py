"""Mathematical answers: which are stated, which are equal, and what happens where nobody can tell."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import Sample, Score, Verdict
from reward.isolation.pool import WorkerLimits, WorkerPool
from reward.math import answer as module
from reward.math.answer import math_answer
from reward.math.text import compare, number, stated_answers, tidy

PAIRS = [json.loads(line) for line in Path(__file__).with_name("pairs.jsonl").read_text().splitlines()]
"""Ground truths and answers by kind, and whether they are equal as mathematics."""

EXPLAINED = {(r"\sqrt{\frac1n}", r"\frac{1}{\sqrt n}"): "they differ for negative n"}
"""What is judged wrongly, and why: an equal pair that is not seen to be equal."""


def sample(completion: str, answer: str | None = "42", prompt: str = "?") -> Sample:
    return Sample(id="s", prompt=prompt, completion=completion, ground_truth=answer)


def judged(completion: str, answer: str | None = "42", prompt: str = "?", **params: float) -> Score:
    return math_answer([sample(completion, answer, prompt)], **params)[0]


@pytest.fixture
def broken_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    def replace(source: str, **limits: Any) -> None:
        job = tmp_path / "job.py"
        job.write_text(source)
        monkeypatch.setattr(module, "workers", WorkerPool(job, workers=1, limits=WorkerLimits(**limits)))

    monkeypatch.setattr(module, "_golds", type(module._golds)())
    yield replace
    module.workers.close()


def test_known_pairs_get_their_verdicts_and_every_error_is_explained() -> None:
    assert len(PAIRS) >= 300
    assert sum(pair["equal"] for pair in PAIRS) >= 100
    scores = math_answer([sample(rf"So \boxed{{{pair['answer']}}}.", pair["gold"]) for pair in PAIRS])
    wrong = {
        (pair["gold"], pair["answer"])
        for pair, score in zip(PAIRS, scores, strict=True)
        if score.verdict not in (Verdict.PASS, Verdict.WRONG) or (score.verdict is Verdict.PASS) != pair["equal"]
    }
    assert wrong <= EXPLAINED.keys()


def test_no_text_comparison_contradicts_the_table() -> None:
    for pair in PAIRS:
        certain = compare(tidy(pair["gold"]), tidy(pair["answer"]))
        assert certain in (None, pair["equal"]), pair


@pytest.mark.parametrize(
    ("completion", "answers"),
    [
        (r"\boxed{1} then \boxed{2}", ["1", "2"]),
        (r"The answer is 1. \boxed{2}", ["2"]),
        ("6 * 7 = 42\n#### 42", ["42"]),
        ("#### Step 1: add\n#### Step 2: multiply\n#### 42", ["42"]),
        ("#### 41\n#### 42", ["41", "42"]),
        ("#### Step 1\nAdd.\n#### Conclusion\n\nThe answer is 58.", ["58"]),
        ("#### x+1\nThe answer is fully simplified.", ["x+1"]),
        ("the final answer is: $\\frac{1}{2}$. I hope so.", [r"$\frac{1}{2}$"]),
        ("The answer is 3.5. Not 4.", ["3.5"]),
        ("The answer is 41. No: the answer is 42.", ["41", "42"]),
        ("The answer is\n42", []),
        ("42", []),
        (r"\boxed{", []),
        (r"\boxed{1", []),
        ("", []),
    ],
)
def test_where_the_answer_is_stated(completion: str, answers: list[str]) -> None:
    assert stated_answers(completion, "?") == answers


PROMPT = "Example: what is 6 times 7? Put it in a box: \\boxed{42}.\nNow: what is 40 + 2? Put it in a box, please."


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        (PROMPT, Verdict.NO_ANSWER),
        (PROMPT + "\nIt is 5.", Verdict.NO_ANSWER),
        (PROMPT + "\n\\boxed{42}", Verdict.PASS),
        (PROMPT.splitlines()[0], Verdict.NO_ANSWER),
        (PROMPT.splitlines()[0] + "\n\\boxed{41}", Verdict.WRONG),
        (r"It is \boxed{42}.", Verdict.PASS),
    ],
)
def test_what_repeats_the_prompt_is_no_answer(completion: str, verdict: Verdict) -> None:
    assert judged(completion, "42", PROMPT).verdict is verdict


def test_a_short_line_of_the_prompt_can_be_the_answer_to_it() -> None:
    assert judged("The answer is 42.", "42", "6 * 7? The answer is 42.\nThe answer is 42.\n7 * 6?").value == 1.0


@given(st.permutations(["40", "41", "42", r"\frac{84}{2}", "43"]), st.integers(2, 5))
def test_several_answers_pass_only_if_each_is_right(tries: list[str], count: int) -> None:
    right = all(number(tidy(one)) == 42 for one in tries[:count])
    score = judged(" ".join(rf"\boxed{{{one}}}" for one in tries[:count]))
    assert score.verdict is (Verdict.PASS if right else Verdict.WRONG)
    assert right or "different answers" in score.detail


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no ground truth"),
        ("", "no ground truth"),
        (" $ ", "no ground truth"),
        (r"\frac{1", "unbalanced"),
        (r"\begin{nonsense}", "cannot read"),
        ("?!", "cannot read"),
        ("4²２", "U+FF12"),
        ("9^{9^{9}}+1", "not done after"),
        (r"\frac{1}{0}", "no number"),
        ("1+" * 600 + "1", "1201 characters"),
    ],
)
@pytest.mark.parametrize("completion", [r"\boxed{42}", "none", r"\boxed{9^{9^{9}}}"])
def test_an_unusable_ground_truth_masks_the_sample_whatever_it_answers(
    answer: str | None, reason: str, completion: str
) -> None:
    score = judged(completion, answer)
    assert score.verdict is Verdict.INFRA_ERROR
    assert math.isnan(score.value)
    assert reason in score.detail
    assert "sample 's'" in score.detail


def test_an_unusable_ground_truth_masks_even_an_answer_that_repeats_it() -> None:
    assert judged(r"\boxed{?!}", "?!").verdict is Verdict.INFRA_ERROR


def test_a_ground_truth_is_examined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged("none", "x^7+1")
    asked: list[Any] = []
    monkeypatch.setattr(module.workers, "run", lambda requests: asked.extend(requests) or [])
    assert judged("none", "x^7+1").verdict is Verdict.NO_ANSWER
    assert judged(r"\boxed{x^7+1}", "x^7+1").verdict is Verdict.PASS
    assert asked == []


def test_the_same_answer_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = module.workers.run, []
    monkeypatch.setattr(module.workers, "run", lambda requests: asked.extend(requests) or run(requests))
    scores = math_answer([sample(r"\boxed{y+x}", "x+y")] * 16)
    assert len(asked) == 1
    assert [score.value for score in scores] == [1.0] * 16


def test_plain_numbers_and_words_need_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.workers, "run", lambda requests: [] if not requests else pytest.fail(f"{requests}"))
    for gold, answer, value in (
        ("42", "42.0", 1.0),
        ("42", "43", 0.0),
        (r"\text{even}", "odd", 0.0),
        ("B", "(B)", 1.0),
    ):
        assert judged(rf"\boxed{{{answer}}}", gold).value == value


def test_the_scores_are_in_the_order_of_the_samples_and_as_asked() -> None:
    completions = [r"\boxed{42}", r"\boxed{x}", "none", r"\boxed{\sqrt{1764}}", r"\boxed{9^{9^9}+x^2}"]
    scores = math_answer([sample(one) for one in completions], right=2.0, wrong=-1.0)
    assert [score.value for score in scores] == [2.0, -1.0, -1.0, 2.0, -1.0]
    assert scores[2].verdict is Verdict.NO_ANSWER
    assert math_answer([]) == []


WARM = "def warm():\n    pass\n"


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("import no_such_package", "no_such_package"),
        (WARM + "def work(request, enter):\n    raise RuntimeError", "RuntimeError"),
        (WARM + "import os\ndef work(request, enter):\n    enter('answer')\n    os._exit(1)", "code 1"),
        (WARM + "import time\ndef work(request, enter):\n    enter('answer')\n    time.sleep(9)", "processor time"),
    ],
    ids=["no math-verify", "a bug in the job", "a worker that dies", "a worker that sleeps"],
)
@pytest.mark.parametrize("completion", [r"\boxed{2\sqrt{3}}", "none"])
def test_a_fault_of_ours_is_never_a_reward(broken_workers: Any, source: str, detail: str, completion: str) -> None:
    broken_workers(source, cpu_s=0.1, stuck_s=0.3)
    score = judged(completion, r"\sqrt{12}")
    assert score.verdict is Verdict.INFRA_ERROR
    assert math.isnan(score.value)
    assert detail in score.detail


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("while True: pass", Verdict.TIMEOUT),
        ("bytearray(1 << 40)", Verdict.MEMORY),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", Verdict.CRASH),
        ("return {'equal': 'yes'}", Verdict.WRONG),
        ("return {'unreadable': 'no'}", Verdict.WRONG),
    ],
)
def test_a_fault_of_the_answer_is_the_models(broken_workers: Any, body: str, verdict: Verdict) -> None:
    broken_workers(WARM + f"def work(request, enter):\n    enter('answer')\n    {body}", cpu_s=0.2)
    score = judged(r"\boxed{2\sqrt{3}}", r"\sqrt{12}", wrong=-1.0)
    assert (score.verdict, score.value) == (verdict, -1.0)


def test_a_verifier_that_knows_no_mathematics_any_more_never_starts(tmp_path: Path) -> None:
    source = Path(module.__file__).with_name("job.py").read_text()
    job = tmp_path / "job.py"
    job.write_text(source.replace("return verify(", "return not verify("))
    outcome = WorkerPool(job).run([{"gold": "1", "answer": "1"}])[0]
    assert "Broken" in outcome.detail


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=4), st.lists(st.integers(-50, 50), min_size=2, max_size=4))
def test_points_are_equal_exactly_when_their_coordinates_are(one: list[int], other: list[int]) -> None:
    left, right = (f"({', '.join(map(str, row))})" for row in (one, other))
    assert compare(tidy(left), tidy(left.replace(",", ".0,"))) is True
    if len(one) == len(other):
        assert compare(tidy(left), tidy(right)) is (one == other)
    assert compare(tidy(left), tidy(left.replace("(", "["))) is None


@given(st.text(alphabet="$\\text{}0123.,+-/ frac,;!~xA\N{MINUS SIGN}×²", max_size=40) | st.text(max_size=40))
def test_tidying_twice_changes_nothing_more(answer: str) -> None:
    assert tidy(tidy(answer)) == tidy(answer)


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4), st.integers(1, 50))
def test_fractions_are_equal_exactly_when_their_values_are(top: int, bottom: int, factor: int) -> None:
    sign, size = ("-", -top) if top < 0 else ("", top)
    written = rf"{sign}\dfrac{{{size * factor}}}{{{bottom * factor}}}"
    assert compare(tidy(f"{top}/{bottom}"), tidy(written)) is True
    assert compare(tidy(f"{top + 1}/{bottom}"), tidy(written)) is False


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 50_000,
        "####\n" * 100_000,
        "answer is " * 50_000,
        "\\" * 500_000,
        " " * 1_000_000 + "x",
        "**" * 300_000,
        "<answer>" * 100_000,
        "<think>" * 100_000,
        r"\boxed 8 or " * 50_000,
    ],
    ids=["boxes", "hashes", "answers", "backslashes", "spaces", "stars", "tags", "thoughts", "bare boxes"],
)
def test_a_megabyte_of_anything_takes_linear_time(text: str) -> None:
    started = time.process_time()
    judged(text)
    judged(rf"\boxed{{{text}}}")
    judged(f"#### {text}")
    assert time.process_time() - started < 30.0  # in quadratic time it is hours


@pytest.mark.slow
def test_five_hundred_different_answers_a_second() -> None:
    """On two idle cores: one third takes algebra, two thirds are plain numbers, as in MATH and GSM8K."""
    algebra = [
        (r"{n}\sqrt{{2}}+1", r"1+{n}\sqrt{{2}}"),
        (r"\frac{{{n}\pi}}{{4}}", r"{n}\pi/4"),
        ("x^2+{n}x", "x(x+{n})"),
        ("({n},-1)", "({n}.0,-1)"),
        (r"{n},\sqrt{{2}}", r"\sqrt{{2}},{n}"),
        (r"x\le {n}", r"(-\infty,{n}]"),
        ("2^{{{n}}}", r"2\cdot 2^{{{n}-1}}"),
    ]
    samples = []
    for n in range(1, 1001):
        samples += [sample(rf"\boxed{{{n}}}", str(n)), sample(rf"\boxed{{{n}/7}}", str(n))]
        gold, answer = algebra[n % len(algebra)]
        samples.append(sample(rf"\boxed{{{answer.format(n=n)}}}", gold.format(n=n)))
    math_answer(samples[:300])
    started = time.perf_counter()
    scores = math_answer(samples[300:])
    rate = len(scores) / (time.perf_counter() - started)
    print(f"{rate:.0f} answers a second, load {os.getloadavg()[0]:.1f}")
    assert all(score.verdict is (Verdict.WRONG if row % 3 == 1 else Verdict.PASS) for row, score in enumerate(scores))
    assert rate > 500 / max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
