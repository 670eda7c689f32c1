"""What every stage runs on: the rollout workers, the tokenizer, and the checks that a policy has to pass."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.errors import UserError
from align.evaluate.doctor import examine, verdict
from align.learner.group import LearnerGroup, check_port
from align.model.policy import load_tokenizer, stop_token_ids, write_random_policy
from align.model.reward_model import is_reward_model
from align.model.sizes import empty_model, model_sizes, read_config
from align.recipe import ModelOptions, PolicyRecipe, Recipe, RewardModelRecipe, SamplingRecipe, TrainingRecipe
from align.session.disk import check_space
from align.session.faults import record_fault
from align.session.places import shared_places
from align.session.ray import local_ray
from align.session.run import Run
from reward import Mixture, RewardError, ScoringPool
from rollout import (
    AdapterSync,
    BroadcastSync,
    DirectorySync,
    Fleet,
    ObjectStoreSync,
    WeightOptions,
    WeightSync,
)
from rollout.sync.base import MIB


@dataclass(frozen=True, slots=True)
class Engines:
    """The sampler's side of a run, and its judges.

    `policy` is where the workers' first weights came from; `places` are those that they share with learner ranks, if they do.
    """

    policy: ModelOptions
    tokenizer: Any
    fleet: Fleet
    judges: ScoringPool
    weight_sync: WeightSync
    places: Any = None

    def send_weights(self, learner: LearnerGroup, version: int, *, merged: bool = False) -> int:
        """`learner.sync_weights` with these workers."""
        return learner.sync_weights(self.fleet, version, merged=merged)

    def adapter_lost(self, learner: LearnerGroup) -> float | None:
        """`learner.adapter_lost`."""
        return learner.adapter_lost()


def prepare_policy(recipe: Recipe, run: Run) -> tuple[ModelOptions, Any]:
    """The policy to start from, drawn where the recipe says so, and its tokenizer; both have passed the doctor.

    For a reward model it may be a reward model too, which then learns more.
    """
    policy = recipe.model
    if isinstance(recipe, TrainingRecipe) and run.resume is None:
        check_space(recipe, run.directory.path)
    if policy.init == "random":
        write_random_policy(policy, run.directory.initial_directory, recipe.seed)
        policy = policy.model_copy(update={"path": str(run.directory.initial_directory), "init": "pretrained"})
    tokenizer = load_tokenizer(policy.path, trust_remote_code=policy.trust_remote_code)
    goes_on = isinstance(recipe, RewardModelRecipe) and is_reward_model(policy)
    run.progress.note(f"doctor: {verdict(examine(policy, tokenizer, reward_model=goes_on), recipe.model.path)}")
    return policy, tokenizer


@contextmanager
def start_engines(recipe: SamplingRecipe, policy: ModelOptions, tokenizer: Any, run: Run) -> Iterator[Engines]:
    """Start Ray, rollout workers and judges; end them afterwards. What happens to workers goes on the record of the run.

    Raises UserError when the learner's port is in use, and when one of the rewards cannot run here: no sandbox, no server.
    """
    if isinstance(recipe, PolicyRecipe) and recipe.learner.port is not None:
        check_port(recipe.learner.port)
    stops = stop_token_ids(policy, tokenizer)
    weights = recipe.weights if isinstance(recipe, PolicyRecipe) else WeightOptions()
    weight_sync = weight_sync_of(weights, run.directory.path.absolute() / "weights")
    rollout = recipe.rollout
    if weights.transport == "adapter" and isinstance(recipe, PolicyRecipe) and recipe.learner.lora:
        check_adapters_are_served(policy)
        rollout = rollout.model_copy(update={"adapter_rank": recipe.learner.lora.rank})
    with local_ray():
        places = shared_places(recipe)
        on_fault, trust = partial(record_fault, run), policy.trust_remote_code
        fleet = Fleet(policy.path, policy.dtype, rollout, stops, on_fault, places, trust_remote_code=trust)
        try:
            with start_judges(recipe) as judges:
                yield Engines(policy, tokenizer, fleet, judges, weight_sync, places)
        finally:
            fleet.close()


def check_adapters_are_served(policy: ModelOptions) -> None:
    """Raise UserError where vLLM cannot add an adapter to this policy on this machine."""
    if not torch.cuda.is_available() and model_sizes(empty_model(read_config(policy.path))).is_mixture:
        raise UserError(
            f"weights.transport: vLLM adds no adapters to a model with experts ({policy.path}) on a CPU; leave it out, and the workers "
            "get merged weights"
        )


def weight_sync_of(options: WeightOptions, directory: Path) -> WeightSync:
    """How new weights go to the workers, as the recipe says; where in files, those of a killed run are removed from `directory`."""
    bucket_bytes = options.bucket_mb * MIB
    if options.transport == "object_store":
        return ObjectStoreSync(bucket_bytes)
    if options.transport == "broadcast":
        return BroadcastSync(bucket_bytes)
    shutil.rmtree(directory, ignore_errors=True)
    return AdapterSync(directory) if options.transport == "adapter" else DirectorySync(directory, bucket_bytes)


@contextmanager
def start_judges(recipe: SamplingRecipe) -> Iterator[ScoringPool]:
    """Start what scores completions, and end it afterwards. Raises UserError where a reward cannot run here."""
    options = recipe.scoring
    mixture = Mixture(recipe.rewards, infra_error_limit=options.infra_error_limit)
    judges = ScoringPool(mixture, workers=options.workers, timeout_s=options.timeout_s, gpus=options.gpus)
    try:
        try:
            judges.wait_until_ready()
        except RewardError as error:
            raise UserError(f"rewards: {error}") from None
        yield judges
    finally:
        judges.close()
