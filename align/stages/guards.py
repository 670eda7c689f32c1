"""What a run is watched for while it trains: each guard says what it saw, and which samples show it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from statistics import fmean, variance
from typing import Any, NotRequired, TypedDict

from align.errors import AlarmError, NonFiniteError
from align.experience import ScoredGroup, ScoredTrajectory
from align.habits import Comparison, Found, compare
from align.recipe import AlarmOptions, GuardOptions
from align.report.habits import StepWindows
from align.stages.advantages import Advantages

SHOWN = 4
KEPT = 16
SURE = 2.0
"""Standard errors of a difference of means that count as a change."""

NO_SPREAD = 1e-6
"""A standard deviation of rewards up to here is that of equal ones."""

RISE = 1.5
"""How many times that of the first steps the load of a busiest expert is that counts as a change."""

Warn = Callable[..., None]
"""Called with a sentence, and with facts about it by name."""


class Guards:
    """All guards of a run. `state`, ready for JSON, is kept up to date for a run that is resumed."""

    def __init__(
        self,
        alarms: AlarmOptions,
        over_optimisation: GuardOptions | None,
        *,
        non_finite_limit: int,
        samples: Callable[[int], Found],
        warn: Warn,
        state: MutableMapping[str, Any],
    ):
        """`samples` looks at those that the run has stored of a step."""
        self._alarms = Alarms(alarms, warn, state.setdefault("alarms", no_history()))
        self._habits = HabitGuard(alarms, samples, warn, state.setdefault("habits", []))
        self._guard = over_optimisation and OverOptimisationGuard(over_optimisation, state.setdefault("guard", []))
        self._non_finite = NonFiniteGuard(non_finite_limit, warn, state)
        self._warn = warn

    def observe(
        self, step: int, groups: Sequence[ScoredGroup], advantages: Advantages, metrics: Mapping[str, float]
    ) -> None:
        """Look at a step, counted from 1, of which the samples are stored.

        Raises NonFiniteError after too many steps with numbers that are not finite, AlarmError for an alarm of `alarms.stop`.
        """
        self._non_finite.observe(step, advantages.non_finite)
        if self._guard and (alarm := self._guard.observe(groups)):
            self._warn(f"GRPO step {step}: {alarm}")
        self._alarms.observe(step, metrics, samples_to_show(groups, advantages))
        self._habits.observe(step)


class NonFiniteGuard:
    """Says which samples were left out for a NaN or an infinity.

    Raises NonFiniteError when `limit` steps in a row had some; how many there are by now is in `state`.
    """

    KEY = "steps_with_bad_samples"

    def __init__(self, limit: int, warn: Warn, state: MutableMapping[str, Any]):
        self._limit, self._warn, self._state = limit, warn, state

    def observe(self, step: int, found: Mapping[str, str]) -> None:
        """Take which number of which sample is not finite."""
        in_a_row = self._state[self.KEY] = self._state.get(self.KEY, 0) + 1 if found else 0
        if not found:
            return
        shown = ", ".join(f"{number} of {id_}" for id_, number in list(found.items())[:SHOWN])
        more = ", ..." if len(found) > SHOWN else ""
        text = f"GRPO step {step}: {len(found)} samples left out, for a number that is not finite: {shown}{more}"
        self._warn(text, samples=list(found))
        if in_a_row >= self._limit:
            raise NonFiniteError(
                f"{in_a_row} steps in a row had samples with numbers that are not finite, the last: {shown}{more} "
                f"(learner.stop_after_bad_steps: {self._limit} ends a run)"
            )


@dataclass(frozen=True, slots=True)
class SeenSample:
    """A sample as the alarms look at it; `mean_log_prob` of its sampled tokens, in nats."""

    id: str
    reward: float
    mean_log_prob: float
    in_zero_variance_group: bool


def samples_to_show(groups: Sequence[ScoredGroup], advantages: Advantages) -> list[SeenSample]:
    """The samples with a valid reward."""
    return [
        SeenSample(answer.sample_id, float(answer.reward.value or 0), mean_log_prob(answer), bool(zero_variance))
        for group, valid, zero_variance in zip(groups, advantages.valid, advantages.zero_variance, strict=True)
        for answer, good in zip(group.trajectories, valid, strict=True)
        if good
    ]


def mean_log_prob(answer: ScoredTrajectory) -> float:
    return float(answer.trajectory.log_probs[answer.trajectory.sampled].mean())


@dataclass(frozen=True, slots=True)
class Alarm:
    """`kind` of alarm, what was seen, and the ids of samples that show it, most telling first."""

    kind: str
    message: str
    samples: Sequence[str] = ()


class History(TypedDict):
    """What the alarms compare a step with, ready for JSON.

    The entropies of the first steps, and by layer the loads of their busiest experts; mean and standard deviation of the rewards of the last;
    how many steps in a row have trained on nothing; and the alarms that are on.
    """

    entropies: list[float]
    busiest: NotRequired[dict[str, list[float]]]
    rewards: list[tuple[float, float]]
    idle: NotRequired[int]
    on: list[str]


class Alarms:
    """Looks at every step. An alarm is told when it begins, and again only after a step without it; one of `alarms.stop` ends the run as long as
    it is there, also when that goes on.

    `history`, at first `no_history()`, is kept up to date for whoever goes on.
    """

    def __init__(self, options: AlarmOptions, warn: Warn, history: History, stage: str = "GRPO"):
        self._options, self._warn, self._history, self._stage = options, warn, history, stage

    def observe(self, step: int, metrics: Mapping[str, float], samples: Sequence[SeenSample] = ()) -> None:
        """Take a step's metrics and its judged samples, which SFT has none of. A reward is among the metrics where one is trained on."""
        found = list(self._look(metrics, samples))
        new = [alarm for alarm in found if alarm.kind not in self._history["on"]]
        for alarm in new:
            shown = f" (samples {', '.join(alarm.samples[:SHOWN])})" if alarm.samples else ""
            self._warn(
                f"{self._stage} step {step}: {alarm.message}{shown}", alarm=alarm.kind, samples=list(alarm.samples)
            )
        self._history["on"] = [alarm.kind for alarm in found]
        stop_at(found, self._options)

    def _look(self, metrics: Mapping[str, float], samples: Sequence[SeenSample]) -> Iterator[Alarm]:
        if "entropy" in metrics:
            yield from self._entropy(metrics["entropy"], samples)
        if "reward" in metrics:
            yield from self._variance(metrics["zero_variance_groups"], samples)
            yield from self._reward(metrics["reward"], metrics["reward_std"], samples)
        yield from self._experts(metrics)
        yield from self._collapse(metrics)
        yield from self._refill(metrics)
        yield from self._idle(metrics)

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
            ids = _first(samples, key=lambda sample: -sample.mean_log_prob)
            yield Alarm("entropy", f"the policy's entropy is {share:.0%} of that of its first steps", ids)

    def _variance(self, share: float, samples: Sequence[SeenSample]) -> Iterator[Alarm]:
        """Nearly all groups have rewards that are all equal: there is nothing left to learn from."""
        if share >= self._options.zero_variance_groups:
            ids = _first((sample for sample in samples if sample.in_zero_variance_group), key=lambda sample: 0.0)
            yield Alarm(
                "variance",
                f"in {share:.0%} of the groups all rewards are equal: compared within a group they teach nothing",
                ids,
            )

    def _reward(self, reward: float, spread: float, samples: Sequence[SeenSample]) -> Iterator[Alarm]:
        """The mean reward is far from that of the steps before: a broken reward, or a policy that has found a way around it."""
        if not isfinite(reward):
            return
        before = self._history["rewards"]
        self._history["rewards"] = [*before, (reward, spread)][-self._options.window :]
        if len(before) < self._options.window:
            return
        usual = fmean(mean for mean, _ in before)
        # Steps of equal rewards, as before the first successes of a sparse one, have no spread to measure a jump by, but for rounding.
        spreads = [std for _, std in before if std > NO_SPREAD]
        one = sqrt(fmean(std * std for std in spreads)) if spreads else max(spread, NO_SPREAD)
        jump = (reward - usual) / one
        if abs(jump) > self._options.reward_jump:
            ids = _first(samples, key=lambda sample: -sample.reward if jump > 0 else sample.reward)
            yield Alarm("reward", f"the mean reward jumped from {usual:.3g} to {reward:.3g}", ids)

    def _experts(self, metrics: Mapping[str, float]) -> Iterator[Alarm]:
        """Many experts of a layer get no token."""
        dead = {layer: share for layer, share in of_layers(metrics, "dead") if share > self._options.dead_experts}
        if dead:
            layers = ", ".join(f"{share:.0%} in {layer}" for layer, share in dead.items())
            yield Alarm("experts", f"experts without a single token: {layers}")

    def _collapse(self, metrics: Mapping[str, float]) -> Iterator[Alarm]:
        """A layer's busiest expert gets much more than the mean, and much more than in the first steps."""
        before, risen = self._history.setdefault("busiest", {}), []
        for layer, load in of_layers(metrics, "max_over_mean"):
            first = before.setdefault(layer, [])
            if len(first) < self._options.window:
                first.append(load)
            elif load >= self._options.busiest_expert and load > RISE * fmean(first):
                risen.append(f"{load:.1f} times the mean in {layer} ({fmean(first):.1f} in the first steps)")
        if risen:
            message = f"the router collapses: its busiest expert gets {', '.join(risen)}; learner.balance.expert evens the load"
            yield Alarm("collapse", message)

    def _refill(self, metrics: Mapping[str, float]) -> Iterator[Alarm]:
        """Groups without variance could not all be replaced."""
        if (full := metrics.get("refill/with_variance", 1.0)) < 1:
            yield Alarm(
                "refill",
                f"in {1 - full:.0%} of the groups all rewards are still equal when grpo.refill_rounds, or the data, are used up: the step trains on "
                "what there is",
            )

    def _idle(self, metrics: Mapping[str, float]) -> Iterator[Alarm]:
        """For `window` steps nothing has been trained on."""
        steps = self._history.get("idle", 0) + 1 if metrics.get("trained_on") == 0 else 0
        self._history["idle"] = steps
        if steps >= self._options.window:
            yield Alarm(
                "idle",
                f"nothing was trained on in {steps} steps: completions that are cut off (grpo.train_on_truncated: false; sampling.max_new_tokens) "
                "and groups of equal rewards (grpo.drop_zero_variance_groups) are left out",
            )


