r"""Whether a completion ends, by itself, in one `\boxed{}`: the form that every other verifier reads."""

from __future__ import annotations

import re

from reward.final_answer import boxes, normalise
from reward.registry import register
from reward.types import Sample, Score, Verdict

_ENDING = re.compile(r"\.?|\.?(?:\$\$?|\\\)|\\\])\.?")


@register("answer_format")
def answer_format(sample: Sample, *, right: float = 1.0, wrong: float = 0.0) -> Score:
    r"""Whether the completion ended by itself in exactly one `\boxed{}` with something in it.

    After the box only white space, a full stop and the closing delimiter of its formula may follow. The
    detail says what is missing.
    """
    problems = ["cut off at the length limit"] if sample.truncated else []
    found = boxes(sample.completion)
    # The commands are counted, not the boxes, so that nested and unclosed ones count.
    written = sample.completion.count(r"\boxed")
    if not found:
        problems.append(r"an unclosed \boxed{" if written else r"no \boxed{}")
    elif written > 1:
        problems.append(rf"{written} \boxed{{}} instead of one")
    else:
        if not normalise(found[0].content):
            problems.append(r"an empty \boxed{}")
        if not _ENDING.fullmatch("".join(sample.completion[found[0].end :].split())):
            problems.append(r"text after the \boxed{}")
    if not problems:
        return Score(right, Verdict.PASS)
    return Score(wrong, Verdict.WRONG if written else Verdict.NO_ANSWER, "; ".join(problems))
