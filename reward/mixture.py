"""One number for each sample: the weighted sum of the rewards that apply to its domain.

The sum comes first. The group's mean and deviation are the trainer's, over these sums (DeepSeek-V2 report,
arXiv:2405.04434, section 4.2: the rewards are combined as in its eq. 36, and normalised as in its eq. 34).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from numbers import Real
from pathlib import Path
from time import perf_counter
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward import registry
from reward.own import file as own_file
from reward.registry import Reward
from reward.types import (
    Abstention,
    DomainError,
    InfrastructureError,
    RewardContractError,
    RewardError,
    Sample,
    SampleReward,
    Score,
    UnusableAnswer,
    Verdict,
)

_log = logging.getLogger(__name__)


class RewardTerm(BaseModel):
    """One summand: a reward by name, its weight, the domains it applies to (None: all), and its parameters.

    The name is that of a registered reward, or of a function in a file, as in "my_rewards.py:says_unit" (see `reward.own`). A weight of 0
    measures without rewarding. Its component is named by the `label`, or else by the reward or the function; two terms for one reward,
    such as two reward models, need a label to tell them apart.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        description="a registered reward (`align rewards list`), or a function in a file: my_rewards.py:my_function"
    )
    weight: float = Field(
        default=1.0, allow_inf_nan=False, description="factor of its values; 0 measures without rewarding"
    )
    domains: list[str] | None = Field(
        default=None, min_length=1, description="domains of the prompts it is for; all when not given"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="its parameters")
    label: str | None = Field(
        default=None, min_length=1, description="what its component is called; its name when not given"
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="seconds that a call of a function in a file may take; 30 when not given",
    )

    @model_validator(mode="after")
    def _a_call_to_limit(self) -> Self:
        if self.timeout_s is not None and own_file.split(self.name) is None:
            raise ValueError("timeout_s is for a function in a file (my_rewards.py:my_function): leave it out")
        return self

    @property
    def component(self) -> str:
        own = own_file.split(self.name)
        return self.label or (own[1] if own else self.name)

    @property
    def file(self) -> Path | None:
        """The file of the function, where the reward is one's own."""
        own = own_file.split(self.name)
        return own[0] if own else None

    def applies_to(self, domain: str) -> bool:
        return self.domains is None or domain in self.domains

    def __str__(self) -> str:
        domains = "every domain" if self.domains is None else ", ".join(self.domains)
        return f"{self.weight:g} x {self.component} ({domains})"


RECENT_BATCHES, RECENT_SAMPLES = 64, 256
"""The share of samples that nobody could judge is one of so many at least, of a run's last."""


