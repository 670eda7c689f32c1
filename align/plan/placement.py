"""Which process gets which GPUs: in the order in which a run starts them, each on the first node that has room."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from align.errors import UserError
from align.model.sizes import GIB
from align.recipe.roles import take

NODE_MEMORY_GIB = 1000.0
"""What is taken for a node where nobody says more: nodes of eight 80 GB GPUs have from 1 to 2 TB."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes that are all alike, memories in bytes. Without GPUs it is one machine and everything runs on its CPUs."""

    nodes: int
    gpus_per_node: int
    gpu_memory: float
    node_memory: float = NODE_MEMORY_GIB * GIB

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        if not self.gpus:
            return "one machine without GPUs"
        nodes = "one node" if self.nodes == 1 else f"{self.nodes} nodes"
        gpus = "one GPU" if self.gpus_per_node == 1 else f"{self.gpus_per_node} GPUs"
        return f"{nodes} of {gpus} with {self.gpu_memory / GIB:g} GiB each"


@dataclass(frozen=True, slots=True)
class Demand:
    """Processes that need `gpus` each, on one node; a share below 1 is of a GPU that others may have the rest of.

    `counts` of each role: where there are several roles, the processes of a number have the GPUs together.
    """

    counts: Mapping[str, int]
    gpus: float


@dataclass(slots=True)
class Node:
    """The processes that are placed on a node, by role, and what is free of each of its GPUs."""

    free: list[float]
    held: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        idle = sum(share == 1.0 for share in self.free)
        roles = ", ".join(f"{role} {span(indices)}" for role, indices in self.held.items())
        return (roles or "nothing") + (f"; {idle} GPUs idle" if idle else "")


def cluster_of(
    nodes: int, gpus_per_node: int, gpu_memory_gib: float, node_memory_gib: float = NODE_MEMORY_GIB
) -> Cluster:
    """The cluster that a command names. Raises UserError."""
    if nodes < 1 or gpus_per_node < 0:
        raise UserError("--nodes is at least 1, --gpus-per-node at least 0")
    if gpus_per_node == 0 and nodes > 1:
        raise UserError("--gpus-per-node 0 plans one machine without GPUs: --nodes must be 1")
    if gpus_per_node and gpu_memory_gib <= 0:
        raise UserError("--gpu-memory says how many GiB each GPU has, for example --gpu-memory 80")
    return Cluster(nodes, gpus_per_node, gpu_memory_gib * GIB, node_memory_gib * GIB)


def place(cluster: Cluster, demands: Sequence[Demand]) -> tuple[list[Node], list[str]]:
    """The nodes with what is placed on them, and the roles of which something found no room."""
    nodes = [Node([1.0] * cluster.gpus_per_node) for _ in range(cluster.nodes)]
    unplaced: list[str] = []
    for demand in demands:
        for index in range(max(demand.counts.values())):
            node = next((node for node in nodes if take(node.free, demand.gpus)), None)
            if node is None:
                unplaced += demand.counts
                break
            for role, count in demand.counts.items():
                if index < count:
                    node.held.setdefault(role, []).append(index)
    return nodes, unplaced


def span(indices: Sequence[int]) -> str:
    """`[3, 4, 5]` -> `3-5`: processes of a role are placed one after the other."""
    return str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
