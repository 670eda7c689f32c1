"""What a reward sees (`Sample`) and says (`Score`), what the trainer gets (`SampleReward`), and the errors.

A reward is a function from a sample to a score. A `Mixture` sums the scores of several rewards into one
number for each sample, or into None where nobody could judge: that sample is masked, and never trained on.
"""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What became of a completion when it was judged. Only INFRA_ERROR and UNSCORED say nothing about the model."""

    PASS = "pass"
    """It meets what the reward asks for."""
    WRONG = "wrong"
    """It was judged, and does not."""
    NO_ANSWER = "no_answer"
    """It holds nothing to judge, such as no `\\boxed{}`."""
    TIMEOUT = "timeout"
    """Its answer took longer than the verifier allows: the model's fault."""
    MEMORY = "memory"
    """Its answer needed more memory than the verifier allows."""
    OUTPUT = "output"
    """Its program printed more than the verifier reads."""
    CRASH = "crash"
    """Its program, or the parsing of its answer, ended abnormally."""
    DENIED = "denied"
    """Its program tried something that the sandbox forbids."""
    INFRA_ERROR = "infra_error"
    """Nobody could judge it (a dead worker, no gold answer): no fault of the model, so never a number."""
    UNSCORED = "unscored"
    """Nobody was asked to: the recipe has no rewards."""


@dataclass(frozen=True)
class Sample:
    """One completion to be judged.

    `completion` is decoded text without special tokens; `ground_truth` is None where the task has none; `truncated` says that the completion hit its length limit instead of ending by itself; `metadata` is
    whatever the verifier of its domain needs, such as the row of the data set.
    """

    id: str
    prompt: str
    completion: str
    ground_truth: str | None
    domain: str = "math"
    truncated: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str | None:
        """The older name of `ground_truth`."""
        warnings.warn("Sample.answer is Sample.ground_truth now", DeprecationWarning, stacklevel=2)
        return self.ground_truth


def _take_answer(init: Any) -> Any:
    """Let `Sample` be made with the keyword `answer` too, the older name of `ground_truth`."""

    @functools.wraps(init)
    def __init__(self: Sample, *args: Any, **fields: Any) -> None:  # noqa: N807
        if "answer" in fields:
            warnings.warn("Sample(answer=...) is Sample(ground_truth=...) now", DeprecationWarning, stacklevel=2)
            fields["ground_truth"] = fields.pop("answer")
        init(self, *args, **fields)

    return __init__


Sample.__init__ = _take_answer(Sample.__init__)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Score:
    """One reward's word on one sample.

    `value` is finite, and ignored where the verdict is INFRA_ERROR (a mixture then reports nan); `detail` is
    for a human; `seconds` is wall time, filled in by the mixture where the reward leaves it at 0.
    """

    value: float
    verdict: Verdict
    detail: str = ""
    seconds: float = 0.0


class Abstention(Score):
    """The score of a reward that leaves the sample to the others: TRL's None. Where no other judges it, nobody could."""


@dataclass(frozen=True)
class SampleReward:
    """The mixture's word on one sample.

    `value` is the weighted sum, or None where a component that counts could not judge: mask the sample.
    `verdict` is that of the primary component, the first term that applies to the sample's domain.
    `components` holds every score by the name of its reward, in the order of the terms; not those of rewards that abstained beside others.
    """

    value: float | None
    verdict: Verdict
    components: Mapping[str, Score]


class RewardError(Exception):
    """Anything this package refuses. Its errors survive pickling, so they cross process borders whole."""


def _suggestion(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class UnknownReward(RewardError):  # noqa: N818
    """No reward of that name is registered."""

    HOW_TO_ADD = (
        "Your own is a function in a file, named like my_rewards.py:my_function; or an installed package announces it by an entry point "
        "of the group moe_align.rewards"
    )

    def __init__(self, name: str, known: Collection[str]) -> None:
        super().__init__(name, known)
        self.name, self.known = name, known

    def __str__(self) -> str:
        known = ", ".join(sorted(self.known)) or "none"
        return f"unknown reward {self.name!r}.{_suggestion(self.name, self.known)} Known rewards: {known}. {self.HOW_TO_ADD}"


class ParameterError(RewardError):
    """A reward was given a parameter that it does not have, or not given one that it needs."""

    def __init__(self, reward: str, parameter: str, why: str, known: Collection[str]) -> None:
        super().__init__(reward, parameter, why, known)
        self.reward, self.parameter, self.why, self.known = reward, parameter, why, known

    def __str__(self) -> str:
        known = ", ".join(self.known) or "none"
        nearest = _suggestion(self.parameter, self.known) if self.why == "unknown" else ""
        return f"reward {self.reward!r}: {self.why} parameter {self.parameter!r}.{nearest} Its parameters: {known}"


class DomainError(RewardError):
    """No term of the mixture with a weight applies to a sample's domain."""

    def __init__(self, domain: str, sample_id: str, terms: Collection[str]) -> None:
        super().__init__(domain, sample_id, terms)
        self.domain, self.sample_id, self.terms = domain, sample_id, terms

    def __str__(self) -> str:
        return (
            f"no reward with a weight applies to domain {self.domain!r} (sample {self.sample_id!r}). "
            f"Terms: {'; '.join(self.terms)}"
        )


class RewardContractError(RewardError):
    """A reward raised, or returned something other than one `Score` for each sample."""

    def __init__(self, reward: str, sample_id: str, why: str) -> None:
        super().__init__(reward, sample_id, why)
        self.reward, self.sample_id, self.why = reward, sample_id, why

    def __str__(self) -> str:
        return f"reward {self.reward!r} on sample {self.sample_id!r}: {self.why}"


class InfrastructureError(RewardError):
    """Too large a share of a batch could not be judged; `share` and `limit` are in [0, 1]."""

    def __init__(self, share: float, limit: float, first_reason: str) -> None:
        super().__init__(share, limit, first_reason)
        self.share, self.limit, self.first_reason = share, limit, first_reason

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of the samples could not be judged, the limit is {self.limit:.1%} (infra_error_limit). "
            f"The first: {self.first_reason}"
        )


class UnusableAnswer(RewardError):  # noqa: N818
    """A sample lacks the ground truth that its reward compares with: the data are at fault, not the model."""

    def __init__(self, sample_id: str, why: str) -> None:
        super().__init__(sample_id, why)
        self.sample_id, self.why = sample_id, why

    def __str__(self) -> str:
        return f"unusable answer of sample {self.sample_id!r}: {self.why}"