def of_layers(metrics: Mapping[str, float], measure: str) -> Iterator[tuple[str, float]]:
    """A measure of the experts' load in each layer: ("layer_3", value)."""
    for name, value in metrics.items():
        if name.startswith("experts/layer_") and name.endswith(f"/{measure}"):
            yield name.split("/")[1], value


def stop_at(alarms: Iterable[Alarm], options: AlarmOptions, run: Path | str = "RUN") -> None:
    """Raise AlarmError for the first alarm that is to end the run in the directory `run`."""
    for alarm in alarms:
        if alarm.kind in options.stop:
            raise AlarmError(
                f"{alarm.message} (alarms.stop names {alarm.kind}; `align resume {run} alarms.stop=[]` goes on)"
            )


def habit_alarms(found: Comparison, options: AlarmOptions) -> Iterator[tuple[str, Alarm]]:
    """The habits that nobody asked for and nearly no answer had at the start, and a length that is another: what each is called, and its alarm."""
    ratio = (1 + found.length.after) / (1 + found.length.before)
    if found.length.changed and max(ratio, 1 / ratio) >= options.length_ratio:
        yield "length", Alarm("length", found.length.sentence)
    for habit in found.habits:
        shares = (habit.before, habit.after) if habit.taken_up else (1 - habit.before, 1 - habit.after)
        if not habit.only_asked and shares[1] >= options.habit_share and shares[0] <= shares[1] / 3:
            yield " ".join((*habit.feature, habit.domain)), Alarm("habit", habit.sentence, habit.examples)


