"""The nano recipes at their smallest size, with the real Ray, vLLM and DeepSpeed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from align.report import write_report

ROOT = Path(__file__).parents[2]
SMALL = ["grpo.steps=2", "grpo.prompts_per_step=8", "grpo.group_size=4", "evaluation.limit=16", "evaluation.samples=2"]
SMALL += ["rollout.batch_sequences=8", "init_from=null", "rollout.max_length=512"]
SMALL += ["evaluation.hooks=[{name: needle, params: {lengths: [400], depths: [0.5], per_cell: 2}}]"]


def command(directory: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "align.cli", "grpo", "recipes/nano/grpo.yaml", f"run.dir={directory}", *overrides]


def finished_run(directory: Path, *overrides: str) -> Path:
    done = subprocess.run(
        command(directory, *SMALL, *overrides),
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "nano")


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "agreement/max" in line]


def test_sampler_and_learner_agree_at_every_step(run: Path) -> None:
    steps = steps_of(run)
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["agreement/max"] <= 1e-4 for line in steps)


def test_each_sample_carries_the_version_of_the_weights_that_drew_it(run: Path) -> None:
    for step in (1, 2):
        samples = pq.read_table(run / "samples" / f"step_{step:05d}.parquet").to_pylist()
        assert len(samples) == 32
        assert {sample["weight_version"] for sample in samples} == {step - 1}
        assert all(len(sample["token_ids"]) == len(sample["log_probs"]) for sample in samples)


def test_the_final_policy_is_an_ordinary_checkpoint(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert model.config.model_type == "deepseek_v2"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_what_the_recipe_asks_after_the_stage_is_measured_and_recorded(run: Path) -> None:
    records = {line["name"]: line for line in map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())}
    assert records["needle"]["recall"] == 0.0
    assert len(pq.read_table(run / "evaluations" / "needle.parquet")) == 2


def test_the_report_shows_every_stage_evaluation_and_sample(run: Path) -> None:
    page = write_report(run).read_text()
    assert all(text in page for text in ("after GRPO", "needle", "agreement", "What is"))
    assert "| needle |" in (run / "report.md").read_text()


def test_the_final_policy_answers_a_users_own_file(run: Path, tmp_path: Path) -> None:
    problems = [
        {"id": "a", "prompt": "What is 1 + 1?", "answer": "2"},
        {"id": "b", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"},
    ]
    data, out = tmp_path / "problems.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    arguments = ["eval", "--model", str(run / "final"), "--data", str(data), "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "align.cli", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b"]
    assert all({"completion", "reward", "verdict"} <= answer.keys() for answer in answers)
    assert "% of 2 right" in done.stdout


OTHERWISE = {
    "weights in files": ["weights={transport: directory, bucket_mb: 0.5}"],
    "weights broadcast": ["weights={transport: broadcast, bucket_mb: 0.5}"],
    "taking turns": ["colocate=true"],
}


@pytest.mark.parametrize(
    "way", [name if "files" in name else pytest.param(name, marks=pytest.mark.slow) for name in OTHERWISE]
)
def test_the_same_seed_with_one_worker_and_otherwise_is_the_same_to_the_last_bit(
    way: str, run: Path, tmp_path: Path
) -> None:
    other = finished_run(tmp_path / "one", "rollout.workers=1", *OTHERWISE[way])
    assert list((other / "weights").glob("*")) == []
    for step in (1, 2):
        name = f"samples/step_{step:05d}.parquet"
        assert pq.read_table(run / name).equals(pq.read_table(other / name))
    exact = ("loss", "reward", "entropy", "gradient_norm", "agreement/mean", "agreement/max")
    assert [[s[key] for key in exact] for s in steps_of(run)] == [[s[key] for key in exact] for s in steps_of(other)]
    assert (run / "final/model.safetensors").read_bytes() == (other / "final/model.safetensors").read_bytes()


def test_ctrl_c_stops_every_process_and_says_so(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = subprocess.Popen(
        command(directory, *SMALL, "grpo.steps=100"),
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    family = psutil.Process(process.pid)
    metrics = directory / "metrics.jsonl"
    while not (metrics.exists() and '"agreement/max"' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.5)
    children = family.children(recursive=True)
    assert len(children) > 4
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.rstrip().endswith("interrupted: everything was stopped")
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    assert json.loads((directory / "status.json").read_text())["state"] == "interrupted"


def test_servers_listen_on_loopback_alone(ray_session: None) -> None:
    import ray

    ray.get(ray.remote(lambda: None).remote())
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening
    assert all(address.removeprefix("::ffff:") in ("127.0.0.1", "::1") for address in listening)
