"""What a stage runs on, opened and closed in one place: its run, Ray, rollout workers, scoring pool and learner."""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from align.data.drawing import Source
from align.errors import UserError, naming, reward_errors
from align.evaluate.doctor import examine, verdict
from align.learner.group import LearnerDiedError, LearnerGroup, RankGroup
from align.model.policy import first_line, load_tokenizer, stop_token_ids, write_random_policy
from align.model.reward_model import is_reward_model
from align.model.sizes import sent_bytes
from align.recipe import (
    LearnerOptions,
    ModelOptions,
    Recipe,
    Replay,
    Roles,
    SamplingRecipe,
    ScoringOptions,
    TrainingRecipe,
)
from align.recipe.roles import reward_models
from align.run import Progress
from align.session.ray import local_ray
from align.session.run import Run, keep_recipe, open_run
from align.session.steps import Steps
from reward import Mixture, RewardTerm, ScoringPool
from reward.pool import START_S
from rollout import (
    AdapterSync,
    BroadcastSync,
    Colocation,
    DirectorySync,
    Fleet,
    FleetOptions,
    ObjectStoreSync,
    Precision,
    WeightOptions,
    WeightSync,
)
from rollout.processes import cluster_address, on_gpus, samples_on_cpus, start_limit_s
from rollout.sync.base import MIB

RESTARTS = 3
"""How often a stage goes on by itself from one checkpoint after learner ranks have died."""
LITTLE_CPU = 0.01
PLACEMENT_TIMEOUT_S = 60.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Session:
    """A stage under way. `policy` is the model that it starts from; after `start_sampling` there is a fleet, and a pool if there are rewards."""

    run: Run
    policy: ModelOptions
    tokenizer: Any
    fleet: Fleet = field(init=False)
    pool: ScoringPool | None = None
    weight_sync: WeightSync = field(default_factory=ObjectStoreSync)
    precision: Precision = "model"
    colocation: Colocation | None = None
    open: ExitStack = field(default_factory=ExitStack)

    def start_sampling(self, roles: Roles) -> None:
        """Start Ray, the rollout workers with `policy`, and the scoring pool. What happens to workers is recorded in the run.

        Raises UserError when a reward cannot run here: no sandbox, no server.
        """
        stops, rollout, sent = stop_token_ids(self.policy, self.tokenizer), roles.rollout or FleetOptions(), 0
        if roles.weights is not None and roles.learner is not None:
            self.weight_sync = weight_sync_of(roles.weights, self.run.directory.weights_directory.absolute())
            self.precision = roles.weights.precision
            if roles.weights.transport == "adapter" and roles.learner.lora:
                rollout = rollout.model_copy(update={"adapter_rank": roles.learner.lora.rank})
            if roles.weights.transport == "object_store":
                sent = sent_bytes(self.policy, roles.learner.lora)
        self.open.enter_context(local_ray(sent, roles.gpus))
        check_sampler()
        if roles.colocated and roles.learner is not None:
            limits = [start_limit_s(side.start_timeout_s, 0, self.policy.path) for side in (roles.learner, rollout)]
            self.colocation = Colocation(shared_gpus(max(roles.learner.ranks, rollout.workers), max(limits)))
        self.fleet = Fleet(
            self.policy.path,
            self.policy.dtype,
            rollout,
            stops,
            self.run.record_fault,
            self.colocation,
            trust_remote_code=self.policy.trust_remote_code,
        )
        self.open.callback(self.fleet.close)
        if roles.scoring is not None:
            self.pool = self.open.enter_context(scoring_pool(roles.rewards, roles.scoring))

    def new_learner(
        self,
        options: LearnerOptions,
        seed: int,
        reference: ModelOptions | None = None,
        replay: Replay = "off",
        teacher: ModelOptions | None = None,
    ) -> LearnerGroup:
        """Start a learner of `policy`, whose weights go to the rollout workers. `learning` waits for it and ends it."""
        return LearnerGroup(
            self.policy,
            options,
            seed=seed,
            reference=reference,
            weight_sync=self.weight_sync,
            colocation=self.colocation,
            replay=replay,
            teacher=teacher,
            precision=self.precision,
        )

    @contextmanager
    def learning(
        self,
        title: str,
        recipe: TrainingRecipe,
        learner: RankGroup,
        steps: int,
        sources: Sequence[Source[Any]],
        *,
        reference: ModelOptions | None = None,
        teacher: ModelOptions | None = None,
        state: dict[str, Any] | None = None,
    ) -> Iterator[Steps]:
        """Wait for the engines, restore the last checkpoint, and yield the steps still to be made. Ends the learner.

        `state`, ready for JSON, is what the stage itself has to remember; `Steps.state` has it as the checkpoint left it.
        """
        progress = self.run.progress
        base = self.policy if recipe.learner.lora or recipe.learner.freeze else None
        frozen = {"base": base, "reference": reference, "teacher": teacher}
        with Steps(recipe, self.run, learner, steps, sources, **frozen, state=state) as remaining:
            progress.stage(title, steps, completed=remaining.done)
            remaining.tell_length()
            progress.phase("starting engines")
            if isinstance(recipe, SamplingRecipe):
                self.fleet.wait_until_ready()
            learner.wait_until_ready()
            learner.check_shared(self.run.directory.status_file)
            remaining.restore()
            keep_recipe(self.run.directory, recipe)
            progress.note(f"{title} on {recipe.learner.ranks} learner ranks: {learner.trained.description}")
            yield remaining

    def restarting(self, train: Callable[[], T]) -> T:
        """Return what `train` returns. Where a learner rank dies in it, call it again from the run's last checkpoint."""
        restarts, begun_at = 0, -1
        while True:
            try:
                return train()
            except LearnerDiedError as error:
                # A signal to all processes of the run ends learners too.
                self.run.stop.check()
                reached = self.run.checkpoints.last_step
                restarts, begun_at = (restarts + 1 if reached == begun_at else 1), reached
                if restarts > RESTARTS:
                    raise
                self.run.rewind()
                whence = "this checkpoint" if reached else "the beginning"
                self.run.warn(
                    f"{first_line(error)}; the learners were started again ({restarts} of {RESTARTS} times from {whence})"
                )


