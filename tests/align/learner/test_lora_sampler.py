"""Adapters and the sampler: an update of the modules that changed arrives, keeps the rest, and is checked like a whole one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.learner.group import LearnerGroup
from align.recipe import LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions
from rollout import Fleet, FleetOptions, WeightUpdateError, stored

from .engines import Engines, Perturb

FLEET = FleetOptions(workers=1, max_length=64, kv_cache_gb=0.25, batch_sequences=16)


@pytest.fixture(scope="module")
def fleet(policy: ModelOptions, ray_session: None) -> Iterator[Fleet]:
    fleet = Fleet(policy.path, "float32", FLEET, stop_token_ids=[2])
    yield fleet
    fleet.close()


@pytest.fixture(
    scope="module",
    params=[["attention+shared", "kv_b_proj"], ["experts.down_proj", "mlp.gate"]],
    ids=["attention and shared experts", "routed experts and router"],
)
def engines(request: pytest.FixtureRequest, policy: ModelOptions, fleet: Fleet) -> Iterator[Engines]:
    """A sampler that has just loaded the base, and a learner of adapters on it."""
    options = LearnerOptions(
        ranks=1,
        zero_stage=0,
        optimizer=OptimizerOptions(learning_rate=1e-3),
        lora=LoraOptions(rank=4, targets=request.param),
    )
    learner = LearnerGroup(policy, options, seed=0)
    learner.wait_until_ready()
    fleet.load(stored(load_file(Path(policy.path) / "model.safetensors")), 0)
    yield Engines(fleet, learner)
    learner.close()


def test_sampler_and_learner_agree_before_and_after_updates_of_perturbed_adapters(
    engines: Engines, perturb: Perturb
) -> None:
    assert engines.apart.mean < 1e-5
    engines.learner.sync_weights(engines.fleet, 1)
    assert engines.apart.mean < 1e-5
    for version in (2, 3):
        perturb(engines.learner, version)
        assert engines.apart.mean > 1e-4
        engines.learner.sync_weights(engines.fleet, version)
        found = engines.apart
        print(f"version {version}: differ by {found.mean:.1e} on average, {found.largest:.1e} at most")
        assert found.mean < 1e-5


def test_a_whole_update_may_follow(engines: Engines, perturb: Perturb) -> None:
    perturb(engines.learner, 4)
    engines.fleet.load(stored(whole(engines.learner)), 4)
    assert engines.apart.mean < 1e-5


def test_a_tensor_too_few_or_too_many_or_a_module_unknown_is_refused(engines: Engines) -> None:
    modules = engines.learner.trained.modules
    assert modules
    sent = engines.learner.weights()
    one = next(name for name in sent if name.endswith(("o_proj.weight", "mlp.gate.weight")))
    with pytest.raises(
        WeightUpdateError, match=rf"1 of the sampler's \d+ parameters were not written by the update: {one}"
    ):
        engines.fleet.load(stored({name: t for name, t in sent.items() if name != one}), 9, modules=modules)
    engines.learner.sync_weights(engines.fleet, 10)
    with pytest.raises(WeightUpdateError, match=r"wrote model\.norm\.weight, which is in none of the modules"):
        engines.fleet.load(stored(sent | {"model.norm.weight": torch.ones(128)}), 11, modules=modules)
    with pytest.raises(WeightUpdateError, match=r"model\.layers\.9\.self_attn.*no module of that name"):
        engines.fleet.load(stored(sent), 12, modules=[*modules, "model.layers.9.self_attn"])
    engines.fleet.load(stored(whole(engines.learner)), 13)
    assert engines.apart.mean < 1e-5


def whole(learner: LearnerGroup) -> dict[str, torch.Tensor]:
    """Every tensor of the learner's policy, adapters included."""
    import ray

    def gather(worker: Any) -> dict[str, torch.Tensor]:
        from align.model.names import to_checkpoint

        return {name: tensor.contiguous() for name, tensor in to_checkpoint(worker._whole_weights())}

    weights: dict[str, torch.Tensor] = ray.get([rank.__ray_call__.remote(gather) for rank in learner._ranks])[0]
    return weights
