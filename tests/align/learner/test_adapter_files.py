"""An adapter sent alone: vLLM adds it to the weights that it has, and then samples as the learner computes."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from align.learner.group import LearnerGroup
from align.recipe import LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions
from rollout import AdapterSync, Fleet, FleetOptions, WeightUpdateError

from ..small_models import save_llama
from .engines import Engines, Perturb

RANK = 4
FLEET = FleetOptions(workers=1, max_length=64, kv_cache_gb=0.25, batch_sequences=16, adapter_rank=RANK)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    """A model without experts: with them, vLLM's adapters want a GPU."""
    directory = tmp_path_factory.mktemp("llama")
    save_llama(directory, intermediate_size=256)
    return ModelOptions(path=str(directory))


@pytest.fixture(scope="module")
def engines(dense: ModelOptions, ray_session: None) -> Iterator[Engines]:
    fleet = Fleet(dense.path, "float32", FLEET, stop_token_ids=[2])
    lora = LoraOptions(rank=RANK, targets=["all-linear"])
    options = LearnerOptions(ranks=1, zero_stage=0, optimizer=OptimizerOptions(learning_rate=1e-3), lora=lora)
    learner = LearnerGroup(dense, options, seed=0)
    fleet.wait_until_ready()
    learner.wait_until_ready()
    yield Engines(fleet, learner)
    learner.close()
    fleet.close()


def test_sampler_and_learner_agree_with_each_adapter(engines: Engines, perturb: Perturb, tmp_path: Path) -> None:
    assert engines.apart.mean < 1e-5
    for version in (1, 2):
        perturb(engines.learner, version)
        assert engines.apart.mean > 1e-3
        adapter = AdapterSync(tmp_path / str(version)).publish(engines.learner)
        engines.fleet.load(adapter, version)
        assert engines.apart.mean < 1e-5
    trained = sum(p.numel() for p in read_adapter(adapter.directory).values())
    assert adapter.sent_bytes == pytest.approx(4 * trained, rel=0.1)


@pytest.mark.slow
def test_a_new_worker_gets_the_last_adapter(engines: Engines, perturb: Perturb, tmp_path: Path) -> None:
    for version in (3, 4):
        perturb(engines.learner, version)
        engines.fleet.load(AdapterSync(tmp_path / str(version)).publish(engines.learner), version)
    process = engines.fleet.workers[0].process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    assert engines.apart.mean < 1e-5
    assert engines.fleet.workers[0].process != process
    # The one before is gone since its successor is there.
    assert not list((tmp_path / "3").iterdir())


def test_an_adapter_that_is_larger_than_there_is_room_for_is_refused(engines: Engines, tmp_path: Path) -> None:
    adapter = AdapterSync(tmp_path).publish(engines.learner)
    file = adapter.directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 16}))
    with pytest.raises(WeightUpdateError, match=r"vLLM refused the adapter.*rank 16"):
        engines.fleet.load(adapter, 9)


def read_adapter(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")
