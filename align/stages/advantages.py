"""From the scored groups of a step to what is trained on: group-relative advantages, and the sequences of each update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from align.experience import ScoredGroup, training_sequence
from align.learner.batch import TrainingSequence
from align.losses import ZERO_STD, completion_weights, group_advantages
from align.recipe import GrpoOptions


@dataclass(frozen=True, slots=True)
class Advantages:
    """How the G trajectories of each of P groups compare: tensors in the order of groups and index.

    `values` [P, G] float64 are the advantages; `valid` [P, G] is false where there is no reward, or a number that is not
    finite; `kept` [P, G] is true for what is trained on; `zero_variance` [P] is true where all rewards of a group are equal,
    and `zero_variance_groups` their share among the groups with two valid rewards (NaN without any). `non_finite` has, by
    the sample's id, which of its numbers is NaN or infinite.
    """

    values: torch.Tensor
    valid: torch.Tensor
    kept: torch.Tensor
    zero_variance: torch.Tensor
    zero_variance_groups: float
    non_finite: Mapping[str, str]


def compare(groups: Sequence[ScoredGroup], options: GrpoOptions) -> Advantages:
    """The advantages of groups of `options.group_size`, and which trajectories `options` lets be trained on."""
    answers = [list(group.trajectories) for group in groups]
    shape = len(groups), options.group_size
    numbers = {
        "log-probability": torch.tensor([[a.trajectory.is_finite for a in row] for row in answers]),
        "reward": torch.tensor([[a.reward.value is None or isfinite(a.reward.value) for a in row] for row in answers]),
    }
    has_reward = torch.tensor([[a.reward.value is not None for a in row] for row in answers])
    valid = has_reward & numbers["log-probability"] & numbers["reward"]
    rewards = torch.tensor([[a.reward.value or 0.0 for a in row] for row in answers], dtype=torch.float64)
    group_of = torch.arange(shape[0]).repeat_interleave(shape[1])
    values, std = group_advantages(rewards.flatten(), group_of, valid.flatten(), scale=options.advantage_scale)
    values, zero_variance = values.reshape(shape), std <= ZERO_STD
    numbers["advantage"] = torch.isfinite(values)
    kept = valid & numbers["advantage"]
    if options.drop_zero_variance_groups:
        kept &= ~zero_variance[:, None]
    if not options.train_on_truncated:
        kept &= ~torch.tensor([[a.truncated for a in row] for row in answers])
    return Advantages(
        values=values,
        valid=valid,
        kept=kept,
        zero_variance=zero_variance,
        zero_variance_groups=float(zero_variance[valid.sum(dim=1) > 1].double().mean()),
        non_finite={
            answer.sample_id: next(name for name, finite in numbers.items() if not finite[p, g])
            for p, row in enumerate(answers)
            for g, answer in enumerate(row)
            if not all(finite[p, g] for finite in numbers.values())
        },
    )


def updates_of(
    groups: Sequence[ScoredGroup], advantages: Advantages, options: GrpoOptions
) -> list[list[TrainingSequence]]:
    """The kept trajectories as [update][place], the weights of each update adding up to the mean that `aggregation` names."""
    lengths = torch.tensor([[int(a.trajectory.sampled.sum()) for a in group.trajectories] for group in groups])
    per_update = len(groups) // options.updates_per_step
    updates = []
    for start in range(0, len(groups), per_update):
        part = slice(start, start + per_update)
        kept = advantages.kept[part]
        weights = completion_weights(lengths[part].flatten(), kept.flatten(), options.aggregation).reshape(kept.shape)
        updates.append(
            [
                training_sequence(
                    groups[start + p].trajectories[g].trajectory,
                    weight=float(weights[p, g]),
                    advantage=float(advantages.values[start + p, g]),
                    group=start + p,
                )
                for p, g in kept.nonzero().tolist()
            ]
        )
    return updates
