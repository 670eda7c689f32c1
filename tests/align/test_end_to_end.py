"""The nano recipes at their smallest size, with the real Ray, vLLM and DeepSpeed."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoModelForCausalLM

from align.cli import main
from align.recipe import load_recipe
from align.report import write_report

ROOT = Path(__file__).parents[2]
STEPS = 3
EVALUATION = "evaluation={limit: 8, samples: 2, max_new_tokens: 16}"
DATA = "data={card: nano_math, limit: 64}"
SFT = [
    "sft={steps: 3, sequences_per_step: 16, validation_limit: 8}",
    "learner.ranks=1",
    DATA,
    EVALUATION,
    "rollout.workers=1",
]
SMALL = [f"grpo.steps={STEPS}", "grpo.prompts_per_step=8", "grpo.group_size=4", "learner.ranks=1", DATA, EVALUATION]
SMALL += ["rollout.batch_sequences=8", "rollout.max_length=512", "scoring.workers=1", "machine={}"]
SMALL += ["evaluation.hooks=[{name: needle, params: {lengths: [400], depths: [0.5], per_cell: 2}}]"]


@pytest.fixture(scope="module")
def here(ray_session: None) -> Iterator[Callable[..., int]]:
    """`align` with these arguments in this process, on the Ray and the warm processes of the session; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.session.session.local_ray", lambda *_: nullcontext())
        yield lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, here: Callable[..., int]) -> Path:
    """SFT, then GRPO with two rollout workers, in one command."""
    directory = tmp_path_factory.mktemp("runs")
    sft = load_recipe(ROOT / "recipes" / "nano" / "sft.yaml", SFT)
    (directory / "sft.yaml").write_text(yaml.safe_dump(sft.model_dump(mode="json", exclude_unset=True)))
    command = ["grpo", "recipes/nano/grpo.yaml", f"run.dir={directory / 'nano'}", f"init_from={directory / 'sft.yaml'}"]
    assert here(*command, *SMALL) == 0
    return directory / "nano"


def steps_of(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if "agreement/max" in line]


def test_sampler_and_learner_agree_at_every_step(run: Path) -> None:
    steps = steps_of(run)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line["agreement/max"] <= 1e-4 for line in steps)


def test_each_sample_carries_the_version_of_the_weights_that_drew_it(run: Path) -> None:
    for step in (1, 2):
        samples = pq.read_table(run / "samples" / f"step_{step:05d}.parquet").to_pylist()
        assert len(samples) == 32
        assert {sample["weight_version"] for sample in samples} == {step}  # 1 is what SFT trained
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


def test_the_stored_samples_of_a_run_are_scored_by_another_reward(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def short(completions, messages): return [1 / (1 + len(c)) for c in completions]\n")
    assert main(["score", str(run), "--reward", f"{file}:short"]) == 0
    assert "step 1: " in capsys.readouterr().out
    assert len((run / "scores" / "short.jsonl").read_text().splitlines()) == STEPS * 32


OTHERWISE = {
    "weights in files": ["weights={transport: directory, bucket_mb: 0.5}"],
    "weights broadcast": ["weights={transport: broadcast, bucket_mb: 0.5}"],
    "taking turns": ["colocate=true"],
}


@pytest.fixture
def other(run: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Directory and arguments of the GRPO run on its own, with one rollout worker, from the policy that SFT has trained."""
    start = ["init_from=null", f"model={{path: {run / 'sft' / 'final'}}}", "rollout.workers=1", "save_every=1"]
    return tmp_path / "other", ["grpo", "recipes/nano/grpo.yaml", f"run.dir={tmp_path / 'other'}", *SMALL, *start]


def status_of(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text())["state"])


def assert_same(run: Path, other: Path) -> None:
    """Samples, measures and weights of both, to the last bit."""
    for step in range(1, STEPS + 1):
        one, two = (pq.read_table(path / "samples" / f"step_{step:05d}.parquet") for path in (run, other))
        counted = ["weight_version", "weight_versions"]  # from the start of SFT there, of GRPO here
        assert one.drop_columns(counted).equals(two.drop_columns(counted))
    exact = ("loss", "reward", "entropy", "gradient_norm", "agreement/mean", "agreement/max")
    assert [[s[key] for key in exact] for s in steps_of(run)] == [[s[key] for key in exact] for s in steps_of(other)]
    assert (run / "final/model.safetensors").read_bytes() == (other / "final/model.safetensors").read_bytes()


def test_stopped_by_ctrl_c_and_with_one_worker_it_is_the_same_to_the_last_bit(
    run: Path, other: tuple[Path, list[str]], here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, command = other

    def stop_after_step_1() -> None:
        while not (directory / "checkpoints" / "step_00001").is_dir():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=stop_after_step_1, daemon=True).start()
    assert here(*command, *OTHERWISE["weights in files"]) == 130
    assert "interrupted: everything was stopped" in "".join(capsys.readouterr())
    assert status_of(directory) == "interrupted"

    assert here("resume", directory) == 0
    assert "resuming from step" in "".join(capsys.readouterr())
    assert list((directory / "weights").glob("*")) == []
    assert_same(run, directory)


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHERWISE)
def test_killed_and_stopped_by_ctrl_c_it_leaves_no_process_and_is_the_same_to_the_last_bit(
    way: str, run: Path, other: tuple[Path, list[str]], align: Callable[..., Any], here: Callable[..., int]
) -> None:
    directory, arguments = other

    def until_step(number: int) -> tuple[Any, list[psutil.Process]]:
        """The command, and all processes that it has started."""
        command = align(*arguments, *OTHERWISE[way])
        command.until((directory / "checkpoints" / f"step_{number:05d}").is_dir)
        return command, command.family()

    command, children = until_step(1)
    command.process.kill()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert status_of(directory) == "running"

    command, children = until_step(2)
    assert len(children) > 4
    os.killpg(command.process.pid, signal.SIGINT)
    output = command.ends(130)
    assert "resuming from step 1" in output
    assert output.rstrip().endswith("interrupted: everything was stopped")
    assert "Traceback" not in output
    assert psutil.wait_procs(children, timeout=20)[1] == []
    assert status_of(directory) == "interrupted"

    assert here("resume", directory) == 0
    assert list((directory / "weights").glob("*")) == []
    assert_same(run, directory)


def test_servers_listen_on_loopback_alone(ray_session: None) -> None:
    """Ray's; learner ranks meet at their node's address."""
    import ray

    ray.get(ray.remote(lambda: None).remote())
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    ranks = ("ray::PolicyRank", "ray::RewardModelRank")
    processes = [process for process in processes if not "".join(process.cmdline()).startswith(ranks)]
    listening = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening
    assert all(address.removeprefix("::ffff:") in ("127.0.0.1", "::1") for address in listening)
