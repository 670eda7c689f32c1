r"""Mathematical answers: extracted, compared as text where that is certain, and by math-verify where it takes algebra.

math-verify runs in the worker processes of `reward.isolation.pool`, never here: a tower of powers costs the model its
reward and us half a second. Each ground truth is examined once; one that cannot be used masks its samples, whatever
they answer.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reward.isolation.pool import FAULTS, End, Outcome, WorkerLimits, WorkerPool
from reward.math.final_answer import normalise, verdict_detail
from reward.math.form import Form, equal, read
from reward.math.text import LONGEST_ANSWER, compare, is_evident, stated_answers, takes_back, tidy, unreadable
from reward.registry import register
from reward.types import Sample, Score, UnusableAnswer, Verdict

MOST_ANSWERS = 3
"""Different answers in one completion that are still compared one by one; more are a spray."""
_REMEMBERED = 10_000
UNREAD = "math-verify cannot read it"
"""What the workers say of a ground truth that their parser does not know."""
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_ATOM = re.compile(r"[0-9.]+|[a-z]+|-")
_LETTERS = re.compile(r"[\s{}]|\\(?:text|,|;|quad)")

workers = WorkerPool(Path(__file__).with_name("job.py"), limits=WorkerLimits(phase_cpu_s={"gold": 2.0}))
"""Where math-verify runs; started by the first answer that needs it."""

_golds: OrderedDict[str, str] = OrderedDict()
"""Why a tidied ground truth is unusable, or "" where it is usable."""


Ask = tuple[str, str | None]
"""A ground truth's value and an answer's, or None where only the ground truth is to be examined."""


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
    form: Form | None = None
    """None where the ground truth cannot be read."""
    answers: list[str] = field(default_factory=list)
    stated: int = 0


@register("math", batched=True)
def math_answer(samples: Sequence[Sample], *, right: float = 1.0, wrong: float = 0.0) -> list[Score]:
    r"""Whether the stated answer equals the ground truth as mathematics: `\frac{1}{2}` is 0.5, `x=3` is 3.

    The answer is the last `\boxed{}`, or else the last `#### …`, or else "the answer is …", outside of `<think>` and of
    what repeats the prompt. Several different answers offered together pass only if they are the ground truth together,
    or each of them is. INFRA_ERROR stands for a ground truth that is missing or that cannot be used, and for workers
    that do not work.
    """
    cases = [_case(sample) for sample in samples]
    outcomes = _ask(cases)
    return [_score(case, outcomes, right, wrong) for case in cases]


def _case(sample: Sample) -> _Case:
    case = _Case(sample, tidy(sample.ground_truth or ""))
    if normalise(case.gold):
        case.form = None if unreadable(case.gold) else read(case.gold)
        stated = list(dict.fromkeys(map(tidy, dict.fromkeys(stated_answers(sample.completion, sample.prompt)))))
        case.stated = len(stated)
        together = ",".join(stated)
        if len(stated) > 1 and case.form and len(case.form.items) == len(stated) and len(together) <= LONGEST_ANSWER:
            stated = [together]
        case.answers = stated if len(stated) <= MOST_ANSWERS else []
    return case


def _ask(cases: Sequence[_Case]) -> dict[Ask, Outcome]:
    """The workers' word on every pair of values that takes algebra and on every value of a ground truth not seen before."""
    wanted: dict[Ask, None] = {}
    for case in cases:
        if case.form is None:
            continue
        values = [value.text for value in case.form.values() if _known_reason(value.text) is None]
        if any(_known_reason(value.text) for value in case.form.values()):
            continue
        pairs: dict[Ask, None] = {}
        for answer in case.answers:
            if _settled(case, answer) is None:
                _compared(case.form, answer, {}, pairs)
        wanted.update(pairs)
        asked = {gold for gold, _ in pairs}
        wanted.update(((value, None), None) for value in values if value not in asked)
    keys = list(wanted)
    outcomes = workers.run([{"gold": gold, "answer": answer} for gold, answer in keys])
    for (gold, _), outcome in zip(keys, outcomes, strict=True):
        reason = _gold_reason(gold, outcome)
        if reason is not None:
            _remember(gold, reason)
    return dict(zip(keys, outcomes, strict=True))


def _compared(gold: Form, answer: str, outcomes: dict[Ask, Outcome], asked: dict[Ask, None]) -> bool | None:
    """Whether an answer is the ground truth by what is known, and which pairs of values that rests on."""

    def same(one: str, other: str) -> bool | None:
        verdict = compare(one, other)
        if verdict is not None:
            return verdict
        asked[one, other] = None
        return outcomes[one, other].reply.get("equal") is True if (one, other) in outcomes else None

    return equal(gold, read(answer), same)


def _known_reason(gold: str) -> str | None:
    return "" if is_evident(gold) else _golds.get(gold)


def _gold_reason(gold: str, outcome: Outcome) -> str | None:
    """Why the ground truth is unusable, "" where it is usable, and None where this outcome does not tell."""
    if outcome.end is End.DONE:
        reason = str(outcome.reply.get("gold", ""))
        return "" if reason == UNREAD and _is_text(gold) else reason
    if outcome.end is End.INFRA:
        return None
    return "" if outcome.phase == "answer" else f"examining it: {outcome.end}, {outcome.detail}"


