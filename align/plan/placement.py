"""Which process gets which GPUs: in the order in which a run starts them, each on the first node that has room."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from align.errors import UserError
from align.plan.memory import GIB


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes that are all alike; `gpu_memory` in bytes. Without GPUs it is one machine and everything runs on its CPUs."""

    nodes: int
    gpus_per_node: int
    gpu_memory: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        if not self.gpus:
            return "one machine without GPUs"
        nodes = "one node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{nodes} of {self.gpus_per_node} GPUs with {self.gpu_memory / GIB:g} GiB each"


@dataclass(frozen=True, slots=True)
class Demand:
    """`count` processes that need `gpus` each, on one node; a share below 1 is of a GPU that others may have the rest of."""

    role: str
    count: int
    gpus: float


def cluster_of(nodes: int, gpus_per_node: int, gpu_memory_gib: float) -> Cluster:
    """The cluster that a command names. Raises UserError."""
    if nodes < 1 or gpus_per_node < 0:
        raise UserError("--nodes is at least 1, --gpus-per-node at least 0")
    if gpus_per_node == 0 and nodes > 1:
        raise UserError("--gpus-per-node 0 plans one machine without GPUs: --nodes must be 1")
    if gpus_per_node and gpu_memory_gib <= 0:
        raise UserError("--gpu-memory says how many GiB each GPU has, for example --gpu-memory 80")
    return Cluster(nodes, gpus_per_node, gpu_memory_gib * GIB)


def place(cluster: Cluster, demands: Sequence[Demand]) -> tuple[list[str], list[str]]:
    """A line for each node, and the roles of which something found no room."""
    free = [[1.0] * cluster.gpus_per_node for _ in range(cluster.nodes)]
    held: list[dict[str, list[int]]] = [{} for _ in free]
    unplaced = []
    for demand in demands:
        for index in range(demand.count):
            node = next((n for n, gpus in enumerate(free) if take(gpus, demand.gpus)), None)
            if node is None:
                unplaced.append(demand.role)
                break
            held[node].setdefault(demand.role, []).append(index)
    lines = []
    for number, roles in enumerate(held):
        parts = [f"{role} {span(indices)}" for role, indices in roles.items()]
        idle = sum(share == 1.0 for share in free[number])
        lines.append(
            f"node {number}: {', '.join(parts) or 'nothing'}" + (f"; {idle} GPUs idle" if idle and cluster.gpus else "")
        )
    return lines, unplaced


def take(gpus: list[float], wanted: float) -> bool:
    """Take `wanted` of a node's GPUs, in place, where it has them: whole ones, or a share of the fullest that suffices."""
    whole = math.floor(wanted)
    if wanted == whole:
        idle = [i for i, share in enumerate(gpus) if share == 1.0][:whole]
        if len(idle) < whole:
            return False
        for i in idle:
            gpus[i] = 0.0
        return True
    fitting = [i for i, share in enumerate(gpus) if share >= wanted - 1e-9]
    if not fitting:
        return False
    gpus[min(fitting, key=lambda i: gpus[i])] -= wanted
    return True


def span(indices: Sequence[int]) -> str:
    """`[3, 4, 5]` -> `3-5`: processes of a role are placed one after the other."""
    return str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
