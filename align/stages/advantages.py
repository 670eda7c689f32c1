"""From the scored groups of a step to what is trained on: group-relative advantages, and the sequences of each update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from align.experience import ScoredGroup, ScoredTrajectory, training_sequence
from align.learner.batch import TrainingSequence
from align.losses import ZERO_STD, completion_weights, group_advantages
from align.recipe import GrpoOptions
from reward import Verdict

GATE_TOKENS = 256
"""So many tokens of an update are compared with the sampler at least, where there are as many, however little teaches something."""


@dataclass(frozen=True, slots=True)
class Advantages:
    """How the G trajectories of each of P groups compare: tensors in the order of groups and index.

    `values` [P, G] float64 are the advantages; `valid` [P, G] is false where there is no reward, or a number that is not
    finite; `kept` [P, G] is true for what is trained on, `computed` [P, G] for what of it the learner computes: all, or without what teaches
    nothing (`skip_zero_gradient`); `zero_variance` [P] is true where all rewards of a group are equal,
    and `zero_variance_groups` their share among the groups with two valid rewards (NaN without any). `non_finite` has, by
    the sample's id, which of its numbers is NaN or infinite.
    """

    values: torch.Tensor
    valid: torch.Tensor
    kept: torch.Tensor
    computed: torch.Tensor
    zero_variance: torch.Tensor
    zero_variance_groups: float
    non_finite: Mapping[str, str]


def compare(groups: Sequence[ScoredGroup], options: GrpoOptions) -> Advantages:
    """The advantages of groups of `options.group_size`, and which trajectories `options` lets be trained on.

    Groups after the first `options.prompts_per_step` were replaced by some of these: they are compared with nothing and not trained on.
    """
    answers = [list(group.trajectories) for group in groups]
    shape = len(groups), options.group_size
    numbers = {
        "log-probability": torch.tensor([[a.trajectory.is_finite for a in row] for row in answers]),
        "reward": torch.tensor([[a.reward.value is None or isfinite(a.reward.value) for a in row] for row in answers]),
    }
    # Where there are no rewards at all, as in distillation alone, none is missing.
    judged = [[a.reward.value is not None or a.reward.verdict is Verdict.UNSCORED for a in row] for row in answers]
    valid = torch.tensor(judged) & numbers["log-probability"] & numbers["reward"]
    rewards = torch.tensor([[a.reward.value or 0.0 for a in row] for row in answers], dtype=torch.float64)
    group_of = torch.arange(shape[0]).repeat_interleave(shape[1])
    in_step = valid & (torch.arange(shape[0]) < options.prompts_per_step)[:, None]
    values, std = group_advantages(
        rewards.flatten(), group_of, in_step.flatten(), scale=options.advantage_scale, baseline=options.baseline
    )
    values, zero_variance = values.reshape(shape), std <= ZERO_STD
    numbers["advantage"] = torch.isfinite(values)
    kept = in_step & numbers["advantage"]
    if options.drop_zero_variance_groups:
        kept &= ~zero_variance[:, None]
    if not options.train_on_truncated:
        kept &= ~torch.tensor([[a.truncated for a in row] for row in answers])
    return Advantages(
        values=values,
        valid=valid,
        kept=kept,
        computed=without_zero_gradients(answers, kept, values, options) if options.skip_zero_gradient else kept,
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
    groups: Sequence[ScoredGroup], advantages: Advantages, options: GrpoOptions, longest: int
) -> list[list[TrainingSequence]]:
    """What the learner computes, as [update][place]; the weights of all that is kept in an update add up to the mean that `aggregation` names.

    `longest` is the number of tokens that a completion may have.
    """
    lengths = sampled_tokens([group.trajectories for group in groups])
    updates = []
    for part in parts_of(options):
        kept, start = advantages.kept[part], part.start
        weights = completion_weights(lengths[part].flatten(), kept.flatten(), options.aggregation, longest)
        weights = weights.reshape(kept.shape)
        updates.append(
            [
                training_sequence(
                    groups[start + p].trajectories[g].trajectory,
                    weight=float(weights[p, g]),
                    advantage=float(advantages.values[start + p, g]),
                    group=start + p,
                )
                for p, g in advantages.computed[part].nonzero().tolist()
            ]
        )
    return updates


def parts_of(options: GrpoOptions) -> list[slice]:
    """Which of the step's groups each of its updates is made of."""
    count = options.prompts_per_step // options.updates_per_step
    return [slice(start, start + count) for start in range(0, options.prompts_per_step, count)]


def sampled_tokens(answers: Sequence[Sequence[ScoredTrajectory]]) -> torch.Tensor:
    """How many tokens the policy drew of each trajectory, [P, G]."""
    return torch.tensor([[int(answer.trajectory.sampled.sum()) for answer in row] for row in answers])


def without_zero_gradients(
    answers: Sequence[Sequence[ScoredTrajectory]], kept: torch.Tensor, values: torch.Tensor, options: GrpoOptions
) -> torch.Tensor:
    """What has an advantage of what is kept, [P, G] bool; in each update also the first without, until the gate has GATE_TOKENS to compare.

    So there is something to compute in each update in which something is kept, and the optimizer makes the step that it would make.
    """
    lengths, computed = sampled_tokens(answers), kept & (values != 0)
    for part in parts_of(options):
        tokens = int(lengths[part][computed[part]].sum())
        for p, g in (kept[part] & (values[part] == 0)).nonzero().tolist():
            if tokens >= GATE_TOKENS:
                break
            computed[part.start + p, g] = True
            tokens += int(lengths[part.start + p, g])
    return computed
