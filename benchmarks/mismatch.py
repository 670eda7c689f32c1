"""Table 1 of `replay_tables.py`: how far a learner is from the sampler whose completions it judges, some updates later, under each remedy.

A sampler draws the completions of a step twice. On the second the learner makes the four updates of a GRPO step; of the first its
log-probabilities are compared with the sampler's before any update, after one and after four. So the updates are of other completions than
those that are judged, as they are where a sampler is some updates behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from align.data.cards import load_card
from align.data.loader import load_split
from align.experience import Problem, encode_problems, gather, submit, training_sequence
from align.learner.batch import Batch, TrainingSequence, collate, experts_of, sampled_values
from align.learner.objective import LogProbs, Objective, loss_and_sums
from align.learner.routing import RoutingReplay, routing_metrics
from align.losses import LossOptions, agreement, correction_weights
from align.losses.options import CorrectionOptions
from align.model.names import frozen_names, layout_of, to_checkpoint
from align.model.policy import load_policy, load_tokenizer, stop_token_ids
from align.model.rounding import rounded
from align.recipe import GrpoOptions, ModelOptions, ScoringOptions
from align.session.ray import local_ray
from align.session.session import scoring_pool
from align.stages.advantages import compare, updates_of
from reward import RewardTerm
from rollout import Fleet, FleetOptions, SamplingOptions, Trajectory, stored

UPDATES, JUDGED_AFTER, RATE = 4, (0, 1, 4), 5e-5
SAMPLERS = ("float32", "bfloat16", "int8 grid")
WAYS = {"none": "off", "R2": "learner", "R3": "sampler", "frozen router": "off"}
"""Whose experts the learner's tokens go through, in the updates and where it judges."""
CORRECTIONS = ("tis", "icepop", "sequence_mask", "geometric_mask")
REWARDS = [RewardTerm(name="exact_answer"), RewardTerm(name="answer_format", weight=0.1)]
SAMPLING = SamplingOptions(max_new_tokens=48)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a sampler drew: completions to be judged, and the sequences of each update."""

    judged: Sequence[TrainingSequence]
    updates: Sequence[Sequence[TrainingSequence]]


def measure(policy: ModelOptions, sampler: str, prompts: int, group_size: int) -> list[dict[str, Any]]:
    """A row for each of `WAYS` and `JUDGED_AFTER`, of `prompts` x `group_size` completions of one of `SAMPLERS`."""
    torch.set_num_threads(2)
    options = GrpoOptions(steps=1, prompts_per_step=prompts, group_size=group_size, updates_per_step=UPDATES)
    drawn = draw(policy, sampler, options)
    rows = []
    for way, replays in WAYS.items():
        learner = Learner(policy, replays, ["router"] if way == "frozen router" else [])
        judged, updates = learner.routed(drawn.judged), [learner.before_updates(part) for part in drawn.updates]
        for number in range(UPDATES + 1):
            # Before any update R2's experts and a frozen router are the learner's own.
            if number in JUDGED_AFTER and (number or way in ("none", "R3")):
                rows.append({"sampler": sampler, "updates": number, "way": way, **learner.judge(judged)})
            if number < UPDATES:
                learner.update(updates[number])
    return rows


def draw(policy: ModelOptions, sampler: str, options: GrpoOptions) -> Drawn:
    """Sample, with the experts of every token, and score what is updated on."""
    tokenizer = load_tokenizer(policy.path)
    count = options.prompts_per_step
    problems = encode_problems(tokenizer, load_split(load_card("nano_math"), "train", limit=2 * count).examples)
    with local_ray(), scoring_pool(REWARDS, ScoringOptions()) as pool, sampling(policy, sampler, tokenizer) as fleet:
        judged = sample(fleet, problems[:count], options.group_size)
        second = fleet.sample([p.prompt for p in problems[count:]], options.group_size, SAMPLING, seed=1, step=0)
        scored = gather(submit(second, problems[count:], tokenizer, pool), problems[count:], pool)
    advantages = compare(scored, options)
    updates = updates_of(scored, advantages, options, SAMPLING.max_new_tokens)
    return Drawn([training_sequence(trajectory, weight=1.0) for trajectory in judged], updates)


def sample(fleet: Fleet, problems: Sequence[Problem], group_size: int) -> list[Trajectory]:
    """The trajectories in the order of the problems."""
    groups = fleet.sample([problem.prompt for problem in problems], group_size, SAMPLING, seed=0, step=0)
    by_id = {group.prompt.id: group.trajectories for group in groups}
    return [trajectory for problem in problems for trajectory in by_id[problem.prompt.id]]


@contextmanager
def sampling(policy: ModelOptions, sampler: str, tokenizer: Any) -> Iterator[Fleet]:
    """A worker that computes in the sampler's dtype with the policy's weights, on the sampler's grid where it has one."""
    options = FleetOptions(
        workers=1,
        threads=2,
        max_length=128,
        kv_cache_gb=0.5,
        batch_sequences=256,
        record_experts=True,
        start_timeout_s=1800,
    )
    dtype = "bfloat16" if sampler == "bfloat16" else "float32"
    with closing(Fleet(policy.path, dtype, options, stop_token_ids(policy, tokenizer))) as fleet:
        fleet.wait_until_ready()
        if sampler == "int8 grid":
            model: Any = load_policy(policy)
            named = to_checkpoint(model.named_parameters(), layout_of(model.config.model_type))
            fleet.load(stored({name: tensor.detach().clone() for name, tensor in rounded(named, "int8")}), 1)
        yield fleet


