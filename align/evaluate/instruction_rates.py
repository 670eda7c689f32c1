"""What the answers to checkable instructions have in common: accuracy by kind, and how many are no answers at all."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from align.data.types import Example
from reward import Sample, UnusableAnswer
from reward.instructions import judge
from rollout import FinishReason


def instruction_rates(answers: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> dict[str, float]:
    """Shares, of greedy `answers` (rows of an evaluation) to those `examples` that have checkable instructions.

    `accuracy/seen_kinds` and `accuracy/unseen_kinds`: right answers, to requests of kinds that are trained on alone, and of
    others. `accuracy/kind/KIND`: instructions of the kind that are met by an answer that is none of the degenerate ones, of
    which `degenerate_share` is the share. Left out are examples whose instructions nobody can judge; empty where no example has any.
    """
    asked = {e.id: e for e in examples if {"instructions", "instruction_id_list"} & e.metadata.keys()}
    counts: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        if (example := asked.get(answer["id"])) is None:
            continue
        cut_off = answer["finish_reason"] == FinishReason.LENGTH
        sample = Sample(
            id=example.id,
            prompt=example.prompt_text,
            completion=answer["completion"],
            ground_truth=None,
            domain=example.domain,
            truncated=cut_off,
            metadata=example.metadata,
        )
        try:
            found = judge(sample)
        except UnusableAnswer:
            continue
        of = "unseen_kinds" if example.metadata.get("unseen") else "seen_kinds"
        counts[f"accuracy/{of}"].append(found.passes and not cut_off)
        counts["degenerate_share"].append(bool(found.degenerate))
        for kind, met in zip(found.kinds, found.met, strict=True):
            counts[f"accuracy/kind/{kind.partition(':')[2]}"].append(met and not found.degenerate)
    first = ["degenerate_share", "accuracy/seen_kinds", "accuracy/unseen_kinds"]
    return {name: fmean(counts[name]) for name in [*first, *sorted(counts.keys() - set(first))] if counts[name]}
