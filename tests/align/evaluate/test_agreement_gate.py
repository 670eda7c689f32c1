"""The gate with real engines: quiet when sampler and learner agree, and it stops what makes them part."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.evaluate.agreement import AgreementError, AgreementGate, Disagreement, compare, probe
from align.evaluate.doctor import CheckStatus
from align.evaluate.doctor_engines import examine_engines
from align.experience import training_sequence
from align.learner.batch import TrainingSequence, collate
from align.learner.group import LearnerGroup
from align.learner.objective import LogProbs, Objective, Sums
from align.learner.routing import Routes
from align.model.policy import load_policy
from align.recipe import AgreementOptions, GrpoOptions, LearnerOptions, ModelOptions, OptimizerOptions
from rollout import Fleet, FleetOptions, Prompt, SamplingOptions

PROMPTS = [Prompt(f"p{i}", [1, 40 + i, 60 + 3 * i, 17]) for i in range(8)]
GRPO = GrpoOptions(steps=1, prompts_per_step=1, group_size=2)
OPTIONS = FleetOptions(workers=1, max_length=64, kv_cache_gb=0.25)


@pytest.fixture(scope="module")
def without_yarn(policy: ModelOptions, tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    """The nano policy with plain rotary embeddings, for which vLLM has its own CPU kernel."""
    directory = tmp_path_factory.mktemp("plain")
    for file in Path(policy.path).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    for key in ("rope_scaling", "rope_parameters"):
        config.pop(key, None)
    (directory / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
    return ModelOptions(path=str(directory))


@pytest.fixture(scope="module")
def engines(policy: ModelOptions, nano_fleet: Fleet) -> Iterator[tuple[Fleet, LearnerGroup]]:
    learner = LearnerGroup(policy, LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=1e-3)), seed=0)
    learner.wait_until_ready()
    learner.sync_weights(nano_fleet, version=nano_fleet.weight_version + 1)
    yield nano_fleet, learner
    learner.close()


def gate(warnings: list[str] | None = None) -> AgreementGate:
    return AgreementGate(AgreementOptions(), "float32", [].append if warnings is None else warnings.append)


class PlainLearner:
    """Log-probabilities from transformers in this process, where a LearnerGroup would start ranks."""

    def __init__(self, policy: ModelOptions):
        self._module = LogProbs(load_policy(policy))

    def log_probs(
        self, sequences: Sequence[TrainingSequence], temperature: float, *, as_sent: bool = False
    ) -> list[Any]:
        batch = collate(sequences, pad_id=0)
        with torch.no_grad():
            values, _ = self._module(batch.token_ids, batch.targets, temperature)
        return [np.asarray(row[mask]) for row, mask in zip(values, batch.mask, strict=True)]

    def take_routes(self) -> list[Any]:
        return []


def test_a_skipped_weight_update_is_caught_and_a_made_one_is_not(engines: tuple[Fleet, LearnerGroup]) -> None:
    fleet, learner = engines
    gate().check(probe(fleet, learner, PROMPTS), "start")
    batch = [TrainingSequence.of_completion([*p.token_ids, 5, 6, 7], 4, 0.05) for p in PROMPTS]
    learner.accumulate(batch, Objective())
    learner.apply(1e-2)
    with pytest.raises(AgreementError, match=r"step 1: sampler and learner differ.*\n.*hold the learner's weights"):
        gate().check(probe(fleet, learner, PROMPTS), "step 1")
    learner.sync_weights(fleet, version=1)
    assert gate().check(probe(fleet, learner, PROMPTS), "step 1").largest < 1e-4
    checks = examine_engines(fleet, learner, PROMPTS, gate())
    assert [check.status for check in checks] == [CheckStatus.OK] * 4


def test_rounded_weights_are_compared_with_the_same_rounded_weights(engines: tuple[Fleet, LearnerGroup]) -> None:
    """The probe is as near as without rounding, and stays so strict that weights on another grid, or none, are caught."""
    fleet, learner = engines
    version = fleet.weight_version
    try:
        for precision in ("int8", "fp8"):
            learner.precision = precision  # type: ignore[assignment]
            with pytest.raises(AgreementError):
                gate().check(probe(fleet, learner, PROMPTS), "before the sync")
            version += 1
            learner.sync_weights(fleet, version)
            assert gate().check(probe(fleet, learner, PROMPTS), "after it").largest < 1e-4
    finally:
        learner.precision = "model"
        learner.sync_weights(fleet, version + 1)


def test_the_limit_of_a_step_follows_the_grid_of_the_samplers_weights() -> None:
    far = Disagreement(mean=0.1, largest=0.5, k3=0.0, tokens=10)
    for dtype in ("float32", "bfloat16"):
        AgreementGate(AgreementOptions(), dtype, pytest.fail, "int8").check(far, "step 1")
        with pytest.raises(AgreementError, match=r"agreement\.stop_mean"):
            AgreementGate(AgreementOptions(stop_mean=0.05), dtype, [].append, "int8").check(far, "step 1")


@pytest.mark.parametrize(("shift", "temperature", "caught"), [(0.0, 1.0, False), (0.2, 1.0, True), (0.0, 0.8, True)])
def test_wrong_log_probabilities_are_caught_before_the_first_update(
    engines: tuple[Fleet, LearnerGroup], shift: float, temperature: float, caught: bool
) -> None:
    fleet, learner = engines
    learner.sync_weights(fleet, version=fleet.weight_version + 1)
    sampling = SamplingOptions(temperature=temperature, max_new_tokens=16)
    drawn = [group.trajectories[0] for group in fleet.sample(PROMPTS, 1, sampling, seed=0, step=0)]
    sequences = [
        replace(training_sequence(t, weight=1e-3, advantage=1.0), sampler_log_probs=t.log_probs + np.float32(shift))
        for t in drawn
    ]
    found = Disagreement.of(learner.accumulate(sequences, Objective(GRPO)))
    learner.apply(0.0)
    if not caught:
        assert gate().check(found, "step 1").largest < 1e-4
    else:
        with pytest.raises(AgreementError, match="step 1: sampler and learner differ"):
            gate().check(found, "step 1")


@pytest.mark.parametrize("native", [pytest.param(True, marks=pytest.mark.slow), False])
def test_vllms_own_rotary_kernel_is_caught(native: bool, without_yarn: ModelOptions, ray_session: None) -> None:
    fleet = Fleet(without_yarn.path, "float32", OPTIONS.model_copy(update={"native_rotary": native}), [2])
    try:
        sampling = SamplingOptions(max_new_tokens=16)
        drawn = [g.trajectories[0] for g in fleet.sample(PROMPTS, 1, sampling, seed=0, step=0)]
        found = compare(drawn, PlainLearner(without_yarn))  # type: ignore[arg-type]
    finally:
        fleet.close()
    if native:
        assert gate().check(found, "start").largest < 1e-4
    else:
        with pytest.raises(AgreementError, match=r"native_rotary must be true"):
            gate().check(found, "start")


def test_it_warns_before_it_stops() -> None:
    warnings: list[str] = []
    gate(warnings).check(Disagreement(mean=5e-6, largest=1e-4, k3=0.0, tokens=10), "step 3")
    assert warnings == []
    gate(warnings).check(Disagreement(mean=5e-4, largest=1e-2, k3=0.0, tokens=10), "step 4")
    assert len(warnings) == 1
    assert "step 4" in warnings[0]


def test_what_is_not_a_number_is_beyond_every_limit() -> None:
    with pytest.raises(AgreementError):
        gate().check(Disagreement(mean=float("nan"), largest=float("nan"), k3=0.0, tokens=10), "step 1")


def routed(changed: int, dtype: str = "float32", **more: int) -> tuple[Any, list[str]]:
    """The gate's check of a step whose log-probabilities agree and of whose 200 tokens of layer 3 so many went to other experts."""
    warnings: list[str] = []
    counts = Routes(**{"known": 200, "changed": changed, "undecided": 0, "fell_back": 0} | more)
    sums = Sums(compared=100, equal=25, routes=[{1: Routes(200, 0, 0, 0)}, {3: counts}])
    checked = AgreementGate(AgreementOptions(), dtype, warnings.append)
    return partial(checked.check, Disagreement.of(sums), "step 1"), warnings