class Learner:
    """A learner in float32 of a single rank, in this process, that replays experts in one of three ways."""

    def __init__(self, policy: ModelOptions, replays: str, frozen: Sequence[str]):
        self._module = LogProbs(load_policy(policy))
        self._routing, self._replays = RoutingReplay(self._module.policy), replays
        for name in frozen_names((name for name, _ in self._module.policy.named_parameters()), frozen):
            self._module.policy.get_parameter(name).requires_grad_(False)
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def routed(self, sequences: Sequence[TrainingSequence]) -> Sequence[TrainingSequence]:
        """The sequences with the experts that they are to go through: the sampler's, or the learner's own at this time."""
        if self._replays != "learner":
            return sequences
        batch = collate(sequences, 1)
        with torch.no_grad(), self._routing.recording() as passes:
            self._module(**batch.inputs, temperature=1.0)
        return [replace(s, experts=own) for s, own in zip(sequences, experts_of(batch, passes), strict=True)]

    def before_updates(self, sequences: Sequence[TrainingSequence]) -> list[TrainingSequence]:
        """The sequences of an update, routed, with the log-probabilities before a step's updates."""
        own = self.routed(sequences)
        values, batch, _ = self._values(own)
        return [replace(s, old_log_probs=one) for s, one in zip(own, sampled_values(values, batch), strict=True)]

    def update(self, sequences: Sequence[TrainingSequence]) -> None:
        """One update of the clipped surrogate."""
        batch = collate(sequences, 1)
        with self._routing.given(batch.routes, forced=self._replays != "off"):
            values, _ = self._module(**batch.inputs, temperature=1.0)
            loss, _ = loss_and_sums(values, None, None, batch, Objective(LossOptions()))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def judge(self, sequences: Sequence[TrainingSequence]) -> dict[str, Any]:
        """Mismatch with the sampler, the share of changed routes, and of each correction the share of tokens that it cuts or masks and the
        effective sample size that it leaves."""
        values, batch, changed = self._values(sequences)
        assert batch.sampler_log_probs is not None
        found = agreement(values, batch.sampler_log_probs, batch.mask)
        corrections = {}
        for kind in CORRECTIONS:
            weights, cut, masked = correction_weights(
                values, batch.sampler_log_probs, batch.mask, CorrectionOptions.model_validate({"kind": kind})
            )
            counted = weights[batch.mask].double()
            size = float(counted.sum() ** 2 / (len(counted) * counted.square().sum().clamp(min=1e-300)))
            corrections[kind] = [float((cut | masked)[batch.mask].double().mean()), size]
        numbers = {"mean": found.mean_abs, "max": found.max_abs, "k3": found.k3, "changed": changed}
        return {**numbers, "corrections": corrections}

    def _values(self, sequences: Sequence[TrainingSequence]) -> tuple[torch.Tensor, Batch, float]:
        """Log-probabilities [B, K] of the targets, the batch, and the share of routes that the routers would choose otherwise."""
        batch = collate(sequences, 1)
        self._routing.take()
        with torch.no_grad(), self._routing.given(batch.routes, forced=self._replays != "off"):
            values, _ = self._module(**batch.inputs, temperature=1.0)
        return values, batch, routing_metrics([self._routing.take()])["routing/changed"]
