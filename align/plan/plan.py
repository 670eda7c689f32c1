"""A recipe on a cluster: its processes with their memory, their places, the time of a step, and what stands in the way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from align.model.lora import left_out
from align.model.sizes import ModelSizes
from align.plan import memory
from align.plan.memory import ELEMENT_BYTES, GIB, GPU_PROCESS, Parts, Training, Work, at_rest, parts_of_layers
from align.plan.placement import Cluster, Demand, place
from align.plan.times import step_seconds
from align.recipe import BFLOAT16_SUMS, MERGED_ADAPTERS, Recipe, Roles
from rollout import FleetOptions

SHARED = "learner.gpus=0.6 rollout.gpus=0.4 rollout.gpu_memory_share=0.45"
THROUGH = {
    "broadcast": "one broadcast from the device of rank 0 to theirs",
    "object_store": "Ray's shared memory: the node of rank 0 holds them twice, those of before included",
    "directory": "files in the run directory, which holds them twice, those of before included",
    "adapter": "the adapter's files in the run directory",
}
"""The way of new weights to the workers, by `weights.transport`."""


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


def make_plan(recipe: Recipe, sizes: ModelSizes, cluster: Cluster) -> Plan:
    """Plan a recipe of any stage. Raises UserError for LoRA targets that the model does not have."""
    work = work_of(recipe.roles(), sizes, ELEMENT_BYTES[recipe.model.dtype])
    worker, scoring, learner = rollout_role(work, cluster), scoring_role(work, cluster), learner_role(work, cluster)
    roles = [role for role in (worker, scoring, learner) if role is not None]
    nodes, unplaced = place(cluster, demands(work.roles, roles))
    refusals = too_few(work.roles, roles, unplaced, cluster)
    if work.training and learner and cluster.gpus:
        refusals += too_much_to_learn(work.training, learner, cluster)
    if worker and work.roles.rollout:
        refusals += too_much_to_sample(work, work.roles.rollout, worker, cluster)
    if not cluster.gpus:
        refusals += too_much_for_the_machine(recipe.machine.memory_gb, roles)
    return Plan(
        roles, nodes, step_seconds(work, worker.parts if worker else None, cluster.gpus_per_node), notes(work), refusals
    )


def work_of(roles: Roles, sizes: ModelSizes, element: int) -> Work:
    """What the processes of a recipe do. Raises UserError for LoRA targets that the model does not have."""
    if roles.learner is None:
        return Work(roles, sizes, element, None, 0, 0)
    lora, trained, sent, beside = roles.learner.lora, sizes.total, sizes.total, 0
    if lora is not None:
        parameters = memory.adapted_parameters(sizes, lora.targets)
        trained, sent = memory.adapter_size(parameters, lora.rank), memory.changed_size(sizes, parameters)
        # In float32 it is in the weights.
        beside = trained if roles.rollout and element != ELEMENT_BYTES["float32"] else 0
        sent = trained if roles.weights and roles.weights.transport == "adapter" else sent + beside
    training = Training(
        sizes=sizes,
        options=roles.learner,
        trained=trained,
        step_tokens=-(-roles.trained_sequences // roles.learner.ranks) * roles.longest,
        longest=roles.longest,
        element=element,
        reference_copy=roles.reference and lora is None,
        # A reward model has a number where a policy has logits.
        logits=roles.trained == "policy",
    )
    return Work(roles, sizes, element, training, sent if roles.rollout else 0, beside)


def demands(recipe: Roles, roles: Sequence[Role]) -> list[Demand]:
    """What needs GPUs, in the order of placement; a colocated worker and rank need one GPU together."""
    separate = [Demand(role.name, role.count, role.gpus) for role in roles]
    if not recipe.colocated:
        return separate
    worker, learner = roles[0], roles[-1]
    pair = Demand(f"{worker.name} and {learner.name}", max(worker.count, learner.count), float(learner.gpus > 0))
    return [pair, *separate[1:-1]]


def learner_role(work: Work, cluster: Cluster) -> Role | None:
    """The learner ranks: a GPU each, or `learner.gpus` of one. Their limit is what rollout workers on the same GPUs leave of it."""
    if work.training is None:
        return None
    limit, rollout, options = cluster.gpu_memory, work.roles.rollout, work.training.options
    if work.roles.colocated and cluster.gpus:
        limit -= GPU_PROCESS
    elif rollout and rollout.gpus < 1:
        limit *= 1 - rollout.gpu_memory_share
    gpus = options.gpus if cluster.gpus else 0
    parts = memory.learner_memory(work.training) | {"process": GPU_PROCESS if gpus else memory.LEARNER_PROCESS}
    return Role("learner rank", options.ranks, gpus, parts, limit)


def rollout_role(work: Work, cluster: Cluster) -> Role | None:
    """The rollout workers: `rollout.tensor_parallel` GPUs of one node each."""
    options = work.roles.rollout
    if options is None:
        return None
    process = {"process": GPU_PROCESS if cluster.gpus else memory.WORKER_PROCESS}
    adapter = float(work.beside * work.element)
    parts = memory.worker_memory(work.sizes, options, work.element, cluster.gpu_memory, adapter) | process
    gpus = options.tensor_parallel * options.gpus if cluster.gpus else 0
    shared = cluster.gpu_memory - GPU_PROCESS if work.roles.colocated else cluster.gpu_memory * options.gpu_memory_share
    return Role("rollout worker", options.workers, gpus, parts, shared)


def scoring_role(work: Work, cluster: Cluster) -> Role | None:
    """The scoring workers. A reward model is taken to be as large as the policy: it is made of it."""
    options = work.roles.scoring
    if options is None:
        return None
    dtypes = [term.params.get("dtype", "float32") for term in work.roles.rewards if term.name == "reward_model"]
    models = float(sum(work.sizes.total * ELEMENT_BYTES[dtype] for dtype in dtypes))
    gpus = options.gpus if cluster.gpus else 0
    process = {"process": GPU_PROCESS if gpus else memory.SCORING_PROCESS}
    parts = ({"reward models": models} if dtypes else {}) | process
    return Role("scoring worker", options.workers, gpus, parts, cluster.gpu_memory * min(gpus, 1))


def too_few(recipe: Roles, roles: Sequence[Role], unplaced: Sequence[str], cluster: Cluster) -> list[str]:
    """The processes that get no GPU, and what to change."""
    if not unplaced:
        return []
    if recipe.colocated:
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
        f"no GPU is left for {', '.join(unplaced)}: the recipe needs {total:g} GPUs, {wanted}, and there are {cluster.gpus}; "
        "lower learner.ranks, rollout.workers, rollout.tensor_parallel or scoring.gpus, take more nodes, or let each rank share "
        f"its GPU with a worker ({SHARED})"
    ]


def too_much_to_learn(training: Training, role: Role, cluster: Cluster) -> list[str]:
    """A learner rank that does not fit its GPU, and the smallest change that helps."""
    if role.total <= role.limit:
        return []
    largest = max(role.parts, key=lambda name: role.parts[name])
    return [
        f"a learner rank needs {gib(role.total)} of {gib(role.limit)}, most of it for {largest} ({gib(role.parts[largest])}): "
        f"{cure(training, role.limit, cluster.gpus_per_node)}"
    ]


def cure(training: Training, limit: float, ranks_to_add: int) -> str:
    """The least change of the recipe, of those that are tried in order, with which a learner rank fits `limit` bytes of a GPU."""

    def needed(training: Training) -> float:
        return sum(memory.learner_memory(training).values()) + GPU_PROCESS

    said: list[str] = []
    if training.reference_copy:
        training = replace(training, reference_copy=False)
        said.append("grpo.kl_coefficient=0 (or adapters), which needs no second model as the reference")
    changes = {"gradient_checkpointing": True, "zero_stage": 3, "micro_batch_tokens": max(2048, training.longest)}
    if training.options.expert_parallel > 1:
        del changes["zero_stage"]  # AutoEP's ZeRO-3 is not used here
    for key, value in changes.items():
        changed = with_option(training, key, value)
        if needed(training) > limit and needed(changed) < needed(training):
            training = changed
            said.append(f"learner.{key}={str(value).lower()}")
    ranks = training.options.ranks
    while needed(training) > limit and training.options.ranks < 100 * ranks:
        training = with_option(training, "ranks", training.options.ranks + ranks_to_add)
    if needed(training) > limit:
        return "no number of ranks helps; shorten the sequences (rollout.max_length), or take GPUs with more memory"
    if training.options.ranks > ranks:
        said.append(f"learner.ranks={training.options.ranks} (or adapters in place of all parameters)")
    return f"it would fit with {', '.join(said)}"


def with_option(training: Training, key: str, value: int) -> Training:
    """The same work with another value of `learner.key`; more ranks have less of it each."""
    options = training.options.model_copy(update={key: value})
    sequences = -(-training.step_tokens * training.options.ranks // (training.longest * options.ranks))
    return replace(training, options=options, step_tokens=sequences * training.longest)


def too_much_to_sample(work: Work, options: FleetOptions, role: Role, cluster: Cluster) -> list[str]:
    """A rollout worker whose weights do not fit, whose cache is too small, or whose GPUs cannot share its heads."""
    found = []
    if cluster.gpus and work.sizes.heads % options.tensor_parallel:
        heads = work.sizes.heads
        found.append(f"rollout.tensor_parallel={options.tensor_parallel} does not divide {heads} attention heads")
    if cluster.gpus and options.gpus < 1 and role.total > role.limit:
        more = "" if work.roles.colocated else "raise rollout.gpu_memory_share, or "
        found.append(
            f"a rollout worker needs {gib(role.total)} of {gib(role.limit)}, its share of a GPU's memory: {more}lower "
            "rollout.kv_cache_gb"
        )
    needed, cache = options.max_length * work.kv_bytes, role.parts["KV cache"]
    if cache < needed:
        more = (
            "raise rollout.tensor_parallel or rollout.gpu_memory_share" if cluster.gpus else "raise rollout.kv_cache_gb"
        )
        found.append(
            f"a rollout worker has {gib(cache)} for its KV cache beside {gib(role.parts['weights'])} of weights, and one sequence of "
            f"rollout.max_length={options.max_length} needs {gib(needed)}: {more}"
        )
    return found


def too_much_for_the_machine(memory_gb: float, roles: Sequence[Role]) -> list[str]:
    """On CPUs everything shares one memory; the recipe says how much of it must be free."""
    total = sum(role.count * role.total for role in roles)
    if total <= memory_gb * GIB:
        return []
    return [
        f"all processes together need {total / GIB:.1f} GiB, and machine.memory_gb is {memory_gb:g}: set it to "
        "that where the machine has it, or lower learner.ranks, rollout.workers, rollout.kv_cache_gb or "
        "learner.micro_batch_tokens"
    ]


def notes(work: Work) -> list[str]:
    """What else a reader needs to know."""
    found = [f"the KV cache takes {work.kv_bytes:,} bytes a token ({work.sizes.kv_a_token:,} elements)"]
    if work.training is None:
        return found
    options = work.training.options
    if work.element < 4 and not options.zero_stage:
        found.append(BFLOAT16_SUMS)
    if work.element < 4 and options.zero_stage == 3 and options.lora is not None:
        found.append(MERGED_ADAPTERS)
    if options.lora is not None and (omitted := left_out(parts_of_layers(work.sizes), options.lora.targets)):
        found.append(omitted)
    whole = gib(work.weight_bytes)
    found.append(f"each learner rank reads the whole model into its node's memory at the start: {whole} a rank")
    if work.roles.colocated:
        rank = gib(at_rest(work.training))
        found.append(f"in turns: at rest, a rank has {rank} in its node's memory, a rollout worker {whole}")
    if work.roles.weights:
        sent, through = gib(work.sent * work.element), THROUGH[work.roles.weights.transport]
        found.append(f"{sent} of new weights go to the workers after an update, through {through}")
    return found


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def as_text(title: str, dtype: str, sizes: ModelSizes, cluster: Cluster, plan: Plan) -> str:
    """The plan of the recipe with that title, a few lines for each question that it answers."""
    lines = [
        f"{title} on {cluster}",
        f"model: {sizes.total:,} parameters, {sizes.active:,} of them for a token, {dtype}",
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