class HabitGuard:
    """Compares the answers of the last steps with those of the first (see `StepWindows`), and says which habit reached its share.

    Each is told once; `told`, what they are called, is kept up to date for whoever goes on.
    """

    def __init__(self, options: AlarmOptions, samples: Callable[[int], Found], warn: Warn, told: list[str]):
        self._options, self._samples, self._warn, self._told = options, samples, warn, told
        self._windows, self._seen = StepWindows(), 0

    def observe(self, step: int) -> None:
        """Take a step, counted from 1; after an interruption those before it too."""
        for seen in range(self._seen + 1, step + 1):
            if not self._windows.can_skip(step - seen + 1):
                self._windows.add(self._samples(seen))
        self._seen = step
        if (now := self._windows.now) is None or (start := self._windows.start) is None:
            return
        found = list(habit_alarms(compare(start, now), self._options))
        for name, alarm in found:
            if name not in self._told:
                self._told.append(name)
                self._warn(f"GRPO step {step}: {alarm.message}", alarm=alarm.kind, examples=list(alarm.samples))
        stop_at((alarm for _, alarm in found), self._options)


def no_history() -> History:
    """That of a run that has made no step yet."""
    return {"entropies": [], "rewards": [], "on": []}


def _first(samples: Iterable[SeenSample], key: Callable[[SeenSample], float]) -> list[str]:
    return [sample.id for sample in sorted(samples, key=key)[:KEPT]]


