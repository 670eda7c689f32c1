"""The processes of a recipe: how many of each kind, on which GPUs, and the memory of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from align.model.names import frozen_names
from align.model.sizes import ELEMENT_BYTES, ModelSizes
from align.plan import memory
from align.plan.memory import GPU_PROCESS, Parts, Training, Work, at_rest
from align.plan.placement import Cluster, Demand, Node
from align.recipe import Roles

WORKER, SCORING, LEARNER = "rollout worker", "scoring worker", "learner rank"
PINNED = 1.5
"""What a sleeping worker's weights take of its node's memory, for each byte of them: PyTorch pins a power of two of bytes for each tensor, of
DeepSeek-V2-Lite half as much again as there is, of Qwen3-30B-A3B a third."""


@dataclass(frozen=True, slots=True)
class Role:
    """Processes that are alike, with `parts` in bytes of a GPU each, or of a process on a CPU; `host` bytes of each are in its node's memory."""

    name: str
    count: int
    gpus: float
    parts: Parts
    limit: float
    host: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def work_of(
    roles: Roles, sizes: ModelSizes, element: int, others: Mapping[str, ModelSizes] = MappingProxyType({})
) -> Work:
    """What the processes of a recipe do. `others` has the teacher of a distillation by its path; one that is not known is taken to be as large as the
    policy. Raises UserError for LoRA targets that the model does not have."""
    if roles.learner is None:
        return Work(roles, sizes, element, None, 0, 0)
    lora, trained, sent, beside = roles.learner.lora, sizes.total, sizes.total, 0
    if lora is not None:
        parameters = memory.adapted_parameters(sizes, lora.targets)
        trained, sent = memory.adapter_size(parameters, lora.rank), memory.changed_size(sizes, parameters)
        # In float32 it is in the weights.
        beside = trained if roles.rollout and element != ELEMENT_BYTES["float32"] else 0
        sent = trained if roles.weights and roles.weights.transport == "adapter" else sent + beside
    frozen = frozen_names(sizes.parameters, roles.learner.freeze)
    together = 2 if roles.margins or roles.trained == "reward_model" else 1
    training = Training(
        sizes=sizes,
        options=roles.learner,
        trained=trained - sum(math.prod(sizes.parameters[name]) for name in frozen),
        step_tokens=-(-roles.trained_sequences // (together * roles.learner.ranks)) * together * roles.longest,
        longest=roles.longest,
        element=element,
        reference_copy=roles.reference and lora is None,
        margins=roles.margins,
        teacher=others.get(roles.teacher, sizes) if roles.teacher else None,
        # A reward model has a number where a policy has logits.
        logits=roles.trained == "policy",
        together=together,
    )
    return Work(roles, sizes, element, training, sent if roles.rollout else 0, beside)


def roles_of(work: Work, cluster: Cluster, judges: Mapping[str, ModelSizes]) -> list[Role]:
    """The processes that there are, in the order in which a run starts them. `judges` has reward models by their paths."""
    roles = (rollout_role(work, cluster), scoring_role(work, cluster, judges), learner_role(work, cluster))
    return [role for role in roles if role is not None]


def demands(colocated: bool, roles: Sequence[Role]) -> list[Demand]:
    """What needs GPUs, in the order of placement; a worker and a rank that are colocated need one GPU together."""
    if not colocated:
        return [Demand({role.name: role.count}, role.gpus) for role in roles]
    worker, learner = roles[0], roles[-1]
    together = Demand({role.name: role.count for role in (worker, learner)}, float(learner.gpus > 0))
    return [together, *demands(False, roles[1:-1])]


def host_memory(node: Node, roles: Sequence[Role], work: Work) -> float:
    """Bytes of a node's memory that the processes on it take at most, what is at rest there among them.

    Rank 0 has the whole model at the start and where it is saved, and under ZeRO-3 that which rounded weights were made of; Ray's store has the weights twice wherever they are sent or loaded, and the
    experts of a step's tokens.
    """
    on_rank_0 = work.training is not None and work.training.options.zero_stage == 3
    total = sum(role.host * len(node.held.get(role.name, ())) for role in roles)
    if 0 in node.held.get(LEARNER, ()):
        total += work.read_bytes * memory.READING + (work.unrounded_bytes if on_rank_0 else 0)
    if WORKER in node.held or 0 in node.held.get(LEARNER, ()):
        total += work.stored_bytes + work.route_bytes
    return total


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
    parts = memory.learner_memory(work.training, on_gpu=bool(gpus)) | {
        "process": GPU_PROCESS if gpus else memory.LEARNER_PROCESS
    }
    if not gpus:
        parts["unrounded weights"] = work.unrounded_bytes / (options.ranks if options.zero_stage == 3 else 1)
    resting = at_rest(work.training) if work.roles.colocated else 0
    waiting = work.unrounded_bytes if gpus and options.zero_stage < 3 else 0
    return Role(LEARNER, options.ranks, gpus, parts, limit, memory.LEARNER_PROCESS + resting + waiting)


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
    resting = PINNED * work.weight_bytes if work.roles.colocated else 0
    return Role(WORKER, options.workers, gpus, parts, shared, memory.WORKER_PROCESS + resting)


def scoring_role(work: Work, cluster: Cluster, judges: Mapping[str, ModelSizes]) -> Role | None:
    """The scoring workers, each with all reward models; one that is not known is taken to be as large as the policy, of which it is made."""
    options = work.roles.scoring
    if options is None:
        return None
    models = [term.params for term in work.roles.rewards if term.name == "reward_model"]
    sizes = [judges.get(str(model.get("path")), work.sizes).total for model in models]
    held = float(sum(n * ELEMENT_BYTES[m.get("dtype", "float32")] for n, m in zip(sizes, models, strict=True)))
    gpus = options.gpus if cluster.gpus else 0
    process = {"process": GPU_PROCESS if gpus else memory.SCORING_PROCESS}
    parts = ({"reward models": held} if models else {}) | process
    host = memory.SCORING_PROCESS + (0 if gpus else held)
    return Role(SCORING, options.workers, gpus, parts, cluster.gpu_memory * min(gpus, 1), host)
