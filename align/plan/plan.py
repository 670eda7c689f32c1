"""A recipe on a cluster: its roles with their memory, their places, the time of a step, and what stands in the way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from align.model.sizes import ModelSizes
from align.plan import memory, times
from align.plan.memory import (
    ELEMENT_BYTES,
    GIB,
    GPU_PROCESS,
    Parts,
    Training,
    adapted_parameters,
    adapter_size,
    changed_size,
)
from align.plan.placement import Cluster, Demand, place
from align.recipe import (
    BFLOAT16_SUMS,
    MERGED_ADAPTERS,
    GrpoRecipe,
    PolicyRecipe,
    PreferencesRecipe,
    Recipe,
    RewardModelRecipe,
    SamplingRecipe,
    SftRecipe,
)


@dataclass(frozen=True, slots=True)
class Role:
    """Processes that are alike, with `parts` in bytes of a GPU each, or of a process on a CPU."""

    name: str
    count: int
    gpus: float
    parts: Parts
    limit: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """`refusals` say what cannot be and what to change; without any the recipe fits."""

    roles: Sequence[Role]
    nodes: Sequence[str]
    seconds: dict[str, float]
    notes: Sequence[str]
    refusals: Sequence[str]


@dataclass(frozen=True, slots=True)
class Learning:
    """What the learners do: `training` of a rank, the `tokens` of a step, and the elements that are sent after it."""

    training: Training
    tokens: int
    sent: int


SHARED = "learner.gpus=0.6 rollout.gpus=0.4 rollout.gpu_memory_share=0.45"


def make_plan(recipe: Recipe, sizes: ModelSizes, cluster: Cluster) -> Plan:
    """Plan a recipe of any stage. Raises UserError for LoRA targets that the model does not have."""
    element = ELEMENT_BYTES[recipe.model.dtype]
    learning = what_is_learned(recipe, sizes, element)
    roles = []
    if isinstance(recipe, SamplingRecipe):
        roles += [rollout_role(recipe, sizes, cluster, element), scoring_role(recipe, sizes, cluster)]
    learners = learners_part(recipe, cluster)
    if learning is not None:
        roles.append(learner_role(learning.training, learners))
    nodes, homeless = place(cluster, demands(recipe, roles))
    refusals = [*too_few(recipe, roles, homeless, cluster)]
    if learning is not None and cluster.gpus:
        refusals += too_much_to_learn(learning.training, roles[-1], learners)
    if isinstance(recipe, SamplingRecipe):
        refusals += too_much_to_sample(recipe, sizes, roles[0], cluster, element)
    if not cluster.gpus:
        refusals += too_much_for_the_machine(recipe, roles)
    return Plan(
        roles,
        nodes,
        step_seconds(recipe, sizes, learning, cluster, element),
        notes(recipe, sizes, learning, element),
        refusals,
    )


def what_is_learned(recipe: Recipe, sizes: ModelSizes, element: int) -> Learning | None:
    """What the learners of a recipe do; None for a stage that trains nothing."""
    if not isinstance(recipe, PolicyRecipe | RewardModelRecipe):
        return None
    lora = recipe.learner.lora
    trained = sent = sizes.total
    if lora is not None:
        parameters = adapted_parameters(sizes, lora.targets)
        trained, sent = adapter_size(parameters, lora.rank), changed_size(sizes, parameters)
        if isinstance(recipe, PolicyRecipe) and recipe.weights.transport == "adapter":
            sent = trained
        else:
            sent += held_apart(recipe, sizes, element)
    if isinstance(recipe, GrpoRecipe):
        sequences, longest = recipe.grpo.prompts_per_step * recipe.grpo.group_size, recipe.rollout.max_length
    elif isinstance(recipe, SftRecipe):
        sequences, longest = recipe.sft.sequences_per_step, recipe.rollout.max_length
    else:
        assert isinstance(recipe, RewardModelRecipe)
        sequences, longest, sent = 2 * recipe.reward_model.pairs_per_step, recipe.reward_model.max_length, 0
    each = -(-sequences // recipe.learner.ranks)
    training = Training(
        sizes=sizes,
        options=recipe.learner,
        trained=trained,
        step_tokens=each * longest,
        longest=longest,
        element=element,
        reference_copy=isinstance(recipe, GrpoRecipe) and bool(recipe.grpo.kl_coefficient) and lora is None,
        # A reward model has a number where a policy has logits.
        logits=not isinstance(recipe, RewardModelRecipe),
    )
    return Learning(training, sequences * longest, sent)


def held_apart(recipe: Recipe, sizes: ModelSizes, element: int) -> int:
    """Elements of the adapter that the rollout workers have beside the weights: in float32 it is in the weights."""
    if not isinstance(recipe, PolicyRecipe) or recipe.learner.lora is None or element == ELEMENT_BYTES["float32"]:
        return 0
    lora = recipe.learner.lora
    return adapter_size(adapted_parameters(sizes, lora.targets), lora.rank)


def demands(recipe: Recipe, roles: Sequence[Role]) -> list[Demand]:
    """What wants a place, in the order in which it is given one: in turns, a worker and a rank have a GPU together."""
    if not in_turns(recipe):
        return [Demand(role.name, role.count, role.gpus) for role in roles]
    worker, *others, learner = roles
    pairs = Demand(f"{worker.name} and {learner.name}", max(worker.count, learner.count), float(learner.gpus > 0))
    return [pairs, *(Demand(role.name, role.count, role.gpus) for role in others)]


def in_turns(recipe: Recipe) -> bool:
    """Whether a GPU that learners and workers share is only ever used by one side."""
    return isinstance(recipe, PolicyRecipe) and recipe.colocate


def learners_part(recipe: Recipe, cluster: Cluster) -> Cluster:
    """The cluster with the memory of a GPU that the rollout workers leave to learners, where they share them."""
    if in_turns(recipe) and cluster.gpus:
        return replace(cluster, gpu_memory=cluster.gpu_memory - GPU_PROCESS)
    if isinstance(recipe, SamplingRecipe) and recipe.rollout.gpus < 1:
        return replace(cluster, gpu_memory=cluster.gpu_memory * (1 - recipe.rollout.gpu_memory_share))
    return cluster


def learner_role(training: Training, cluster: Cluster) -> Role:
    """The learner ranks: a GPU each, or `learner.gpus` of one."""
    gpus = training.options.gpus if cluster.gpus else 0
    process = {"process": GPU_PROCESS if gpus else memory.LEARNER_PROCESS}
    parts = memory.learner_memory(training) | process
    return Role("learner rank", training.options.ranks, gpus, parts, cluster.gpu_memory)


def rollout_role(recipe: SamplingRecipe, sizes: ModelSizes, cluster: Cluster, element: int) -> Role:
    """The rollout workers: `rollout.tensor_parallel` GPUs of one node each."""
    process = {"process": GPU_PROCESS if cluster.gpus else memory.WORKER_PROCESS}
    adapter = float(held_apart(recipe, sizes, element) * element)
    parts = memory.worker_memory(sizes, recipe.rollout, element, cluster.gpu_memory, adapter) | process
    gpus = recipe.rollout.tensor_parallel * recipe.rollout.gpus if cluster.gpus else 0
    limit = cluster.gpu_memory * recipe.rollout.gpu_memory_share
    if in_turns(recipe):
        limit = cluster.gpu_memory - GPU_PROCESS
    return Role("rollout worker", recipe.rollout.workers, gpus, parts, limit)


def scoring_role(recipe: SamplingRecipe, sizes: ModelSizes, cluster: Cluster) -> Role:
    """The scoring workers. A reward model is taken to be as large as the policy: it is made of it."""
    models = [term for term in recipe.rewards if term.name == "reward_model"]
    weights = sum(sizes.total * ELEMENT_BYTES[term.params.get("dtype", "float32")] for term in models)
    gpus = recipe.scoring.gpus if cluster.gpus else 0
    process = {"process": GPU_PROCESS if gpus else memory.SCORING_PROCESS}
    parts = ({"reward models": float(weights)} if models else {}) | process
    return Role("scoring worker", recipe.scoring.workers, gpus, parts, cluster.gpu_memory * min(gpus, 1))


def too_few(recipe: Recipe, roles: Sequence[Role], homeless: Sequence[str], cluster: Cluster) -> list[str]:
    """What has no GPU to be on."""
    if not homeless:
        return []
    if in_turns(recipe):
        pairs = max(role.count for role in roles if role.gpus)
        return [
            f"{pairs} GPUs are wanted, one for each learner rank and the rollout worker that takes turns with it, and there are "
            f"{cluster.gpus}: lower learner.ranks and rollout.workers, or take more nodes"
        ]
    wanted = " + ".join(f"{r.count} x {r.gpus:g} ({r.name}s)" for r in roles if r.gpus)
    total = sum(r.count * r.gpus for r in roles)
    widest = max(r.gpus for r in roles)
    if widest > cluster.gpus_per_node:
        return [
            f"a rollout worker needs {widest:g} GPUs of one node, and a node has {cluster.gpus_per_node}: "
            "lower rollout.tensor_parallel"
        ]
    if cluster.gpus < len([r for r in roles if r.gpus >= 1]):
        return [
            f"a run has GPUs of its own for learners and for rollout workers, {widest + 1:g} at least, and there are "
            f"{cluster.gpus}: take more, or let a rank and a worker share one ({SHARED})"
        ]
    return [
        f"no GPU is left for {', '.join(homeless)}: the recipe needs {total:g} GPUs, {wanted}, and there are {cluster.gpus}; "
        "lower learner.ranks, rollout.workers, rollout.tensor_parallel or scoring.gpus, take more nodes, or let each rank share "
        f"its GPU with a worker ({SHARED})"
    ]


def too_much_to_learn(training: Training, role: Role, cluster: Cluster) -> list[str]:
    """A learner rank that does not fit its GPU, and the first change that helps."""
    if role.total <= role.limit:
        return []
    largest = max(role.parts, key=lambda name: role.parts[name])
    return [
        f"a learner rank needs {gib(role.total)} of {gib(role.limit)}, most of it for {largest} ({gib(role.parts[largest])}): "
        f"{cure(training, cluster)}"
    ]


def cure(training: Training, cluster: Cluster) -> str:
    """The least change of the recipe, of those that are tried in order, with which a learner rank fits."""
    said: list[str] = []
    if training.reference_copy:
        training = replace(training, reference_copy=False)
        said.append("grpo.kl_coefficient=0 (or adapters), which needs no second model as the reference")
    changes = {"gradient_checkpointing": True, "zero_stage": 3, "micro_batch_tokens": max(2048, training.longest)}
    if training.options.expert_parallel > 1:
        del changes["zero_stage"]  # AutoEP's ZeRO-3 is not used here
    for key, value in changes.items():
        changed = with_option(training, key, value)
        if not fits(training, cluster) and needed(changed, cluster) < needed(training, cluster):
            training = changed
            said.append(f"learner.{key}={str(value).lower()}")
    ranks = training.options.ranks
    while not fits(training, cluster) and training.options.ranks < 100 * ranks:
        training = with_option(training, "ranks", training.options.ranks + cluster.gpus_per_node)
    if not fits(training, cluster):
        return "no number of ranks helps; shorten the sequences (rollout.max_length), or take GPUs with more memory"
    if training.options.ranks > ranks:
        said.append(f"learner.ranks={training.options.ranks} (or adapters in place of all parameters)")
    return f"it would fit with {', '.join(said)}"


def with_option(training: Training, key: str, value: int) -> Training:
    """The same work with another value of `learner.key`; more ranks have less of it each."""
    options = training.options.model_copy(update={key: value})
    sequences = -(-training.step_tokens * training.options.ranks // (training.longest * options.ranks))
    return replace(training, options=options, step_tokens=sequences * training.longest)


def needed(training: Training, cluster: Cluster) -> float:
    """Bytes that a learner rank needs of its GPU."""
    return learner_role(training, cluster).total


def fits(training: Training, cluster: Cluster) -> bool:
    """Whether a learner rank fits its GPU."""
    return needed(training, cluster) <= cluster.gpu_memory


def too_much_to_sample(
    recipe: SamplingRecipe, sizes: ModelSizes, role: Role, cluster: Cluster, element: int
) -> list[str]:
    """A rollout worker whose weights do not fit, whose cache is too small, or whose GPUs cannot share its heads."""
    options, found = recipe.rollout, []
    if cluster.gpus and sizes.heads % options.tensor_parallel:
        found.append(f"rollout.tensor_parallel={options.tensor_parallel} does not divide {sizes.heads} attention heads")
    if cluster.gpus and options.gpus < 1 and role.total > role.limit:
        more = "" if in_turns(recipe) else "raise rollout.gpu_memory_share, or "
        found.append(
            f"a rollout worker needs {gib(role.total)} of {gib(role.limit)}, its share of a GPU's memory: {more}lower "
            "rollout.kv_cache_gb"
        )
    needed = options.max_length * memory.kv_bytes_a_token(sizes, element)
    if role.parts["KV cache"] < needed:
        change = (
            "raise rollout.tensor_parallel or rollout.gpu_memory_share" if cluster.gpus else "raise rollout.kv_cache_gb"
        )
        found.append(
            f"a rollout worker has {gib(role.parts['KV cache'])} for its KV cache beside {gib(role.parts['weights'])} of "
            f"weights, and one sequence of rollout.max_length={options.max_length} needs {gib(needed)}: {change}"
        )
    return found


def too_much_for_the_machine(recipe: Recipe, roles: Sequence[Role]) -> list[str]:
    """On CPUs everything shares one memory; the recipe says how much of it must be free."""
    total = sum(role.count * role.total for role in roles)
    if total <= recipe.machine.memory_gb * GIB:
        return []
    return [
        f"all processes together need {total / GIB:.1f} GiB, and machine.memory_gb is {recipe.machine.memory_gb:g}: set it to "
        "that where the machine has it, or lower learner.ranks, rollout.workers, rollout.kv_cache_gb or "
        "learner.micro_batch_tokens"
    ]


def step_seconds(
    recipe: Recipe, sizes: ModelSizes, learning: Learning | None, cluster: Cluster, element: int
) -> dict[str, float]:
    """Seconds of the phases of a step; what judging takes depends on the rewards and goes on beside sampling."""
    rates = times.CPU_THREAD
    if cluster.gpus:
        ranks = learning.training.options.ranks if learning else 0
        rates = times.GPU_IN_A_NODE if ranks <= cluster.gpus_per_node else times.GPU_OVER_NODES
    seconds = {}
    if isinstance(recipe, GrpoRecipe | PreferencesRecipe):
        seconds["sampling"] = times.sampling_seconds(sizes, sampling_work(recipe, sizes, cluster, element), rates)
    if learning is None:
        return seconds
    job, options = learning.training, learning.training.options
    passes = 6 if job.trained == sizes.total else 4
    passes += 2 * (options.gradient_checkpointing + (isinstance(recipe, GrpoRecipe) and recipe.grpo.kl_coefficient > 0))
    work = times.Pass(
        tokens=learning.tokens,
        ranks=options.ranks,
        micro_batch_tokens=options.micro_batch_tokens,
        flops_a_parameter=passes,
        gathers=(3.0 if options.gradient_checkpointing else 2.0) if options.zero_stage == 3 else 0.0,
        weight_bytes=sizes.total * element,
        threads=1 if cluster.gpus else options.threads,
    )
    seconds["training"] = times.training_seconds(sizes, work, rates)
    if isinstance(recipe, GrpoRecipe):
        seconds["weights to the workers"] = times.transfer_seconds(
            learning.sent * element, rates, broadcast=recipe.weights.transport == "broadcast"
        )
        if in_turns(recipe) and cluster.gpus:
            seconds["taking turns"] = 2 * (at_rest(job) + sizes.total * element) / rates.host
    return seconds


def at_rest(job: Training) -> float:
    """Bytes that a learner rank moves to the CPU's memory while the workers have the GPU, its gradients among them."""
    parts = memory.learner_memory(job)
    return sum(parts.get(name, 0.0) for name in ("weights", "gradients", "optimiser", "reference"))


