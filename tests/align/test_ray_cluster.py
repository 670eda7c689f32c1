"""A job on a Ray cluster of two nodes, both on this machine, with token authentication."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
TINY = ["init_from=null", "grpo.steps=1", "grpo.prompts_per_step=4", "grpo.group_size=2", "evaluation.limit=4"]
TINY += ["evaluation.samples=0", "rollout.workers=1", "rollout.batch_sequences=8", "rollout.kv_cache_gb=0.1"]
PLACES = ["learner.resources={learners: 1}", "rollout.resources={samplers: 1}"]


@dataclass(frozen=True, slots=True)
class Ray:
    """A running cluster: where jobs are handed in, and the environment of its nodes and users."""

    dashboard: str
    environment: dict[str, str]

    def submit(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Hand in a job and wait for its end. On a busy machine a node's agent, which starts jobs, is there later than the node."""
        for _ in range(30):
            done = subprocess.run(
                [RAY, "job", "submit", "--address", self.dashboard, "--", *command],
                env=self.environment | environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=300,
            )
            if "No available agent to submit job" not in done.stderr:
                break
            time.sleep(2)
        return done

    def run(self, recipe: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self.submit("env", "-C", str(ROOT), sys.executable, "-m", "align.cli", "grpo", recipe, *overrides)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text(secrets.token_hex(32))
    environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "NO_COLOR": "1"}
    port, dashboard = free_port(), free_port()
    store = ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        head = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={directory}"]
        head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", '--resources={"learners": 2}']
        second = [f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.2", '--resources={"samplers": 1}']
        with open(Path(directory) / "start.log", "w") as log:
            nodes = [start([*head, *store], environment, log)]
            ray = Ray(f"http://127.0.0.1:{dashboard}", environment)
            try:
                wait_for(ray, nodes=1)
                nodes.append(start([*second, *store], environment, log))
                wait_for(ray, nodes=2)
                yield ray
            finally:
                stop(nodes)


def start(arguments: list[str], environment: dict[str, str], log: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([RAY, "start", *arguments], env=environment, cwd=ROOT, stdout=log, stderr=log)  # type: ignore[call-overload]


def stop(nodes: list[subprocess.Popen[bytes]]) -> None:
    """End the nodes, the last first, with all that they started."""
    families = [psutil.Process(node.pid).children(recursive=True) for node in nodes if node.poll() is None]
    for node in reversed(nodes):
        node.terminate()
    for node in nodes:
        node.wait(timeout=60)
    _, alive = psutil.wait_procs([p for family in families for p in family], timeout=20)
    for process in alive:
        process.kill()


def wait_for(ray: Ray, nodes: int) -> None:
    """Return when the cluster has so many nodes."""
    for _ in range(90):
        listed = subprocess.run(
            [RAY, "list", "nodes", "--address", ray.dashboard, "--format=json"],
            env=ray.environment,
            capture_output=True,
            text=True,
        )
        # Before the first node has reported itself there are words in place of JSON.
        if listed.returncode == 0 and listed.stdout.startswith("[") and len(json.loads(listed.stdout)) == nodes:
            return
        time.sleep(1)
    raise AssertionError(f"{listed.stdout}{listed.stderr}")


@pytest.mark.slow
def test_a_job_trains_with_learners_on_one_node_and_workers_on_the_other(cluster: Ray, tmp_path: Path) -> None:
    done = cluster.run("recipes/nano/grpo.yaml", f"run.dir={tmp_path / 'run'}", *TINY, *PLACES)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    listed = subprocess.run(
        [RAY, "list", "actors", "--address", cluster.dashboard, "--format=json", "--detail"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    where: dict[str, set[str]] = {}
    for actor in json.loads(listed.stdout):
        where.setdefault(actor["class_name"], set()).add(actor["node_id"])
    assert len(where["PolicyRank"]) == len(where["RolloutWorker"]) == 1
    assert where["PolicyRank"] != where["RolloutWorker"]


@pytest.mark.slow
def test_a_job_whose_recipe_is_wrong_fails_and_says_why(cluster: Ray, tmp_path: Path) -> None:
    done = cluster.run("recipes/nano/grpo.yaml", f"run.dir={tmp_path / 'run'}", "grpo.stepz=1")
    assert done.returncode != 0
    assert "failed" in (done.stdout + done.stderr).lower()
    assert "did you mean 'steps'?" in done.stdout


@pytest.mark.slow
def test_jobs_know_that_their_cluster_asks_for_a_token(cluster: Ray) -> None:
    done = cluster.submit("printenv", "RAY_AUTH_MODE")
    assert done.returncode == 0
    assert "\ntoken\n" in done.stdout


@pytest.mark.slow
def test_without_the_token_nothing_is_accepted(cluster: Ray, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    done = cluster.submit("true", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode != 0