class Mixture:
    """The reward of a run: `score(samples)`. Can be pickled if the functions of its rewards can be.

    `infra_error_limit`, in [0, 1], is the share of masked samples above which `score` raises.

    Raises on construction: UnknownReward, ParameterError, or RewardError where there are no terms, the limit
    is out of range, or two terms would give the same reward twice to one domain.
    """

    def __init__(self, terms: Sequence[RewardTerm], *, infra_error_limit: float = 0.05) -> None:
        if not terms:
            raise RewardError("a mixture needs at least one term")
        if not 0.0 <= infra_error_limit <= 1.0:
            raise RewardError(f"infra_error_limit is a share in [0, 1], not {infra_error_limit}")
        for one, other in combinations(terms, 2):
            if one.component == other.component and share_a_domain(one, other):
                raise RewardError(f"two terms for the same reward and domain need a label each: {one}; {other}")
        self.terms = tuple(terms)
        self.infra_error_limit = infra_error_limit
        self._rewards = [_reward_of(term) for term in terms]
        for term, reward in zip(terms, self._rewards, strict=True):
            registry.check_fit(reward, term.params)

    def make_ready(self) -> None:
        """Start whatever the rewards need. Raises RewardError where this machine cannot run one of them.

        A batched reward that is called with no samples does this much.
        """
        for term, reward in zip(self.terms, self._rewards, strict=True):
            if reward.batched:
                try:
                    reward.function([], **term.params)
                except RewardError:
                    raise
                except Exception as error:
                    raise RewardError(f"reward {term.name!r} called with no samples raised {error!r}") from error

    def check_ready(self) -> None:
        """Raise RewardError where a reward can tell, without loading anything, that it cannot be used on this machine now."""
        for term, reward in zip(self.terms, self._rewards, strict=True):
            try:
                registry.call_ready(reward.ready, term.params)
            except (TypeError, ValueError) as error:
                raise RewardError(f"reward {term.name!r} with parameters {term.params} raised {error!r}") from error

    @property
    def depends_on_batch(self) -> bool:
        """Whether a sample's reward may depend on the others that are scored with it, as that of a user's function of several samples may."""
        return any(getattr(reward.function, "needs_whole_batch", False) for reward in self._rewards)

    def columns(self, domain: str) -> dict[str, list[str]]:
        """By component, the columns of the data that its reward is known to need in samples of a domain."""
        return {
            term.component: [name for name in reward.columns if name not in term.params]
            for term, reward in zip(self.terms, self._rewards, strict=True)
            if term.applies_to(domain)
        }

    def score(self, samples: Sequence[Sample]) -> list[SampleReward]:
        """The rewards of the samples, in their order, unless too many of them could not be judged.

        Raises what `score_each` does, and InfrastructureError above `infra_error_limit`.
        """
        rewards = self.score_each(samples)
        self.refuse_too_many_masked(samples, rewards)
        return rewards

    def score_each(self, samples: Sequence[Sample]) -> list[SampleReward]:
        """The rewards of the samples, in their order, however many could not be scored.

        A component that answers INFRA_ERROR, or with a value that is not finite, is asked once more (one that may compare samples with each other
        only where it does so for all of them); if it still does, or finds the ground truth
        unusable, and its weight is not 0, then the sample's value is None. Where all weights are 0, so are all values.

        Raises DomainError or RewardContractError.
        """
        for sample in samples:
            if not is_judged(self.terms, sample.domain):
                raise DomainError(sample.domain, sample.id, [str(term) for term in self.terms])
        judged: list[list[tuple[RewardTerm, Score]]] = [[] for _ in samples]
        for term, reward in zip(self.terms, self._rewards, strict=True):
            rows = [row for row, sample in enumerate(samples) if term.applies_to(sample.domain)]
            scores = _scores(reward, term.params, [samples[row] for row in rows])
            for row, score in zip(rows, scores, strict=True):
                judged[row].append((term, score))
        return [_combine(scores) for scores in judged]

    def judge(self, samples: Sequence[Sample]) -> list[SampleReward]:
        """The older name of `score_each`."""
        warnings.warn("Mixture.judge is Mixture.score_each now", DeprecationWarning, stacklevel=2)
        return self.score_each(samples)

    def refuse_too_many_masked(
        self, samples: Sequence[Sample], rewards: Sequence[SampleReward], recent: Sequence[Sequence[SampleReward]] = ()
    ) -> None:
        """Raise InfrastructureError where some of the rewards are None, and more than `infra_error_limit` of them or, where given, of `recent` batches.

        Where the recent batches are fewer than `RECENT_BATCHES`, or their samples fewer than `RECENT_SAMPLES`, those that are missing count as judged:
        a prompt that no reward can judge does not end a run of small steps. It ends where several batches were not judged at all. A warning
        tells of a smaller share, and of components of weight 0 without a value.
        """
        unmeasured = [
            (name, sample.id, score.detail or "no detail")
            for sample, reward in zip(samples, rewards, strict=True)
            for name, score in reward.components.items()
            if reward.value is not None and score.verdict is Verdict.INFRA_ERROR
        ]
        if unmeasured:
            told = "%d values of rewards with weight 0 are missing. The first: reward %r on sample %r: %s"
            _log.warning(told, len(unmeasured), *unmeasured[0])
        reasons = why_masked(samples, rewards)
        if not reasons:
            return
        masked = [reward.value is None for batch in recent or [rewards] for reward in batch]
        share = sum(masked) / len(masked)
        few = max(1.0, RECENT_BATCHES / len(recent), RECENT_SAMPLES / len(masked)) if recent else 1.0
        nothing_judged = len(recent) > 1 and share == 1.0 > self.infra_error_limit
        if share / few > self.infra_error_limit or nothing_judged:
            raise InfrastructureError(share, self.infra_error_limit, reasons[0])
        ids = [sample.id for sample, reward in zip(samples, rewards, strict=True) if reward.value is None]
        told = "%d of %d samples masked. The first: %s"
        _log.warning(told, len(reasons), len(samples), reasons[0], extra={"facts": {"samples": ids}})


def _reward_of(term: RewardTerm) -> Reward:
    """The reward that a term names. Raises UnknownReward, or RewardError for a file that cannot be used."""
    own = own_file.split(term.name)
    return own_file.reward_of(*own, term.timeout_s) if own else registry.get(term.name)


def why_masked(samples: Sequence[Sample], rewards: Sequence[SampleReward]) -> list[str]:
    """For each reward that is None, which component could not judge which sample, and why."""
    reasons = []
    for sample, reward in zip(samples, rewards, strict=True):
        if reward.value is None:
            failed = (item for item in reward.components.items() if item[1].verdict is Verdict.INFRA_ERROR)
            name, score = next(failed)
            reasons.append(f"reward {name!r} on sample {sample.id!r}: {score.detail or 'no detail'}")
    return reasons


