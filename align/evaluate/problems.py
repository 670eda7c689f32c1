"""Held-out problems answered by the policy: greedy pass@1 and sampled pass@k."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

from align.data.chat import decode_completion, encode_prompt
from align.data.types import Example
from align.errors import UserError
from reward import Mixture, Sample, SampleReward, Verdict
from rollout import Completion, FinishReason, Fleet, Group, Prompt, SamplingOptions


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result on a set of problems.

    `accuracy` is greedy pass@1; `pass_at` maps k to the share of problems that k samples solve (empty without samples).
    `rows` has every completion with its reward and verdict.
    """

    problems: int
    accuracy: float
    mean_length: float
    truncated: float
    pass_at: Mapping[int, float] = field(default_factory=dict)
    verdicts: Mapping[str, int] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()

    def summary(self) -> dict[str, float]:
        """The numbers as metrics."""
        numbers = {"accuracy": self.accuracy, "mean_length": self.mean_length, "truncated": self.truncated}
        return numbers | {f"pass@{k}": value for k, value in self.pass_at.items()}


def evaluate(
    fleet: Fleet,
    tokenizer: Any,
    examples: Sequence[Example],
    mixture: Mixture,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> Evaluation:
    """Answer every example greedily, and `samples` times at temperature 1, and score the answers.

    An answer is right when the verdict of the mixture's first reward is PASS.
    """
    prompts = encode_prompts(tokenizer, examples)
    by_id = {example.id: example for example in examples}
    greedy = SamplingOptions(temperature=0.0, max_new_tokens=max_new_tokens)
    scored = score_groups(fleet.generate(prompts, 1, greedy, seed=seed, step=0), by_id, tokenizer, mixture)
    rows = [row(by_id[c.prompt_id], c, text, reward, greedy=True) for c, text, reward in scored]
    right = sum(reward.verdict is Verdict.PASS for _, _, reward in scored)
    pass_at: dict[int, float] = {}
    if samples:
        drawing = SamplingOptions(temperature=1.0, max_new_tokens=max_new_tokens)
        drawn = score_groups(fleet.generate(prompts, samples, drawing, seed=seed, step=0), by_id, tokenizer, mixture)
        rows += [row(by_id[c.prompt_id], c, text, reward, greedy=False) for c, text, reward in drawn]
        solved = Counter(c.prompt_id for c, _, reward in drawn if reward.verdict is Verdict.PASS)
        pass_at = {
            k: sum(pass_at_k(samples, solved[example.id], k) for example in examples) / len(examples)
            for k in sorted({1, samples})
        }
    return Evaluation(
        problems=len(examples),
        accuracy=right / len(examples),
        mean_length=sum(len(c.token_ids) for c, _, _ in scored) / len(scored),
        truncated=sum(c.finish_reason is FinishReason.LENGTH for c, _, _ in scored) / len(scored),
        pass_at=pass_at,
        verdicts=Counter(str(reward.verdict) for _, _, reward in scored),
        rows=rows,
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1).
    """
    return 1.0 - comb(n - c, k) / comb(n, k)


def encode_prompts(tokenizer: Any, examples: Sequence[Example], longest: int | None = None) -> list[Prompt]:
    """The prompts as token ids. Raises UserError for one of more than `longest` tokens."""
    prompts = [Prompt(example.id, encode_prompt(tokenizer, example.messages)) for example in examples]
    for prompt in prompts:
        if longest is not None and len(prompt.token_ids) > longest:
            raise UserError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, but rollout.max_length leaves room for "
                f"{longest} before the completion; raise rollout.max_length, or leave the prompt out"
            )
    return prompts


def score_groups(
    groups: Any, by_id: Mapping[str, Example], tokenizer: Any, mixture: Mixture
) -> list[tuple[Completion, str, SampleReward]]:
    """Score groups as they arrive; the result is in the order of the examples and of the group's index."""
    scored = []
    for group in groups:
        scored += score_group(group, by_id[group.prompt.id], tokenizer, mixture)
    place = {id_: i for i, id_ in enumerate(by_id)}
    return sorted(scored, key=lambda item: (place[item[0].prompt_id], item[0].index))


def score_group(
    group: Group, example: Example, tokenizer: Any, mixture: Mixture
) -> list[tuple[Completion, str, SampleReward]]:
    """Every completion of a group with its text and reward."""
    texts = [decode_completion(tokenizer, completion.token_ids) for completion in group.completions]
    samples = [
        Sample(
            id=f"{example.id}#{completion.index}",
            prompt=example.prompt_text,
            completion=text,
            answer=example.answer,
            domain=example.domain,
            truncated=completion.finish_reason is FinishReason.LENGTH,
            metadata={**example.metadata, "completion_tokens": len(completion.token_ids)},
        )
        for completion, text in zip(group.completions, texts, strict=True)
    ]
    return list(zip(group.completions, texts, mixture.score(samples), strict=True))


def row(example: Example, completion: Completion, text: str, reward: SampleReward, *, greedy: bool) -> dict[str, Any]:
    """One completion as a row of a table: readable, and with all that is needed to score it again."""
    return {
        "id": example.id,
        "index": completion.index,
        "greedy": greedy,
        "prompt": example.prompt_text,
        "completion": text,
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
