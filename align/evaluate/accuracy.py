"""Held-out problems answered by the policy: greedy pass@1 and sampled pass@k."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import nan
from statistics import fmean
from typing import Any

from align.errors import UserError
from align.experience import UNSCORED, Problem, ScoredGroup, ScoredTrajectory, gather, row_of, submit
from align.statistics import pass_at_k
from reward import SampleReward, ScoringPool, Verdict
from rollout import FinishReason, Fleet, SamplingOptions, Trajectory


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result on a set of problems.

    `accuracy` is greedy pass@1, `by_domain` the same for the problems of each domain; `pass_at` maps k to the share of
    problems that k samples solve (empty without samples). `rates` are what else was counted, such as refusals. `rows`
    has every completion with its reward and verdict. `too_long` problems have a prompt that left no room for an answer:
    they are among the others, as not solved. Without rewards nothing is scored: `accuracy` is NaN, and the answers are there to be read.
    """

    problems: int
    accuracy: float
    mean_length: float
    truncated: float
    by_domain: Mapping[str, float] = field(default_factory=dict)
    pass_at: Mapping[int, float] = field(default_factory=dict)
    verdicts: Mapping[str, int] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    too_long: int = 0

    def summary(self) -> dict[str, float]:
        """The numbers as metrics."""
        numbers = {"mean_length": self.mean_length, "truncated": self.truncated}
        if self.scored:
            numbers = {"accuracy": self.accuracy} | numbers
        if len(self.by_domain) > 1:
            numbers |= {f"accuracy/{domain}": value for domain, value in self.by_domain.items()}
        return numbers | {f"pass@{k}": value for k, value in self.pass_at.items()} | dict(self.rates)

    @property
    def scored(self) -> bool:
        """Whether there were rewards to score the answers by."""
        return Verdict.UNSCORED not in self.verdicts

    @property
    def judged(self) -> int:
        """How many problems `accuracy` is over: those whose answer could be judged."""
        return self.problems - self.verdicts.get(Verdict.INFRA_ERROR, 0)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], domains: Iterable[str]) -> "Evaluation":
        """The evaluation whose `summary`, `problems` and `verdicts` are in `record`, of problems of these domains; no rows."""
        rest = {key: value for key, value in record.items() if key not in ("stage", "step", "name", "split")}
        rest |= {key: float(value) for key, value in rest.items() if isinstance(value, str)}  # "nan"
        by_domain = {name: rest.pop(key) for name in domains if (key := f"accuracy/{name}") in rest}
        pass_at = {int(key.removeprefix("pass@")): rest.pop(key) for key in [*rest] if key.startswith("pass@")}
        own = {each.name: rest.pop(each.name) for each in fields(cls) if each.name in rest}
        return cls(**({"accuracy": nan} | own), by_domain=by_domain, pass_at=pass_at, rates=rest)


def evaluate(
    fleet: Fleet,
    tokenizer: Any,
    problems: Sequence[Problem],
    pool: ScoringPool | None,
    *,
    samples: int,
    max_new_tokens: int,
    longest: int,
    seed: int,
    temperature: float = 1.0,
) -> Evaluation:
    """Answer every problem greedily, and `samples` times at a temperature, and score the answers where there is a pool.

    An answer is right when the verdict of the first reward of its domain is PASS. A problem whose prompt has more than
    `longest` tokens is not asked: its answers are empty ones, which are not right.
    """
    asked = [problem for problem in problems if len(problem.prompt.token_ids) <= longest]

    def groups(count: int, temperature: float) -> list[ScoredGroup]:
        sampling = SamplingOptions(temperature=temperature, max_new_tokens=max_new_tokens)
        drawn = fleet.sample([problem.prompt for problem in asked], count, sampling, seed=seed, step=0)
        scored = {id(g.problem): g for g in gather(submit(drawn, asked, tokenizer, pool), asked, pool, alone=True)}
        nothing = SampleReward(0.0, Verdict.NO_ANSWER, {}) if pool else UNSCORED
        return [scored.get(id(p)) or unanswered(p, count, fleet.weight_version, nothing) for p in problems]

    return summarise(groups(1, 0.0), groups(samples, temperature) if samples else [])


def unanswered(problem: Problem, count: int, weight_version: int, reward: SampleReward) -> ScoredGroup:
    """The group of a problem that was not asked: empty answers with this reward."""
    empty = [
        Trajectory.of_one_turn(problem.prompt, index, [], [], FinishReason.LENGTH, weight_version=weight_version)
        for index in range(count)
    ]
    return ScoredGroup(problem, [ScoredTrajectory(trajectory, "", reward) for trajectory in empty])


def summarise(greedy: Sequence[ScoredGroup], sampled: Sequence[ScoredGroup]) -> Evaluation:
    """The evaluation of one greedy answer to each problem, and of equally many sampled ones, or none.

    An answer that could not be scored counts as neither right nor wrong. pass@k is over the problems with k scored samples.
    """
    answers = [(group.problem.example, group.trajectories[0]) for group in greedy]
    asked = [answer for _, answer in answers if answer.trajectory.token_ids]
    right = [(example.domain, answer.right) for example, answer in answers if answer.scored]
    samples = len(sampled[0].trajectories) if sampled else 0
    counts = [[answer.right for answer in group.trajectories if answer.scored] for group in sampled]
    return Evaluation(
        problems=len(greedy),
        accuracy=mean_of([found for _, found in right]),
        mean_length=mean_of([len(answer.trajectory.token_ids) for answer in asked]),
        truncated=mean_of([answer.truncated for answer in asked]),
        by_domain={
            domain: mean_of([found for its_domain, found in right if its_domain == domain])
            for domain in (dict.fromkeys(example.domain for example, _ in answers) if right else ())
        },
        pass_at={
            k: mean_of([pass_at_k(len(found), sum(found), k) for found in counts if len(found) >= k])
            for k in sorted({1, samples})
            if samples
        },
        verdicts=Counter(str(answer.reward.verdict) for _, answer in answers),
        rows=[
            row_of(group.problem.example, answer) | {"greedy": groups is greedy}
            for groups in (greedy, sampled)
            for group in groups
            for answer in group.trajectories
        ],
        too_long=len(greedy) - len(asked),
    )


def mean_of(values: Sequence[float]) -> float:
    """The mean; NaN where there is nothing to take it of."""
    return fmean(values) if values else nan


def short_problems(problems: Sequence[Problem], longest: int, option: str = "rollout.max_length") -> list[Problem]:
    """Those with a prompt of at most `longest` tokens, which `option` leaves. Raises UserError where none has."""
    short = [problem for problem in problems if len(problem.prompt.token_ids) <= longest]
    if problems and not short:
        least = min((problem.prompt for problem in problems), key=lambda prompt: len(prompt.token_ids))
        raise UserError(
            f"every prompt is too long: even prompt {least.id!r} has {len(least.token_ids)} tokens, but {option} leaves room "
            f"for {longest} before the completion; raise {option}"
        )
    return short
