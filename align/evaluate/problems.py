"""Held-out problems answered by the policy: greedy pass@1 and sampled pass@k."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from statistics import fmean
from typing import Any

from align.data.chat import answer_text, encode_prompt
from align.data.types import Example
from align.errors import UserError, naming
from align.statistics import pass_at_k
from reward import Sample, SampleReward, ScoringPool, Ticket, Verdict
from rollout import Completion, FinishReason, Fleet, Group, Prompt, SamplingOptions


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion as text, and what it was found to be worth."""

    completion: Completion
    text: str
    reward: SampleReward

    @property
    def sample_id(self) -> str:
        return f"{self.completion.prompt_id}#{self.completion.index}"

    @property
    def right(self) -> bool:
        return self.reward.verdict is Verdict.PASS

    @property
    def judged(self) -> bool:
        return self.reward.verdict is not Verdict.INFRA_ERROR

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason is FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result on a set of problems.

    `accuracy` is greedy pass@1, `by_domain` the same for the problems of each domain; `pass_at` maps k to the share of
    problems that k samples solve (empty without samples). `rates` are what else was counted, such as refusals. `rows`
    has every completion with its reward and verdict. `too_long` problems have a prompt that left no room for an answer:
    they are among the others, as not solved.
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
        numbers = {"accuracy": self.accuracy, "mean_length": self.mean_length, "truncated": self.truncated}
        if len(self.by_domain) > 1:
            numbers |= {f"accuracy/{domain}": value for domain, value in self.by_domain.items()}
        return numbers | {f"pass@{k}": value for k, value in self.pass_at.items()} | dict(self.rates)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], domains: Iterable[str]) -> "Evaluation":
        """The evaluation whose `summary`, `problems` and `verdicts` are in `record`, of problems of these domains; no rows."""
        by_domain = {name: record[key] for name in domains if (key := f"accuracy/{name}") in record}
        pass_at = {int(key.removeprefix("pass@")): value for key, value in record.items() if key.startswith("pass@")}
        known = {
            "stage",
            "step",
            "name",
            "problems",
            "accuracy",
            "mean_length",
            "truncated",
            "verdicts",
            "too_long",
            "split",
        }
        known |= {f"accuracy/{name}" for name in by_domain} | {f"pass@{k}" for k in pass_at}
        return cls(
            problems=record["problems"],
            accuracy=float(record["accuracy"]),
            mean_length=float(record["mean_length"]),
            truncated=float(record["truncated"]),
            by_domain=by_domain,
            pass_at=pass_at,
            verdicts=record["verdicts"],
            rates={key: value for key, value in record.items() if key not in known},
            too_long=record.get("too_long", 0),
        )


def evaluate(
    fleet: Fleet,
    tokenizer: Any,
    examples: Sequence[Example],
    judges: ScoringPool,
    *,
    samples: int,
    max_new_tokens: int,
    longest: int,
    seed: int,
) -> Evaluation:
    """Answer every example greedily, and `samples` times at temperature 1, and score the answers.

    An answer is right when the verdict of the first reward of its domain is PASS. An example whose prompt has more than
    `longest` tokens is not asked: its answers are empty ones, which are not right.
    """
    by_id = {example.id: example for example in examples}
    prompts = encode_prompts(tokenizer, examples)
    asked = short_prompts(prompts, longest)
    too_long = [prompt for prompt in prompts if len(prompt.token_ids) > longest]
    asked_by_id = {prompt.id: by_id[prompt.id] for prompt in asked}

    def answers(count: int, temperature: float) -> list[Answer]:
        sampling = SamplingOptions(temperature=temperature, max_new_tokens=max_new_tokens)
        groups = fleet.generate(asked, count, sampling, seed=seed, step=0)
        found = gather_answers(submit_groups(groups, asked_by_id, tokenizer, judges), asked_by_id, judges)
        return found + [not_asked(prompt, index, fleet.weight_version) for prompt in too_long for index in range(count)]

    return summarise(by_id, answers(1, 0.0), answers(samples, 1.0) if samples else [])


def not_asked(prompt: Prompt, index: int, weight_version: int) -> Answer:
    """The answer to a prompt that is too long: an empty one."""
    completion = Completion(prompt.id, index, prompt.token_ids, [], [], FinishReason.LENGTH, 0, weight_version)
    return Answer(completion, "", SampleReward(0.0, Verdict.NO_ANSWER, {}))


