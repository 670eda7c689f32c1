"""What every stage runs on: Ray, the rollout workers, the tokenizer, and the checks that a policy has to pass."""

import ipaddress
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch

from align.config import ModelOptions, PolicyRecipe, Recipe, RewardModelRecipe, SamplingRecipe, TrainingRecipe
from align.errors import UserError
from align.evaluate.doctor import examine, verdict
from align.learner.group import check_port
from align.model.policy import first_line, load_tokenizer, stop_token_ids, write_random_policy
from align.model.reward_model import is_reward_model
from align.run.watcher import watched
from align.stages.disk import check_space
from align.stages.faults import record_fault
from align.stages.run import Run
from align.stages.stop import SIGNALS
from reward import Mixture, RewardError, ScoringPool
from rollout import Fleet

OBJECT_STORE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Engines:
    """The sampler's side of a run, and its judges. `policy` is where the workers' first weights came from."""

    policy: ModelOptions
    tokenizer: Any
    fleet: Fleet
    judges: ScoringPool


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
    stops = stop_token_ids(policy.path, tokenizer)
    with local_ray():
        fleet = Fleet(policy.path, policy.dtype, recipe.rollout, stops, partial(record_fault, run))
        try:
            with start_judges(recipe) as judges:
                yield Engines(policy, tokenizer, fleet, judges)
        finally:
            fleet.close()


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


@contextmanager
def local_ray() -> Iterator[None]:
    """Ray for the time of a run: the cluster of RAY_ADDRESS where that is set, else one of this machine on loopback."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray._private import ray_constants

    address = os.environ.get("RAY_ADDRESS")
    # In a cluster of others Ray itself ends the actors of a driver that is gone.
    with nullcontext() if address else watched():
        if address:
            check_address(address, os.environ.get("RAY_AUTH_MODE"))
            try:
                with kept_signal_handlers():
                    ray.init(log_to_driver=False)
            except (ConnectionError, ray.exceptions.AuthenticationError) as error:
                raise UserError(f"RAY_ADDRESS={address}: {first_line(error)}") from None
        else:
            # Where Ray knows no clusters it listens on loopback alone; asked for 127.0.0.1 it would take the host's address.
            # The variable tells the processes it starts; this one has read it already.
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
            ray_constants.ENABLE_RAY_CLUSTER = False
            with kept_signal_handlers():
                start_node()
        try:
            yield
        finally:
            ray.shutdown()


def check_address(address: str, auth_mode: str | None) -> None:
    """Raise UserError for a cluster that others can reach and that asks for no token: whoever reaches it runs what he likes."""
    if address == "local" or (auth_mode or "").lower() == "token":
        return
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise UserError(
            f"RAY_ADDRESS={address} is a cluster on a network and RAY_AUTH_MODE is not 'token': anyone who reaches it could run "
            "code there. Start its nodes with RAY_AUTH_MODE=token and set the same here; docs/cluster.md has the commands"
        )


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts; a run has to hear of it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_node(attempts: int = 5) -> None:
    """Start Ray on this machine. It gives itself 30 seconds, which are too few on a busy one: then it is tried again."""
    import ray

    for attempt in range(1, attempts + 1):
        try:
            ray.init(
                num_cpus=os.cpu_count(),
                num_gpus=torch.cuda.device_count(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
            return
        except Exception as error:  # Ray raises nothing more specific
            ray.shutdown()
            if attempt == attempts or "timed out during startup" not in str(error):
                raise