class OverOptimisationGuard:
    """The alarm for a policy that learns to please its reward model (Gao et al. 2022, arXiv 2210.10760).

    Compares the last `window` steps with as many before them.

    It says so when the learned reward went up and the trusted one down, each by more than two standard errors, and then
    starts anew. Answers to one prompt are alike, so that prompts are what is counted: `steps` has their mean rewards, of the steps that it
    compares, and is kept up to date for whoever goes on.
    """

    def __init__(self, options: GuardOptions, steps: list[tuple[list[float], list[float]]]):
        self._options, self._steps = options, steps

    def observe(self, groups: Sequence[ScoredGroup]) -> str | None:
        """Take the rewards of a step; an alarm where the two rewards have parted."""
        learned, trusted = self._options.learned, self._options.trusted
        judged = []
        for group in groups:
            components = [answer.reward.components for answer in group.trajectories]
            pairs = [(c[learned].value, c[trusted].value) for c in components if {learned, trusted} <= c.keys()]
            if pairs := [pair for pair in pairs if all(map(isfinite, pair))]:
                judged.append([fmean(values) for values in zip(*pairs, strict=True)])
        self._steps.append(([of_learned for of_learned, _ in judged], [of_trusted for _, of_trusted in judged]))
        del self._steps[: -2 * self._options.window]
        if len(self._steps) < 2 * self._options.window:
            return None
        up, down = (self._change(place) for place in (0, 1))
        if up <= SURE or down >= -SURE:
            return None
        self._steps.clear()
        return (
            f"over {self._options.window} steps the learned reward {learned!r} rose while {trusted!r} fell "
            f"({up:+.1f} and {down:+.1f} standard errors): the policy may be exploiting the reward model"
        )

    def _change(self, place: int) -> float:
        """The later half's mean less the earlier's, in standard errors; 0 where it cannot be told."""
        steps = [step[place] for step in self._steps]
        half = self._options.window
        before, after = ([value for step in part for value in step] for part in (steps[:half], steps[half:]))
        if min(len(before), len(after)) < 2:
            return 0.0
        error = sqrt(variance(before) / len(before) + variance(after) / len(after))
        return (fmean(after) - fmean(before)) / error if error else 0.0
