"""Alarms for a GRPO run that goes wrong in silence: each says what it saw, and which samples show it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean
from typing import TypedDict

from align.recipe import AlarmOptions
from align.session.run import Run

SHOWN = 4
KEPT = 16


@dataclass(frozen=True, slots=True)
class SeenSample:
    """A sample as the alarms look at it: `sureness` is its mean log-probability a token, in nats."""

    id: str
    reward: float
    sureness: float
    in_uniform_group: bool


@dataclass(frozen=True, slots=True)
class Alarm:
    """`kind` of alarm, what was seen, and the ids of samples that show it, most telling first."""

    kind: str
    message: str
    samples: Sequence[str] = ()


class History(TypedDict):
    """What the alarms compare a step with, ready for JSON.

    The entropies of the first steps, mean and standard deviation of the rewards of the last, and the alarms that are on.
    """

    entropies: list[float]
    rewards: list[tuple[float, float]]
    on: list[str]


class Alarms:
    """Looks at every step. An alarm is told when it begins, and again only after a step without it.

    `history`, at first `no_history()`, is kept up to date for whoever goes on.
    """

    def __init__(self, options: AlarmOptions, run: Run, history: History):
        self._options, self._run, self._history = options, run, history

    def observe(self, step: int, metrics: Mapping[str, float], samples: Sequence[SeenSample]) -> None:
        """Take a step's metrics and its judged samples."""
        found = list(self._look(metrics, samples))
        for alarm in found:
            if alarm.kind not in self._history["on"]:
                shown = f" (samples {', '.join(alarm.samples[:SHOWN])})" if alarm.samples else ""
                self._run.warn(
                    f"GRPO step {step}: {alarm.message}{shown}", alarm=alarm.kind, samples=list(alarm.samples)
                )
        self._history["on"] = [alarm.kind for alarm in found]

    def _look(self, metrics: Mapping[str, float], samples: Sequence[SeenSample]) -> Iterator[Alarm]:
        yield from self._entropy(metrics["entropy"], samples)
        yield from self._variance(metrics["uniform_groups"], samples)
        yield from self._reward(metrics["reward"], metrics["reward_std"], samples)
        yield from self._experts(metrics)

    def _entropy(self, entropy: float, samples: Sequence[SeenSample]) -> Iterator[Alarm]:
        """The policy has lost most of the entropy that it had in the first steps."""
        if not isfinite(entropy):
            return
        first = self._history["entropies"]
        if len(first) < self._options.window:
            first.append(entropy)
            return
        share = entropy / max(fmean(first), 1e-12)
        if share < self._options.entropy_share:
            ids = _first(samples, key=lambda sample: -sample.sureness)
            yield Alarm("entropy", f"the policy's entropy is {share:.0%} of that of its first steps", ids)

    def _variance(self, uniform: float, samples: Sequence[SeenSample]) -> Iterator[Alarm]:
        """Nearly all groups have rewards that are all equal: there is nothing left to learn from."""
        if uniform >= self._options.zero_variance_groups:
            ids = _first((sample for sample in samples if sample.in_uniform_group), key=lambda sample: 0.0)
            yield Alarm("variance", f"in {uniform:.0%} of the groups all rewards are equal, which teaches nothing", ids)

    def _reward(self, reward: float, spread: float, samples: Sequence[SeenSample]) -> Iterator[Alarm]:
        """The mean reward is far from that of the steps before: a broken judge, or a policy that has found a way around it."""
        if not isfinite(reward):
            return
        before = self._history["rewards"]
        self._history["rewards"] = [*before, (reward, spread)][-self._options.window :]
        if len(before) < self._options.window:
            return
        usual = fmean(mean for mean, _ in before)
        one = max(sqrt(fmean(std * std for _, std in before)), 1e-6)
        jump = (reward - usual) / one
        if abs(jump) > self._options.reward_jump:
            ids = _first(samples, key=lambda sample: -sample.reward if jump > 0 else sample.reward)
            yield Alarm("reward", f"the mean reward jumped from {usual:.3g} to {reward:.3g}", ids)

    def _experts(self, metrics: Mapping[str, float]) -> Iterator[Alarm]:
        """Many experts of a layer get no token."""
        dead = {
            name.split("/")[1]: share
            for name, share in metrics.items()
            if name.startswith("experts/layer_") and name.endswith("/dead") and share > self._options.dead_experts
        }
        if dead:
            layers = ", ".join(f"{share:.0%} in {layer}" for layer, share in dead.items())
            yield Alarm("experts", f"experts without a single token: {layers}")


def no_history() -> History:
    """That of a run that has made no step yet."""
    return {"entropies": [], "rewards": [], "on": []}


def _first(samples: Iterable[SeenSample], key: Callable[[SeenSample], float]) -> list[str]:
    return [sample.id for sample in sorted(samples, key=key)[:KEPT]]
