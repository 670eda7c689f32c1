"""Verifiable instructions: accuracy on requests that ask for a form that a program can check (IFEval's is the task `ifeval`).

The requests are the test split of the data card `instructions`, and `reward.instructions` has the checkers. Accuracies are
those of Zhou et al. 2023 (arXiv:2311.07911, section 2.2): of whole prompts and of single instructions, strict and loose.
"""

from collections import defaultdict
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from align.errors import reward_errors
from align.evaluate.hooks import EvaluationError, Metrics, PolicyCheckpoint, refuse_no_room, register
from align.tasks.instructions import SIZES, generate
from reward import Sample
from reward.instructions import check, checkers
from rollout import Fleet


def ready(max_new_tokens: int = 512, max_length: int | None = None) -> None:
    """Raise UserError where the package with IFEval's checkers is not installed, EvaluationError where answers leave no room for a prompt."""
    refuse_no_room(max_new_tokens, max_length)
    with reward_errors():
        checkers()


@register("instructions", ready=ready)
def instructions(
    checkpoint: PolicyCheckpoint,
    fleet: Fleet,
    *,
    count: Annotated[int, Field(ge=1, le=SIZES["test"])] = 200,
    max_new_tokens: Annotated[int, Field(ge=1)] = 512,
    seed: int = 0,
) -> Metrics:
    """Strict and loose accuracy on `count` requests that ask for a checkable form, by prompt and by instruction.

    The answers are greedy. Which requests are asked depends on the seed alone. `degenerate_share` is the share of answers that
    have a form and nothing to say (see `reward.prose.degenerate`); the accuracies are IFEval's, which do not look at that.
    """
    examples = generate("test", seed=seed)[:count]
    conversations = {example.id: example.messages for example in examples}
    responses = checkpoint.ask(fleet, conversations, max_new_tokens=max_new_tokens, seed=seed)
    if not any(response.tokens for response in responses.values()):
        raise EvaluationError(
            f"none of {count} requests leaves room for {max_new_tokens} new tokens in rollout.max_length, {checkpoint.max_length}: lower "
            "max_new_tokens, or raise that"
        )
    scores: dict[str, list[bool]] = defaultdict(list)
    rows: list[dict[str, Any]] = []
    for example in examples:
        response = responses[example.id]
        sample = Sample(example.id, example.prompt_text, response.text, None, example.domain, metadata=example.metadata)
        strict, loose = check(sample), check(sample, loose=True)
        for name, found in (("strict", strict), ("loose", loose)):
            scores[f"prompt_{name}"].append(all(found.met))
            scores[f"instruction_{name}"] += found.met
        scores["degenerate_share"].append(bool(strict.degenerate))
        for kind, met in zip(loose.kinds, loose.met, strict=True):
            scores[f"instruction_loose/{kind.partition(':')[2]}"].append(met)
        rows.append(
            {
                "id": example.id,
                "prompt": example.prompt_text,
                "completion": response.text,
                "truncated": response.truncated,
                "instructions": list(strict.kinds),
                "strict": list(strict.met),
                "loose": list(loose.met),
            }
        )
    return Metrics({name: fmean(values) for name, values in scores.items()}, rows=rows)