def summarise(by_id: Mapping[str, Example], greedy: Sequence[Answer], drawn: Sequence[Answer]) -> Evaluation:
    """What came of a greedy answer to each example and of equally many sampled ones, or none.

    An answer that nobody could judge counts as neither right nor wrong. Of k samples, only problems with k judged ones tell.
    """
    judged = [answer for answer in greedy if answer.judged]
    asked = [answer for answer in greedy if answer.completion.token_ids]
    counts: dict[str, list[bool]] = {id_: [] for id_ in by_id}
    for answer in drawn:
        if answer.judged:
            counts[answer.completion.prompt_id].append(answer.right)
    samples = len(drawn) // len(by_id)
    return Evaluation(
        problems=len(by_id),
        accuracy=mean_of([answer.right for answer in judged]),
        mean_length=mean_of([len(answer.completion.token_ids) for answer in asked]),
        truncated=mean_of([answer.truncated for answer in asked]),
        by_domain={
            domain: mean_of([a.right for a in judged if by_id[a.completion.prompt_id].domain == domain])
            for domain in dict.fromkeys(example.domain for example in by_id.values())
        },
        pass_at={
            k: mean_of([pass_at_k(len(right), sum(right), k) for right in counts.values() if len(right) >= k])
            for k in sorted({1, samples})
            if samples
        },
        verdicts=Counter(str(answer.reward.verdict) for answer in greedy),
        rows=[
            row(by_id[answer.completion.prompt_id], answer, greedy=place < len(greedy))
            for place, answer in enumerate([*greedy, *drawn])
        ],
        too_long=len(greedy) - len(asked),
    )


def mean_of(values: Sequence[float]) -> float:
    """The mean; nan where there is nothing to take it of."""
    return fmean(values) if values else nan


def encode_prompts(tokenizer: Any, examples: Sequence[Example]) -> list[Prompt]:
    """The prompts as token ids. Raises UserError for one that the chat template refuses."""
    prompts = []
    for example in examples:
        with naming(f"prompt {example.id!r}"):
            prompts.append(Prompt(example.id, encode_prompt(tokenizer, example.messages)))
    return prompts


def short_prompts(prompts: Sequence[Prompt], longest: int) -> list[Prompt]:
    """Those of at most `longest` tokens. Raises UserError where none is."""
    short = [prompt for prompt in prompts if len(prompt.token_ids) <= longest]
    if prompts and not short:
        least = min(prompts, key=lambda prompt: len(prompt.token_ids))
        raise UserError(
            f"every prompt is too long: even prompt {least.id!r} has {len(least.token_ids)} tokens, but rollout.max_length leaves room "
            f"for {longest} before the completion; raise rollout.max_length"
        )
    return short


def submit_groups(
    groups: Iterable[Group], by_id: Mapping[str, Example], tokenizer: Any, judges: ScoringPool
) -> list[tuple[Group, list[str], Ticket]]:
    """Each group with its texts, handed to the judges as soon as it is complete, while others are being sampled."""
    submitted = []
    for group in groups:
        example = by_id[group.prompt.id]
        texts = [answer_text(tokenizer, example.messages, c.token_ids) for c in group.completions]
        samples = [sample(example, completion, text) for completion, text in zip(group.completions, texts, strict=True)]
        submitted.append((group, texts, judges.submit(samples)))
    return submitted


def gather_answers(
    submitted: Sequence[tuple[Group, list[str], Ticket]], by_id: Mapping[str, Example], judges: ScoringPool
) -> list[Answer]:
    """The answers of all groups, in the order of the examples and of the group's index."""
    rewards = judges.gather([ticket for _, _, ticket in submitted])
    answers = {
        group.prompt.id: [Answer(*parts) for parts in zip(group.completions, texts, scored, strict=True)]
        for (group, texts, _), scored in zip(submitted, rewards, strict=True)
    }
    return [answer for id_ in by_id for answer in answers[id_]]


def sample(example: Example, completion: Completion, text: str) -> Sample:
    """A completion as the rewards see it."""
    return Sample(
        id=f"{example.id}#{completion.index}",
        prompt=example.prompt_text,
        completion=text,
        answer=example.answer,
        domain=example.domain,
        truncated=completion.finish_reason is FinishReason.LENGTH,
        metadata={
            **example.metadata,
            "messages": list(example.messages),
            "completion_tokens": len(completion.token_ids),
        },
    )


def row(example: Example, answer: Answer, *, greedy: bool) -> dict[str, Any]:
    """An answer as a row of a table: readable, and with all that is needed to score it again."""
    completion, reward = answer.completion, answer.reward
    return {
        "id": example.id,
        "domain": example.domain,
        "index": completion.index,
        "greedy": greedy,
        "prompt": example.prompt_text,
        "completion": answer.text,
        "answer": example.answer,
        "reward": reward.value,
        "verdict": str(reward.verdict),
        "components": {name: score.value for name, score in reward.components.items()},
        "detail": "; ".join(score.detail for score in reward.components.values() if score.detail),
        "finish_reason": str(completion.finish_reason),
        "tokens": len(completion.token_ids),
        "weight_version": completion.weight_version,
        "seed": completion.seed,
    }
