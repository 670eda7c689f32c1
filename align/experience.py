"""Experience: trajectories sampled from the policy, with their rewards. Training and evaluation share this record.

A problem's trajectories are a group, and stay one from the sampler to the loss: `Fleet.sample` yields groups as they
finish, `submit` hands each to the scoring pool while others are still being sampled, and `gather` returns all of them
scored, in the order of the problems.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from align.data.chat import answer_text, encode_prompt
from align.data.entries import Notes, Reader, Room
from align.data.loader import load_split
from align.data.rows import refuse_lost_thoughts
from align.data.types import Example
from align.errors import UserError, naming
from align.learner.batch import TrainingSequence
from align.recipe import GrpoRecipe, PreferencesRecipe
from reward import Sample, SampleReward, ScoringPool, Ticket, Verdict
from reward.mixture import is_judged
from reward.rows import added_metadata
from rollout import FinishReason, Group, Prompt, Trajectory, Turn, Versions


@dataclass(frozen=True, slots=True)
class Problem:
    """An example of the data, and its prompt as token ids."""

    example: Example
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class ScoredTrajectory:
    """A trajectory, its last turn as text, and its reward with the verdict."""

    trajectory: Trajectory
    text: str
    reward: SampleReward

    @property
    def sample_id(self) -> str:
        """The prompt's id and the place in the group, such as `sum/17#3`."""
        return f"{self.trajectory.prompt_id}#{self.trajectory.index}"

    @property
    def right(self) -> bool:
        return self.reward.verdict is Verdict.PASS

    @property
    def scored(self) -> bool:
        """Whether it has a reward: False where there is none, or the scoring machinery failed, which says nothing of the policy."""
        return self.reward.verdict not in (Verdict.INFRA_ERROR, Verdict.UNSCORED)

    @property
    def truncated(self) -> bool:
        """Whether it was cut off at a limit of length."""
        return self.trajectory.finish_reason is FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A problem and its scored trajectories, by index."""

    problem: Problem
    trajectories: Sequence[ScoredTrajectory]


Submitted = tuple[Group, list[str], Ticket | None]
UNSCORED = SampleReward(None, Verdict.UNSCORED, {})


def encode_problems(tokenizer: Any, examples: Sequence[Example]) -> list[Problem]:
    """The examples with their prompts as token ids. Raises UserError for one that the chat template refuses, and where thoughts would be lost."""
    problems = []
    for example in examples:
        refuse_lost_thoughts(example.messages, f"prompt {example.id!r}")
        with naming(f"prompt {example.id!r}"):
            problems.append(
                Problem(example, Prompt(example.id, encode_prompt(tokenizer, example.messages, example.tools)))
            )
    return problems


def reader_of_prompts(recipe: GrpoRecipe | PreferencesRecipe, tokenizer: Any, notes: Notes) -> Reader[Example, Problem]:
    """What reads the entries of a recipe as problems, whose prompts leave room for `sampling.max_new_tokens`."""

    def encode(example: Example) -> list[Problem]:
        # Of a stream the first rows alone were looked at before the start.
        if recipe.rewards and not is_judged(recipe.rewards, example.domain):
            raise UserError(f"prompt {example.id!r}: no reward of the recipe is for its domain {example.domain!r}")
        return encode_problems(tokenizer, [example])

    return Reader(
        load_split,
        encode,
        lambda problem: len(problem.prompt.token_ids),
        Room(
            recipe.rollout.max_length - recipe.sampling.max_new_tokens,
            "what rollout.max_length leaves beside sampling.max_new_tokens",
        ),
        recipe.seed,
        notes,
    )


def submit(
    groups: Iterable[Group], problems: Sequence[Problem], tokenizer: Any, pool: ScoringPool | None
) -> dict[str, Submitted]:
    """Hand each group to the scoring pool, where there is one, as soon as it is complete; returns them by the problem's id."""
    examples = {problem.example.id: problem.example for problem in problems}
    submitted = {}
    for group in groups:
        example = examples[group.prompt.id]
        texts = [answer_text(tokenizer, example.messages, t.token_ids, example.tools) for t in group.trajectories]
        samples = [reward_sample(example, t, text) for t, text in zip(group.trajectories, texts, strict=True)]
        submitted[example.id] = group, texts, pool.submit(samples) if pool else None
    return submitted


def gather(
    submitted: Mapping[str, Submitted],
    problems: Sequence[Problem],
    pool: ScoringPool | None,
    *,
    alone: bool = False,
) -> list[ScoredGroup]:
    """Wait for the rewards of all groups, which are unscored without a pool. Returns them in the order of the problems.

    How many may fail to be scored is a share of the last groups, or of these `alone`.
    """
    tickets = [ticket for _, _, ticket in submitted.values() if ticket is not None]
    found = (
        pool.gather(tickets, alone=alone) if pool else ([UNSCORED] * len(texts) for _, texts, _ in submitted.values())
    )
    rewards = dict(zip(submitted, found, strict=True))
    scored = []
    for problem in problems:
        group, texts, _ = submitted[problem.example.id]
        parts = zip(group.trajectories, texts, rewards[problem.example.id], strict=True)
        scored.append(ScoredGroup(problem, [ScoredTrajectory(*part) for part in parts]))
    return scored


def reward_sample(example: Example, trajectory: Trajectory, text: str) -> Sample:
    """A trajectory as the rewards see it."""
    return Sample(
        id=f"{example.id}#{trajectory.index}",
        prompt=example.prompt_text,
        completion=text,
        ground_truth=example.answer,
        domain=example.domain,
        truncated=trajectory.finish_reason is FinishReason.LENGTH,
        metadata={**example.metadata, **added_metadata(example.messages, int(trajectory.sampled.sum()))},
    )


