"""How well rewards tell the better completion of a pair: accuracy, calibration, and what mere length would tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from statistics import fmean
from typing import Any

from align.statistics import wilson_interval

BINS = 10


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """A pair with the rewards of its completions and their lengths in tokens."""

    id: str
    prompt: str
    domain: str
    rewards: tuple[float, float]
    """Of the chosen completion and of the rejected one."""
    lengths: tuple[int, int]

    @property
    def difference(self) -> float:
        return self.rewards[0] - self.rewards[1]


@dataclass(frozen=True, slots=True)
class Bin:
    """The pairs that were told apart with a confidence above `lowest` and up to `highest`."""

    lowest: float
    highest: float
    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class PairEvaluation:
    """The result on a set of pairs. Where both completions are rated alike, half a pair counts as right.

    `interval` holds the accuracy with 95 % confidence (Wilson 1927). `longer` is the accuracy of preferring the longer
    completion, 1 - `longer` that of the shorter: a reward model is worth what it knows beyond. `calibration_error` is the
    expected one, from the bins of `reliability`.
    """

    pairs: int
    accuracy: float
    interval: tuple[float, float]
    difference: float
    longer: float
    calibration_error: float
    reliability: Sequence[Bin]
    by_domain: Mapping[str, float]

    def numbers(self) -> dict[str, float]:
        """The numbers as metrics."""
        numbers = {
            "preference/accuracy": self.accuracy,
            "preference/accuracy_low": self.interval[0],
            "preference/accuracy_high": self.interval[1],
            "preference/difference": self.difference,
            "preference/calibration_error": self.calibration_error,
            "preference/longer": self.longer,
            "preference/shorter": 1 - self.longer,
        }
        if len(self.by_domain) > 1:
            numbers |= {f"preference/accuracy/{domain}": value for domain, value in self.by_domain.items()}
        return numbers


def evaluate_pairs(scored: Sequence[ScoredPair]) -> PairEvaluation:
    """What the rewards say of the pairs, of which there is at least one."""
    right = [share_right(pair.difference) for pair in scored]
    prompts = len({pair.prompt for pair in scored})  # pairs of one prompt are alike
    reliability = reliability_bins([pair.difference for pair in scored])
    return PairEvaluation(
        pairs=len(scored),
        accuracy=fmean(right),
        interval=wilson_interval(fmean(right) * prompts, prompts),
        difference=fmean(pair.difference for pair in scored),
        longer=fmean(share_right(pair.lengths[0] - pair.lengths[1]) for pair in scored),
        calibration_error=sum(b.pairs * abs(b.accuracy - b.confidence) for b in reliability) / len(scored),
        reliability=reliability,
        by_domain={
            domain: fmean(share for pair, share in zip(scored, right, strict=True) if pair.domain == domain)
            for domain in dict.fromkeys(pair.domain for pair in scored)
        },
    )


def share_right(difference: float) -> float:
    """1 where the chosen completion is rated higher, 0 where lower; rated alike, a tossed coin is right half of the time."""
    return 0.5 if difference == 0 else float(difference > 0)


def reliability_bins(differences: Sequence[float]) -> list[Bin]:
    """Confidence against accuracy, from 0.5 to 1 in bins of equal width, of which those without a pair are left out.

    A difference of rewards gives its preferred completion the probability `sigmoid(|difference|)`, the confidence. (That
    of the chosen completion cannot be binned instead: it is the better one in every pair.) Their mean distance, weighted
    by pairs, is the expected calibration error of Guo et al. 2017 (arXiv:1706.04599, eq. 3).
    """
    confidences = [1 / (1 + exp(-abs(difference))) for difference in differences]
    rights = [share_right(difference) for difference in differences]
    width = 0.5 / BINS
    places = [min(int((confidence - 0.5) / width), BINS - 1) for confidence in confidences]
    return [
        Bin(
            lowest=0.5 + place * width,
            highest=0.5 + (place + 1) * width,
            pairs=places.count(place),
            confidence=fmean(c for c, at in zip(confidences, places, strict=True) if at == place),
            accuracy=fmean(r for r, at in zip(rights, places, strict=True) if at == place),
        )
        for place in sorted(set(places))
    ]


def rows(scored: Sequence[ScoredPair], texts: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """The pairs as rows of a table; `texts` are prompt, chosen and rejected completion of each."""
    return [
        {
            "id": pair.id,
            "domain": pair.domain,
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_reward": pair.rewards[0],
            "rejected_reward": pair.rewards[1],
            "chosen_tokens": pair.lengths[0],
            "rejected_tokens": pair.lengths[1],
        }
        for pair, (prompt, chosen, rejected) in zip(scored, texts, strict=True)
    ]