@contextmanager
def open_session(recipe: Recipe) -> Iterator[Session]:
    """Open the run of a recipe and its policy, which has passed the doctor; close everything that is started afterwards."""
    with open_run(recipe) as run, ExitStack() as stack:
        trained = recipe.roles().trained
        place, progress = run.directory.initial_directory, run.progress
        policy, tokenizer = prepare_policy(
            recipe.model, recipe.seed, place, progress, of_reward_model=trained == "reward_model"
        )
        yield Session(run, policy, tokenizer, open=stack)


def prepare_policy(
    model: ModelOptions, seed: int, place: Path, progress: Progress, *, of_reward_model: bool = False
) -> tuple[ModelOptions, Any]:
    """The policy to start from, initialised by the seed in `place` where its options say so, and its tokenizer; both have passed the doctor.

    For a reward model it may be a reward model too, which is then trained on.
    """
    policy = model
    if policy.init == "random":
        write_random_policy(policy, place, seed)
        policy = policy.model_copy(update={"path": str(place), "init": "pretrained"})
    tokenizer = load_tokenizer(policy.path, trust_remote_code=policy.trust_remote_code)
    trained_before = of_reward_model and is_reward_model(policy)
    progress.note(f"doctor: {verdict(examine(policy, tokenizer, reward_model=trained_before), model.path)}")
    return policy, tokenizer


def check_sampler() -> None:
    """Raise UserError where the vLLM that is installed could not sample in the Ray that was started: it is for GPUs, and there are none."""
    if not on_gpus() and not samples_on_cpus():
        raise UserError(
            "vLLM is built for GPUs, and there is none that it may use: `export ACCELERATOR=cpu`, then `make clean setup` installs one that samples on CPUs"
        )


def shared_gpus(count: int, patience_s: float) -> Any:
    """A placement group of `count` bundles with a GPU each. A cluster of others, which may grow, is given `patience_s` seconds.

    Raises UserError where so many are not free.
    """
    import ray

    bundle = {"GPU": 1.0} if on_gpus() else {"CPU": LITTLE_CPU}
    group = ray.util.placement_group([bundle] * count)
    if not group.wait(max(PLACEMENT_TIMEOUT_S, patience_s if cluster_address() else 0.0)):
        raise UserError(
            f"colocate: {count} GPUs are wanted, one for each learner rank and rollout worker, and Ray has "
            f"{ray.available_resources().get('GPU', 0):g} free; lower learner.ranks and rollout.workers"
        )
    return group


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
def scoring_pool(rewards: Sequence[RewardTerm], options: ScoringOptions) -> Iterator[ScoringPool]:
    """Start what scores trajectories, and end it afterwards. Raises UserError where a reward cannot run here."""
    mixture = Mixture(rewards, infra_error_limit=options.infra_error_limit)
    there = on_gpus()
    if there and not options.gpus and any(term.name == "reward_model" for term in rewards):
        _log.warning(
            "reward models run on the CPU, for scoring.gpus is 0: it gives a scoring worker a GPU, or a share of one"
        )
    gpus = options.gpus if there else 0.0
    models = reward_models(rewards)
    start = start_limit_s(options.start_timeout_s, START_S, *models)
    pool = ScoringPool(mixture, workers=options.workers, timeout_s=options.timeout_s, gpus=gpus, start_timeout_s=start)
    with closing(pool):
        with naming("rewards"), reward_errors():
            pool.wait_until_ready()
        yield pool
