r"""Mathematical answers: extracted, compared as text where that is certain, and by math-verify where it takes algebra.

math-verify runs in the worker processes of `reward.isolation.pool`, never here: a tower of powers costs the model its
reward and us half a second. Each ground truth is examined once; one that cannot be used masks its samples, whatever
they answer.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from reward.isolation.pool import FAULTS, End, Outcome, WorkerLimits, WorkerPool
from reward.math.final_answer import normalise, verdict_detail
from reward.math.form import Form, equal, read
from reward.math.text import LONGEST_ANSWER, compare, is_evident, readings, stated_answers, takes_back, tidy, unreadable
from reward.math.value import has_own_text, is_choice
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
_PASS = Score(0.0, Verdict.PASS)

workers = WorkerPool(Path(__file__).with_name("job.py"), limits=WorkerLimits(phase_cpu_s={"gold": 2.0}))
"""Where math-verify runs; started by the first answer that needs it."""

_golds: OrderedDict[str, str] = OrderedDict()
"""Why a tidied ground truth is unusable, or "" where it is usable."""


Ask = tuple[str, str | None]
"""A ground truth's value and an answer's, or None where only the ground truth is to be examined."""


@dataclass(frozen=True)
class _Case:
    """One sample on its way to a score."""

    sample: Sample
    gold: str
    form: Form | None = None
    """None where the ground truth cannot be read."""
    answers: Mapping[str, Score | None] = field(default_factory=dict)
    """What can be said of each answer without the workers, with a value of 0; None where it takes them."""
    stated: int = 0


@register("math", batched=True, columns=["answer"])
def math_answer(samples: Sequence[Sample], *, right: float = 1.0, wrong: float = 0.0) -> list[Score]:
    r"""Whether the stated answer equals the ground truth as mathematics: `\frac{1}{2}` is 0.5, `x=3` is 3.

    The answer is the last `\boxed{}`, or else the last `#### …`, or else "the answer is …", outside of `<think>` and of
    what repeats the prompt. Several different answers offered together pass only if they are the ground truth together,
    or each of them is. INFRA_ERROR stands for a ground truth that is missing or that cannot be used, and for workers
    that do not work.
    """
    cases = [_case(sample) for sample in samples]
    asks = list(dict.fromkeys(ask for case in cases for ask in _asks(case)))
    outcomes = dict(zip(asks, workers.run([{"gold": gold, "answer": answer} for gold, answer in asks]), strict=True))
    for (gold, _), outcome in outcomes.items():
        _remember(gold, outcome)
    return [_score(case, outcomes, right, wrong) for case in cases]


def _case(sample: Sample) -> _Case:
    gold = tidy(sample.ground_truth or "")
    if not normalise(gold):
        return _Case(sample, gold)
    form = None if unreadable(gold) else read(gold)
    stated = list(dict.fromkeys(map(tidy, dict.fromkeys(stated_answers(sample.completion, sample.prompt)))))
    answers = stated if len(stated) <= MOST_ANSWERS else []
    together = ",".join(stated)
    if len(stated) > 1 and form and len(form.items) == len(stated) and len(together) <= LONGEST_ANSWER:
        answers = [together]
    return _Case(sample, gold, form, {answer: _settled(gold, form, answer) for answer in answers}, len(stated))


def _asks(case: _Case) -> Iterator[Ask]:
    """The pairs of values that take algebra, and the values of the ground truth that nobody has examined."""
    reasons = {value.text: _known_reason(value.text) for value in case.form.values()} if case.form else {}
    if case.form is None or any(reasons.values()):
        return
    pairs: dict[Ask, None] = {}
    for answer, settled in case.answers.items():
        if settled is None:
            _compared(case.form, answer, {}, pairs)
    yield from pairs
    examined = {gold for gold, _ in pairs}
    yield from ((gold, None) for gold, reason in reasons.items() if reason is None and gold not in examined)


def _compared(gold: Form, answer: str, outcomes: Mapping[Ask, Outcome], asked: dict[Ask, None]) -> bool | None:
    """Whether an answer is the ground truth by what is known, and which pairs of values that rests on."""

    def same(one: str, other: str) -> bool | None:
        verdicts = {said(each, its) for each in readings(one) for its in readings(other)}
        return True if True in verdicts else None if None in verdicts else False

    def said(one: str, other: str) -> bool | None:
        verdict = compare(one, other)
        if verdict is not None:
            return verdict
        asked[one, other] = None
        return outcomes[one, other].reply.get("equal") is True if (one, other) in outcomes else None

    return equal(gold, read(answer), same)


def _known_reason(gold: str) -> str | None:
    return "" if is_evident(gold) else _golds.get(gold)


def _remember(gold: str, outcome: Outcome) -> None:
    """Keep why the ground truth is unusable, or that it is usable, where the outcome tells."""
    if outcome.end is End.INFRA:
        return
    if outcome.end is End.DONE:
        reason = str(outcome.reply.get("gold", ""))
        reason = "" if reason == UNREAD and _is_text(gold) else reason
    else:
        reason = "" if outcome.phase == "answer" else f"examining it: {outcome.end}, {outcome.detail}"
    _golds[gold] = reason
    if len(_golds) > _REMEMBERED:
        _golds.popitem(last=False)


def _is_text(gold: str) -> bool:
    """Whether a ground truth that no parser reads can be compared letter by letter."""
    return any(character.isalnum() for character in _COMMAND.sub("", gold)) and r"\begin" not in gold


def _is_foreign(gold: str) -> bool:
    """Whether a ground truth has letters or marks of other scripts only, such as ①③, and no digits to take for others."""
    strange = not any(character.isascii() and (character.isalnum() or character == "\\") for character in gold)
    return strange and any(map(str.isalnum, gold)) and not any(map(str.isdecimal, gold)) and len(gold) <= LONGEST_ANSWER


def _settled(gold: str, form: Form | None, answer: str) -> Score | None:
    """What can be said of an answer without the workers."""
    if gold == answer:
        return _PASS
    if form is None and _is_foreign(gold):
        return Score(0.0, Verdict.WRONG)
    if reason := unreadable(answer):
        return Score(0.0, Verdict.WRONG, reason)
    if takes_back(answer) and not takes_back(gold) and not (is_choice(gold) and has_own_text(answer)):
        return Score(0.0, Verdict.WRONG, "it takes back or conditions what it says")
    verdict = compare(gold, answer)
    if verdict is None and form:
        verdict = _compared(form, answer, {}, {})
    return None if verdict is None else _PASS if verdict else Score(0.0, Verdict.WRONG)


def _score(case: _Case, outcomes: Mapping[Ask, Outcome], right: float, wrong: float) -> Score:
    if why := _unusable(case, outcomes):
        return Score(math.nan, Verdict.INFRA_ERROR, str(UnusableAnswer(case.sample.id, why)))
    if case.stated and not case.answers:
        return Score(wrong, Verdict.WRONG, f"{case.stated} different answers")
    if not case.answers:
        return Score(wrong, Verdict.NO_ANSWER, r"no \boxed{}, no #### and no 'the answer is' with something in it")
    scores = {answer: known or _judged(case, answer, outcomes) for answer, known in case.answers.items()}
    seconds = sum(score.seconds for score in scores.values())
    failed = [(answer, score) for answer, score in scores.items() if score.verdict is not Verdict.PASS]
    if not failed:
        return Score(right, Verdict.PASS, seconds=seconds)
    for _, score in failed:
        if score.verdict is Verdict.INFRA_ERROR:
            return replace(score, seconds=seconds)
    answer, first = failed[0]
    several = f"one of {len(scores)} different answers: " if len(scores) > 1 else ""
    why = f": {first.detail}" if first.detail else ""
    return Score(wrong, first.verdict, several + verdict_detail(answer, case.gold) + why, seconds)


def _unusable(case: _Case, outcomes: Mapping[Ask, Outcome]) -> str:
    """Why nobody can be judged by this ground truth, or ""."""
    gold = case.gold
    if not normalise(gold):
        return "no ground truth to compare with"
    if case.form is None:
        if (list(case.answers) == [gold] and not gold.isascii()) or _is_foreign(gold):
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


def _judged(case: _Case, answer: str, outcomes: Mapping[Ask, Outcome]) -> Score:
    """What the workers' word makes of an answer, with a value of 0."""
    assert case.form is not None
    asked: dict[Ask, None] = {}
    verdict = _compared(case.form, answer, outcomes, asked)
    replies = [(gold, outcomes[gold, other]) for gold, other in asked if (gold, other) in outcomes]
    seconds = sum(outcome.seconds for _, outcome in replies)
    if verdict:
        return Score(0.0, Verdict.PASS, "", seconds)
    if broken := next((outcome for _, outcome in replies if outcome.end is End.INFRA), None):
        return Score(math.nan, Verdict.INFRA_ERROR, broken.detail, seconds)
    if fault := next((outcome for _, outcome in replies if outcome.end in FAULTS), None):
        return Score(0.0, FAULTS[fault.end], fault.detail, seconds)
    values = {value.text for value in case.form.values()}
    if any(gold in values and "gold" in outcome.reply for gold, outcome in replies):
        return replace(_as_text(case.gold, answer), seconds=seconds)
    unread = next((str(outcome.reply["unreadable"]) for _, outcome in replies if "unreadable" in outcome.reply), "")
    return Score(0.0, Verdict.WRONG, unread[:200], seconds)


def _as_text(gold: str, answer: str) -> Score:
    """What can be said of a ground truth that no parser reads: other numbers and letters are another answer."""
    atoms, others = (sorted(_ATOM.findall(_COMMAND.sub("", text).casefold())) for text in (gold, answer))
    if atoms != others:
        return Score(0.0, Verdict.WRONG, "it has other numbers and letters, and no parser reads the ground truth")
    if _LETTERS.sub("", gold.casefold()) == _LETTERS.sub("", answer.casefold()):
        return _PASS
    return Score(math.nan, Verdict.INFRA_ERROR, f"nobody can tell {answer[:80]!r} from {gold[:80]!r}: {UNREAD}")