def sampling_work(
    recipe: GrpoRecipe | PreferencesRecipe, sizes: ModelSizes, cluster: Cluster, element: int
) -> times.Sampling:
    """What the rollout workers draw in a step; of preference data, all of it."""
    if isinstance(recipe, GrpoRecipe):
        sequences = recipe.grpo.prompts_per_step * recipe.grpo.group_size
    else:
        sequences = recipe.preferences.prompts * recipe.preferences.samples
    options, role = recipe.rollout, rollout_role(recipe, sizes, cluster, element)
    a_token = memory.kv_bytes_a_token(sizes, element)
    in_cache = int(role.parts["KV cache"] // (a_token * options.max_length))
    return times.Sampling(
        sequences=sequences,
        new_tokens=recipe.sampling.max_new_tokens,
        workers=options.workers,
        together=max(1, min(options.batch_sequences, in_cache)),
        weight_bytes=role.parts["weights"],
        kv_bytes=a_token,
        threads=1 if cluster.gpus else options.threads,
    )


def notes(recipe: Recipe, sizes: ModelSizes, learning: Learning | None, element: int) -> list[str]:
    """What else a reader needs to know."""
    found = [
        f"the KV cache takes {memory.kv_bytes_a_token(sizes, element):,} bytes a token ({sizes.kv_a_token:,} elements)"
    ]
    if learning is not None:
        if element < 4 and not learning.training.options.zero_stage:
            found.append(BFLOAT16_SUMS)
        if element < 4 and learning.training.options.zero_stage == 3 and learning.training.options.lora is not None:
            found.append(MERGED_ADAPTERS)
        found.append(
            f"each learner rank reads the whole model into its node's memory at the start: {gib(sizes.total * element)} a rank"
        )
        if in_turns(recipe):
            found.append(
                f"in turns: at rest, a rank has {gib(at_rest(learning.training))} in its node's memory, a rollout worker "
                f"{gib(sizes.total * element)}"
            )
        if isinstance(recipe, PolicyRecipe):
            through = {
                "broadcast": "one broadcast from the device of rank 0 to theirs",
                "object_store": "Ray's shared memory: the node of rank 0 holds them twice, those of before included",
                "directory": "files in the run directory, which holds them twice, those of before included",
                "adapter": "the adapter's files in the run directory",
            }[recipe.weights.transport]
            found.append(
                f"{gib(learning.sent * element)} of new weights go to the workers after an update, through {through}"
            )
    return found


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def as_text(recipe: Recipe, sizes: ModelSizes, cluster: Cluster, plan: Plan) -> str:
    """The plan of a recipe, a few lines for each question that it answers."""
    lines = [
        f"{recipe.name} ({recipe.stage}) on {cluster}",
        f"model: {sizes.total:,} parameters, {sizes.active:,} of them for a token, {recipe.model.dtype}",
        "",
        "places (Ray chooses them; this is one way)" if cluster.gpus else "processes",
        *(f"  {line}" for line in (plan.nodes if cluster.gpus else [f"{r.count} x {r.name}" for r in plan.roles])),
        "",
        "memory" + (" of one GPU" if cluster.gpus else ", resident, of one process"),
    ]
    for role in plan.roles:
        on = f" of {gib(role.limit)}" if role.gpus else " (on the CPU)" if cluster.gpus else ""
        parts = ", ".join(f"{name} {gib(size)}" for name, size in role.parts.items() if size)
        lines.append(f"  {role.name}: {gib(role.total)}{on}: {parts}")
    if plan.seconds:
        lines += ["", "seconds of a step, at most (assumed rates: align/plan/times.py)"]
        lines += [
            f"  {phase}: {seconds:,.0f}" if seconds >= 10 else f"  {phase}: {seconds:.2g}"
            for phase, seconds in plan.seconds.items()
        ]
    return "\n".join([*lines, "", *plan.notes])