def _is_text(gold: str) -> bool:
    """Whether a ground truth that no parser reads can be compared letter by letter."""
    return any(character.isalnum() for character in _COMMAND.sub("", gold)) and r"\begin" not in gold


def _is_foreign(gold: str) -> bool:
    """Whether a ground truth has letters or marks of other scripts only, such as ①③, and no digits to take for others."""
    strange = not any(character.isascii() and (character.isalnum() or character == "\\") for character in gold)
    return strange and any(map(str.isalnum, gold)) and not any(map(str.isdecimal, gold)) and len(gold) <= LONGEST_ANSWER


def _remember(gold: str, reason: str) -> None:
    _golds[gold] = reason
    if len(_golds) > _REMEMBERED:
        _golds.popitem(last=False)


def _settled(case: _Case, answer: str) -> _Finding | None:
    """What can be said without the workers."""
    if case.gold == answer:
        return _Finding(Verdict.PASS)
    if case.form is None and _is_foreign(case.gold):
        return _Finding(Verdict.WRONG)
    if reason := unreadable(answer):
        return _Finding(Verdict.WRONG, reason)
    if takes_back(answer) and not takes_back(case.gold):
        return _Finding(Verdict.WRONG, "it takes back or conditions what it says")
    verdict = compare(case.gold, answer)
    if verdict is None and case.form:
        verdict = _compared(case.form, answer, {}, {})
    return None if verdict is None else _Finding(Verdict.PASS if verdict else Verdict.WRONG)


def _score(case: _Case, outcomes: dict[Ask, Outcome], right: float, wrong: float) -> Score:
    if why := _unusable(case, outcomes):
        return Score(math.nan, Verdict.INFRA_ERROR, str(UnusableAnswer(case.sample.id, why)))
    if case.stated and not case.answers:
        return Score(wrong, Verdict.WRONG, f"{case.stated} different answers")
    if not case.answers:
        return Score(wrong, Verdict.NO_ANSWER, r"no \boxed{}, no #### and no 'the answer is' with something in it")
    findings = [_settled(case, answer) or _finding(case, answer, outcomes) for answer in case.answers]
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


def _unusable(case: _Case, outcomes: dict[Ask, Outcome]) -> str:
    """Why nobody can be judged by this ground truth, or ""."""
    gold = case.gold
    if not normalise(gold):
        return "no ground truth to compare with"
    if case.form is None:
        if (case.answers == [gold] and not gold.isascii()) or _is_foreign(gold):
            return ""  # compared letter by letter
        reason = unreadable(gold)
        return reason if not gold.isascii() or len(gold) > 80 else f"{gold!r}: {reason}"
    for value in case.form.values():
        known = _known_reason(value.text)
        examined = outcomes.get((value.text, None))
        if known is None and examined is not None:  # the workers failed
            return f"nobody could examine {gold!r}: {examined.detail}"
        if known:
            return f"{gold[:80]!r}: {known}"
    return ""


def _finding(case: _Case, answer: str, outcomes: dict[Ask, Outcome]) -> _Finding:
    assert case.form is not None
    asked: dict[Ask, None] = {}
    verdict = _compared(case.form, answer, outcomes, asked)
    replies = [(gold, outcomes[gold, other]) for gold, other in asked if (gold, other) in outcomes]
    seconds = sum(outcome.seconds for _, outcome in replies)
    if verdict:
        return _Finding(Verdict.PASS, "", seconds)
    if broken := next((outcome for _, outcome in replies if outcome.end is End.INFRA), None):
        return _Finding(Verdict.INFRA_ERROR, broken.detail, seconds)
    if fault := next((outcome for _, outcome in replies if outcome.end in FAULTS), None):
        return _Finding(FAULTS[fault.end], fault.detail, seconds)
    values = {value.text for value in case.form.values()}
    for gold, outcome in replies:
        if gold in values and "gold" in outcome.reply:  # read as text only
            return _as_text(case.gold, answer, seconds)
    unread = next((str(outcome.reply["unreadable"]) for _, outcome in replies if "unreadable" in outcome.reply), "")
    return _Finding(Verdict.WRONG, unread[:200], seconds)


def _as_text(gold: str, answer: str, seconds: float) -> _Finding:
    """What can be said of a ground truth that no parser reads: other numbers and letters are another answer."""
    atoms, others = (sorted(_ATOM.findall(_COMMAND.sub("", text).casefold())) for text in (gold, answer))
    if atoms != others:
        return _Finding(
            Verdict.WRONG, "it has other numbers and letters, and no parser reads the ground truth", seconds
        )
    if _LETTERS.sub("", gold.casefold()) == _LETTERS.sub("", answer.casefold()):
        return _Finding(Verdict.PASS, "", seconds)
    return _Finding(Verdict.INFRA_ERROR, f"nobody can tell {answer[:80]!r} from {gold[:80]!r}: {UNREAD}", seconds)
