"""The example files for a cluster: Ray's launcher accepts the one, the recipe fits the other, and both ask for a token."""

from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from align.cli import main

CLUSTER = Path(__file__).parents[2] / "docs" / "cluster"


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def test_rays_launcher_accepts_the_cluster_file() -> None:
    validate_config(prepare_config(read("ray_cluster.yaml")))


def test_every_node_is_started_with_token_authentication() -> None:
    cluster = read("ray_cluster.yaml")
    starts = [c for key in ("head", "worker") for c in cluster[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_nodes_of_the_rayjob_hold_its_recipe() -> None:
    job = read("rayjob.yaml")["spec"]
    groups = job["rayClusterSpec"]
    limits = groups["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    nodes = 1 + sum(group["replicas"] for group in groups["workerGroupSpecs"])
    recipe = next(word for word in job["entrypoint"].split() if word.startswith("recipes/"))
    cluster = ["--nodes", str(nodes), "--gpus-per-node", str(limits["nvidia.com/gpu"]), "--gpu-memory", "80"]
    assert main(["plan", recipe, *cluster, "--node-memory", limits["memory"].removesuffix("Gi")]) == 0
