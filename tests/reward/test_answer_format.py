"""The form that a completion must have, whatever its answer."""

import time

import pytest

from reward import Sample, Verdict
from reward.form import answer_format


def sample(completion: str, truncated: bool = False) -> Sample:
    return Sample(id="s", prompt="?", completion=completion, ground_truth=None, truncated=truncated)


@pytest.mark.parametrize("ending", ["", ".", " .\n", "$", "$.", "$$", r"\)", "\n\\]\n", r".\]"])
def test_one_box_at_the_end_passes(ending: str) -> None:
    assert answer_format(sample(rf"So \boxed{{\frac{{1}}{{2}}}}{ending}")).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("completion", "verdict", "detail"),
    [
        ("42", Verdict.NO_ANSWER, "no"),
        (r"\boxed{42", Verdict.WRONG, "unclosed"),
        (r"\boxed{}", Verdict.WRONG, "empty"),
        (r"\boxed{ }", Verdict.WRONG, "empty"),
        (r"\boxed{1} \boxed{1}", Verdict.WRONG, "2"),
        (r"\boxed{\boxed{1}}", Verdict.WRONG, "2"),
        (r"\boxed{1 then \boxed{1}", Verdict.WRONG, "2"),
        (r"\boxed{42} is it", Verdict.WRONG, "after"),
        (r"\boxed{42}..", Verdict.WRONG, "after"),
    ],
)
def test_the_detail_says_what_is_missing(completion: str, verdict: Verdict, detail: str) -> None:
    score = answer_format(sample(completion), right=2.0, wrong=-0.5)
    assert score.verdict is verdict
    assert score.value == -0.5
    assert detail in score.detail


def test_a_completion_that_was_cut_off_fails() -> None:
    score = answer_format(sample(r"\boxed{42}", truncated=True))
    assert score.verdict is Verdict.WRONG
    assert "cut off" in score.detail


def test_a_long_blank_tail_takes_linear_time() -> None:
    started = time.process_time()
    answer_format(sample(r"\boxed{42}" + " " * 200_000 + "x"))
    assert time.process_time() - started < 5.0
