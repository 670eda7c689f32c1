"""A million conversations, a gigabyte of JSON lines: the first step comes soon, and the driver's memory stays small."""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
ROWS = 1_000_000
FIRST_STEP_S = 120
DRIVER_BYTES = 2 * 10**9
WORDS = "the sea is wide and ships go far to bring home salt, wool, tea or a letter that somebody wrote"
SMALL = [
    "sft={steps: 3, sequences_per_step: 8, validation_limit: 8}",
    "evaluation={limit: 8, max_new_tokens: 16, before: false}",
    "rewards=[]",
    "rollout={workers: 1, max_length: 2048, kv_cache_gb: 0.5}",
    "learner.ranks=1",
]


def write_chats(file: Path, rows: int) -> None:
    """Conversations of one or two questions, each its own, of a kilobyte each."""
    draw = random.Random(0)
    words = WORDS.split()
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(1000)]
    with file.open("w") as out:
        for number in range(rows):
            turns = [{"role": "system", "content": "Be brief."}] if number % 5 == 0 else []
            for turn in range(1 + number % 2):
                asked = f"Question {number}.{turn}: {texts[number * 7 % 1000]}?"
                answer = " ".join(texts[(number + place) % 1000] for place in range(3 - number % 2))
                turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns, "source": "made up"}) + "\n")


@pytest.mark.slow
def test_a_million_conversations_are_trained_on_soon_and_in_little_memory(tmp_path: Path) -> None:
    file, run = tmp_path / "chat.jsonl", tmp_path / "run"
    write_chats(file, ROWS)
    command = ["sft", "recipes/nano/sft.yaml", f"run.dir={run}", f"data={{path: {file}}}", *SMALL]
    started, first, worked = time.monotonic(), None, 0.0
    with subprocess.Popen(
        [sys.executable, "-m", "align.cli", *command], cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}
    ) as process:
        driver, most = psutil.Process(process.pid), 0
        while process.poll() is None:
            with suppress(psutil.Error):
                most = max(most, driver.memory_info().rss)
                worked = worked if first else driver.cpu_times().user
            if first is None and (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size:
                first = time.monotonic() - started
            time.sleep(0.1)
    told = f"first step after {first} s, of which the driver worked {worked} s, and had {most / 1e9:.2f} GB at most"
    print(f"{file.stat().st_size / 1e9:.2f} GB: {told}")
    assert process.returncode == 0
    assert first is not None
    assert first < FIRST_STEP_S
    assert most < DRIVER_BYTES