def is_judged(terms: Sequence[RewardTerm], domain: str) -> bool:
    """Whether a term with a weight is for samples of a domain; where all weights are 0, any term."""
    measures = not any(term.weight for term in terms)
    return any((term.weight or measures) and term.applies_to(domain) for term in terms)


def share_a_domain(one: RewardTerm, other: RewardTerm) -> bool:
    """Whether there may be samples that both terms apply to."""
    return one.domains is None or other.domains is None or not set(one.domains).isdisjoint(other.domains)


def _combine(scores: Sequence[tuple[RewardTerm, Score]]) -> SampleReward:
    """The reward of a sample. Rewards that abstain are left out where another that counts has judged it, or where none counts."""
    judging = [(term, score) for term, score in scores if not isinstance(score, Abstention)]
    if any(term.weight for term, _ in judging) or not any(term.weight for term, _ in scores):
        scores = judging or scores
    # A term of weight 0 masks nothing. It may have the value nan, and 0 * nan is nan.
    counting = [(term.weight, score) for term, score in scores if term.weight]
    masked = any(score.verdict is Verdict.INFRA_ERROR for _, score in counting)
    total = sum(weight * score.value for weight, score in counting)
    return SampleReward(
        value=None if masked else float(total),
        verdict=scores[0][1].verdict,
        components={term.component: score for term, score in scores},
    )


def _scores(reward: Reward, params: Mapping[str, Any], samples: Sequence[Sample]) -> list[Score]:
    """One score for each sample; those nobody could judge are asked for twice: alone, and of a reward that may compare samples only where they are all."""
    scores = _call(reward, params, samples)
    failed = [
        row
        for row, score in enumerate(scores)
        if score.verdict is Verdict.INFRA_ERROR and not isinstance(score, Abstention)
    ]
    if getattr(reward.function, "needs_whole_batch", False) and len(failed) < len(samples):
        return scores
    again = _call(reward, params, [samples[row] for row in failed])
    for row, score in zip(failed, again, strict=True):
        scores[row] = replace(score, seconds=scores[row].seconds + score.seconds)
    return scores


def _call(reward: Reward, params: Mapping[str, Any], samples: Sequence[Sample]) -> list[Score]:
    if not samples:
        return []
    if not reward.batched:
        return [_call_one(reward, params, sample) for sample in samples]
    started = perf_counter()
    ids = samples[0].id if len(samples) == 1 else f"{samples[0].id} … {samples[-1].id}"
    try:
        scores = reward.function(samples, **params)
    except UnusableAnswer as error:
        why = f"a batched reward returns INFRA_ERROR for the one sample instead of raising {error!r}"
        raise RewardContractError(reward.name, error.sample_id, why) from error
    except Exception as error:
        raise RewardContractError(reward.name, ids, f"raised {error!r}") from error
    if not isinstance(scores, Sequence):
        raise RewardContractError(reward.name, ids, f"returned {type(scores).__name__}, not a sequence of Score")
    if len(scores) != len(samples):
        raise RewardContractError(reward.name, ids, f"{len(scores)} scores for {len(samples)} samples")
    seconds = (perf_counter() - started) / len(samples)
    return [_checked(reward, sample, score, seconds) for sample, score in zip(samples, scores, strict=True)]


def _call_one(reward: Reward, params: Mapping[str, Any], sample: Sample) -> Score:
    started = perf_counter()
    try:
        score = reward.function(sample, **params)
    except UnusableAnswer as error:
        score = Score(math.nan, Verdict.INFRA_ERROR, str(error))
    except Exception as error:
        raise RewardContractError(reward.name, sample.id, f"raised {error!r}") from error
    return _checked(reward, sample, score, perf_counter() - started)


def _checked(reward: Reward, sample: Sample, score: Any, seconds: float) -> Score:
    if not isinstance(score, Score) or not isinstance(score.verdict, Verdict):
        raise RewardContractError(
            reward.name,
            sample.id,
            f"returned {score!r}, not a Score with a Verdict: return reward.Score(value, reward.Verdict.PASS)",
        )
    timed = replace(score, seconds=score.seconds or seconds)
    if score.verdict is Verdict.INFRA_ERROR:
        return replace(timed, value=math.nan)
    if not isinstance(score.value, Real) or not math.isfinite(score.value):
        return replace(
            timed, value=math.nan, verdict=Verdict.INFRA_ERROR, detail=f"value {score.value!r} is not a finite number"
        )
    return replace(timed, value=float(score.value))
