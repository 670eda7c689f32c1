r"""Mathematical answers: extracted, compared as text where that is certain, and by math-verify where it takes algebra.

math-verify runs in the worker processes of `reward.killable`, never here: a tower of powers costs the model its
reward and us half a second. Each ground truth is examined once; one that cannot be used masks its samples, whatever
they answer.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reward.final_answer import normalise, verdict_detail
from reward.killable import End, Killable, Limits, Outcome
from reward.math_text import compare, is_evident, stated_answers, takes_back, tidy, unreadable
from reward.registry import register
from reward.types import Sample, Score, UnusableAnswer, Verdict

MOST_ANSWERS = 3
"""Different answers in one completion that are still compared one by one; more are a spray."""
_REMEMBERED = 10_000

workers = Killable(Path(__file__).with_name("math_job.py"), limits=Limits(phase_cpu_s={"gold": 2.0}))
"""Where math-verify runs; started by the first answer that needs it."""

_golds: OrderedDict[str, str] = OrderedDict()
"""Why a tidied ground truth is unusable, or "" where it is usable."""

_FAULTS = {End.TIMEOUT: Verdict.TIMEOUT, End.MEMORY: Verdict.MEMORY, End.CRASH: Verdict.CRASH}


@dataclass(frozen=True)
class _Finding:
    """What became of one answer; `why` is for a human."""

    verdict: Verdict
    why: str = ""
    seconds: float = 0.0


@dataclass
class _Case:
    """One sample on its way to a score."""

    sample: Sample
    gold: str
    answers: list[str] = field(default_factory=list)
    stated: int = 0


@register("math", batched=True)
def math_answer(samples: Sequence[Sample], *, right: float = 1.0, wrong: float = 0.0) -> list[Score]:
    r"""Whether the stated answer equals the ground truth as mathematics: `\frac{1}{2}` is 0.5, `x=3` is 3.

    The answer is the last `\boxed{}`, or else the last `#### …`, or else "the answer is …", outside what repeats
    the prompt. Several different answers pass only if each of them is right. INFRA_ERROR stands for a ground truth
    that is missing or that math-verify cannot use, and for workers that do not work.
    """
    cases = [_case(sample) for sample in samples]
    outcomes = _ask(cases)
    return [_score(case, outcomes, right, wrong) for case in cases]


def _case(sample: Sample) -> _Case:
    case = _Case(sample, tidy(sample.answer or ""))
    if normalise(case.gold):
        stated = dict.fromkeys(tidy(answer) for answer in stated_answers(sample.completion, sample.prompt))
        case.stated = len(stated)
        case.answers = list(stated) if len(stated) <= MOST_ANSWERS else []
    return case


def _ask(cases: Sequence[_Case]) -> dict[tuple[str, str | None], Outcome]:
    """The workers' word on every pair that takes algebra and on every ground truth not seen before."""
    wanted: dict[tuple[str, str | None], None] = {}
    for case in cases:
        if not normalise(case.gold) or _known_reason(case.gold) or unreadable(case.gold):
            continue
        pairs = [(case.gold, answer) for answer in case.answers if _settled(case.gold, answer) is None]
        if not pairs and _known_reason(case.gold) is None:
            wanted[case.gold, None] = None
        wanted.update(dict.fromkeys(pairs))
    keys = list(wanted)
    outcomes = workers.run([{"gold": gold, "answer": answer} for gold, answer in keys])
    for (gold, _), outcome in zip(keys, outcomes, strict=True):
        reason = _gold_reason(outcome)
        if reason is not None:
            _remember(gold, reason)
    return dict(zip(keys, outcomes, strict=True))


def _known_reason(gold: str) -> str | None:
    return "" if is_evident(gold) else _golds.get(gold)


def _gold_reason(outcome: Outcome) -> str | None:
    """Why the ground truth is unusable, "" where it is usable, and None where this outcome does not tell."""
    if outcome.end is End.DONE:
        return str(outcome.reply.get("gold", ""))
    if outcome.end is End.INFRA:
        return None
    return "" if outcome.phase == "answer" else f"examining it: {outcome.end}, {outcome.detail}"


def _remember(gold: str, reason: str) -> None:
    _golds[gold] = reason
    if len(_golds) > _REMEMBERED:
        _golds.popitem(last=False)


def _settled(gold: str, answer: str) -> _Finding | None:
    """What can be said without the workers."""
    if gold == answer:
        return _Finding(Verdict.PASS)
    if reason := unreadable(answer):
        return _Finding(Verdict.WRONG, reason)
    if takes_back(answer) and not takes_back(gold):
        return _Finding(Verdict.WRONG, "it takes back or conditions what it says")
    equal = compare(gold, answer)
    return None if equal is None else _Finding(Verdict.PASS if equal else Verdict.WRONG)


def _score(case: _Case, outcomes: dict[tuple[str, str | None], Outcome], right: float, wrong: float) -> Score:
    if why := _unusable(case.gold, outcomes.get((case.gold, None))):
        return Score(math.nan, Verdict.INFRA_ERROR, str(UnusableAnswer(case.sample.id, why)))
    if case.stated > MOST_ANSWERS:
        return Score(wrong, Verdict.WRONG, f"{case.stated} different answers")
    if not case.answers:
        return Score(wrong, Verdict.NO_ANSWER, r"no \boxed{}, no #### and no 'the answer is' with something in it")
    findings = [_settled(case.gold, answer) or _finding(outcomes[case.gold, answer]) for answer in case.answers]
    seconds = sum(finding.seconds for finding in findings)
    worst = next((one for one in findings if one.verdict is Verdict.INFRA_ERROR), None)
    worst = worst or next((one for one in findings if one.verdict is not Verdict.PASS), None)
    if worst is None:
        return Score(right, Verdict.PASS, seconds=seconds)
    if worst.verdict is Verdict.INFRA_ERROR:
        return Score(math.nan, worst.verdict, worst.why, seconds)
    several = f"one of {len(findings)} different answers: " if len(findings) > 1 else ""
    detail = verdict_detail(case.answers[findings.index(worst)], case.gold)
    return Score(wrong, worst.verdict, several + detail + (f": {worst.why}" if worst.why else ""), seconds)


def _unusable(gold: str, examined: Outcome | None) -> str:
    """Why nobody can be judged by this ground truth, or ""."""
    if not normalise(gold):
        return "no ground truth to compare with"
    if reason := unreadable(gold):
        return reason if not gold.isascii() or len(gold) > 80 else f"{gold!r}: {reason}"
    known = _known_reason(gold)
    if known is None and examined is not None:  # the workers failed
        return f"nobody could examine {gold!r}: {examined.detail}"
    return f"{gold[:80]!r}: {known}" if known else ""


def _finding(outcome: Outcome) -> _Finding:
    if outcome.end in _FAULTS:
        return _Finding(_FAULTS[outcome.end], outcome.detail, outcome.seconds)
    if outcome.end is End.INFRA or "gold" in outcome.reply:
        return _Finding(Verdict.INFRA_ERROR, outcome.detail or str(outcome.reply["gold"])[:200], outcome.seconds)
    if "unreadable" in outcome.reply:
        return _Finding(Verdict.WRONG, str(outcome.reply["unreadable"])[:200], outcome.seconds)
    equal = outcome.reply.get("equal") is True
    return _Finding(Verdict.PASS if equal else Verdict.WRONG, "", outcome.seconds)