def test_in_float32_one_changed_route_stops_the_run_and_ties_do_not() -> None:
    check, _ = routed(1)
    with pytest.raises(
        AgreementError, match=r"sends 1 of 200 tokens of layer 3 to other experts .*first.* is 3"
    ) as error:
        check()
    assert "agreement.stop_routing" in str(error.value)
    check, warnings = routed(0, undecided=5, fell_back=3)
    check()
    assert warnings == []


def test_in_bfloat16_a_share_of_a_layers_routes_does() -> None:
    """It warns from a tenth on, and stops from a fifth on."""
    for changed, warns in ((20, 0), (21, 1), (40, 1)):
        check, warnings = routed(changed, "bfloat16")
        check()
        assert len(warnings) == warns
    check, _ = routed(41, "bfloat16")
    with pytest.raises(AgreementError, match=r"sends 41 of 200"):
        check()


def test_a_limit_of_ones_own_replaces_that_of_the_dtype() -> None:
    assert AgreementOptions(stop_routing=0.5).routing_limit("float32") == 0.5
    assert AgreementOptions(stop_routing=0.0).routing_limit("bfloat16") == 0


def test_the_sentence_has_mean_largest_k3_and_the_share_of_equal_bits() -> None:
    found = Disagreement.of(Sums(compared=100, difference=1e-4, max_difference=1e-3, sampler_kl=1e-7, equal=25))
    assert str(found) == (
        "sampler and learner differ by 1.0e-06 nats a token on average, 1.0e-03 at most (k3 1.0e-09; 25.0% of 100 tokens equal to the last bit)"
    )
