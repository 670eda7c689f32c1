"""What stands in the way of a recipe on a cluster, and the smallest changes that help."""

from collections.abc import Sequence
from dataclasses import replace

from align.model.sizes import GIB, gib, lacks_cache
from align.plan import memory
from align.plan.memory import GPU_PROCESS, Training, Work
from align.plan.placement import Cluster
from align.plan.roles import WORKER, Role
from align.recipe import Roles
from rollout import FleetOptions


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
    widest = max(roles, key=lambda role: role.gpus)
    if widest.gpus > cluster.gpus_per_node:
        key = "rollout.tensor_parallel" if widest.name == WORKER else "scoring.gpus"
        return [
            f"a {widest.name} needs {widest.gpus:g} GPUs of one node, and a node has {cluster.gpus_per_node}: lower {key}"
        ]
    return [
        f"no GPU is left for {', '.join(unplaced)}: the recipe needs {total:g} GPUs, {wanted}, and there are {cluster.gpus}; "
        "lower learner.ranks, rollout.workers, rollout.tensor_parallel or scoring.gpus, or take more nodes"
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
        return sum(memory.learner_memory(training, on_gpu=True).values()) + GPU_PROCESS

    said: list[str] = []
    if training.reference_copy and not training.margins:
        training = replace(training, reference_copy=False)
        said.append("grpo.kl_coefficient=0 (or adapters), which needs no second model as the reference")
    changes = {
        "gradient_checkpointing": True,
        "zero_stage": 3,
        "micro_batch_tokens": max(2048, training.longest_together),
    }
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
    least = training.longest_together
    shares = -(-training.step_tokens * training.options.ranks // (least * options.ranks))
    return replace(training, options=options, step_tokens=shares * least)


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
        given = options.gpus < 1 or not cluster.gpus
        more = "raise rollout.kv_cache_gb" if given else "raise rollout.tensor_parallel or rollout.gpu_memory_share"
        weights = f" beside {gib(role.parts['weights'])} of weights"
        found.append(lacks_cache(options.max_length, needed, cache, more, weights))
    return found


def too_much_to_score(role: Role) -> list[str]:
    """Reward models that do not fit the GPU of a scoring worker, which uses one."""
    if not role.gpus or role.total <= role.limit:
        return []
    return [
        f"a scoring worker needs {gib(role.total)} of {gib(role.limit)}, and each has all reward models: take smaller ones, or "
        "dtype: bfloat16 among their params"
    ]


def too_much_for_the_nodes(nodes: Sequence[float], cluster: Cluster) -> list[str]:
    """Nodes whose own memory does not hold what processes keep there, which is given in bytes."""
    needed = max(nodes)
    if needed <= cluster.node_memory:
        return []
    return [
        f"node {nodes.index(needed)} needs {gib(needed)} of {gib(cluster.node_memory)} of its own memory (--node-memory says how "
        "much a node has): lower learner.ranks and rollout.workers, send weights by weights.transport: broadcast, or leave out colocate"
    ]


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