def training_sequence(
    trajectory: Trajectory, weight: float = 0.0, advantage: float = 0.0, group: int | None = None
) -> TrainingSequence:
    """A trajectory as the learner takes it: trained on where the policy drew the token.

    Raises UserError where experts were recorded, but not of each token that went through the model: all but the last.
    """
    prompt = np.zeros(len(trajectory.prompt_token_ids), dtype=bool)
    token_ids = [*trajectory.prompt_token_ids, *trajectory.token_ids]
    if trajectory.experts is not None and (known := len(trajectory.experts)) != len(token_ids) - 1:
        raise UserError(
            f"grpo.routing_replay, rollout.record_experts: a completion of prompt {trajectory.prompt_id!r} has the experts of {known} tokens, where "
            f"{len(token_ids) - 1} went through the model"
        )
    return TrainingSequence(
        token_ids=token_ids,
        sampled=np.concatenate([prompt, trajectory.sampled]),
        weight=weight,
        advantage=advantage,
        sampler_log_probs=trajectory.log_probs[trajectory.sampled],
        group=group,
        experts=trajectory.experts,
    )


def row_of(example: Example, scored: ScoredTrajectory) -> dict[str, Any]:
    """A scored trajectory as a row for people, and with all that is needed to score it again."""
    trajectory, reward = scored.trajectory, scored.reward
    return {
        "id": example.id,
        "domain": example.domain,
        "index": trajectory.index,
        "prompt": example.prompt_text,
        "completion": scored.text,
        "answer": example.answer,
        "metadata": json.dumps(
            reward_sample(example, trajectory, scored.text).metadata, ensure_ascii=False, default=str
        ),
        "reward": reward.value,
        "verdict": str(reward.verdict),
        "components": {name: score.value for name, score in reward.components.items()},
        "detail": "; ".join(score.detail for score in reward.components.values() if score.detail),
        "finish_reason": str(trajectory.finish_reason),
        "tokens": len(trajectory.token_ids),
        "weight_version": trajectory.weight_versions[-1].version,
        "seed": trajectory.seed,
    }


def sample_of(row: Mapping[str, Any]) -> Sample:
    """The sample of a row that `row_of` wrote, as its reward saw it. A row of an earlier version has no metadata."""
    return Sample(
        id=f"{row['id']}#{row['index']}",
        prompt=row["prompt"],
        completion=row["completion"],
        ground_truth=row["answer"],
        domain=row["domain"],
        truncated=row["finish_reason"] == FinishReason.LENGTH,
        metadata=json.loads(row.get("metadata") or "{}"),
    )


def is_scored_row(row: Mapping[str, Any]) -> bool:
    """Whether `row_of` wrote the row."""
    return row.keys() >= {"id", "index", "prompt", "completion", "answer", "domain", "finish_reason", "verdict"}


def token_columns(
    trajectory: Trajectory, learned: npt.NDArray[np.float32] | None = None, *, with_experts: bool = True
) -> dict[str, Any]:
    """The rest of a trajectory's record, token by token, for a row beside `row_of`'s; `trajectory_of` reads both.

    `learned` [S] are the log-probabilities of its sampled tokens under the learner, where it was trained on; like the sampler's,
    they are written as [T] with 0 for tokens that were not sampled.
    """
    experts = trajectory.experts if with_experts else None
    by_token = np.zeros_like(trajectory.log_probs)
    if learned is not None:
        by_token[trajectory.sampled] = learned
    return {
        "prompt_token_ids": list(trajectory.prompt_token_ids),
        "token_ids": list(trajectory.token_ids),
        "sampled": trajectory.sampled.tolist(),
        "log_probs": trajectory.log_probs.tolist(),
        "learner_log_probs": None if learned is None else by_token.tolist(),
        "weight_versions": [run._asdict() for run in trajectory.weight_versions],
        "turns": [turn._asdict() | {"finish_reason": str(turn.finish_reason)} for turn in trajectory.turns],
        "experts": None
        if experts is None
        else {"dtype": str(experts.dtype), "shape": list(experts.shape), "bytes": experts.tobytes()},
    }


def trajectory_of(row: Mapping[str, Any]) -> Trajectory:
    """The trajectory of a row of a samples file, also of one from before trajectories had turns."""
    ids, reason, experts = row["token_ids"], FinishReason(row["finish_reason"]), row.get("experts")
    log_probs = row["log_probs"] if "log_probs" in row else row["sampler_log_probs"]
    return Trajectory(
        prompt_id=row["id"],
        index=row["index"],
        seed=row["seed"],
        prompt_token_ids=row["prompt_token_ids"],
        token_ids=ids,
        sampled=np.array(row.get("sampled", [True] * len(ids)), dtype=bool),
        log_probs=np.array(log_probs, dtype=np.float32),
        weight_versions=[Versions(**run) for run in row.get("weight_versions", [])]
        or [Versions(0, row["weight_version"])],
        turns=[Turn(turn["start"], turn["end"], FinishReason(turn["finish_reason"])) for turn in row.get("turns", [])]
        or [Turn(0, len(ids), reason)],
        finish_reason=reason,
        experts=None if experts is None else experts_of(experts),
    )


def experts_of(column: Mapping[str, Any]) -> npt.NDArray[Any]:
    return np.frombuffer(column["bytes"], dtype=column["dtype"]).reshape(column["shape"])
