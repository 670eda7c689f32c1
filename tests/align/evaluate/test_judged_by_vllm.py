"""A judged benchmark against vLLM's own server, with the policy that it judges."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from align.evaluate.hooks import PolicyCheckpoint, run
from align.recipe import ModelOptions
from rollout import Fleet
from rollout.worker import environment

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 101, "category": "math", "turns": ["1+1?", "And 2+2?"], "reference": ["2", "4"]},
]


@contextmanager
def served(policy: ModelOptions, log: Path) -> Iterator[str]:
    """vLLM's own server with a policy called "nano", until it is not needed any more."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy.path]
    command += ["--served-model-name", "nano", "--host", "127.0.0.1", "--port", str(port), "--dtype", policy.dtype]
    command += ["--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
    if not torch.cuda.is_available():
        command += ["--attention-backend", "CPU_MLA", "--kv-cache-memory-bytes", str(2**28)]
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=os.environ | environment(2), stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 300
            while not healthy(port):
                assert server.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_a_policy_served_by_vllm_can_judge_itself(
    policy: ModelOptions, checkpoint: PolicyCheckpoint, nano_fleet: Fleet, tmp_path: Path
) -> None:
    """A judge with random weights says nothing that can be read, and that is what is reported."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    with served(policy, tmp_path / "server.log") as url:
        judge = {"base_url": url, "model": "nano", "max_tokens": 16}
        given = {"benchmark": "mt_bench", "questions": str(questions), "judge": judge, "max_new_tokens": 8}
        metrics = run("judged", checkpoint, nano_fleet, given)
    assert metrics.values["mt_bench/failed"] == 0.0
    assert metrics.values["mt_bench/unreadable"] == 1.0
    assert metrics.not_run.keys() == {"mt_bench"}
