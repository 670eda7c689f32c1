"""What the doctor says of a sampler and a learner, and whether both fit the GPUs that are there."""

from types import SimpleNamespace
from typing import Any

import pytest

from align.errors import UserError
from align.evaluate.attribution import Attribution
from align.evaluate.doctor import CheckStatus
from align.evaluate.doctor_engines import LEARNER_ROOM, SAMPLER_ROOM, parts, sampler_share
from align.recipe import LearnerOptions, ModelOptions, OptimizerOptions
from align.tools.offline import on_gpus
from rollout import FleetOptions


def test_the_first_part_that_differs_fails_the_check_of_parts() -> None:
    distances = {"embedding": 0.0, "layer 0, attention": 2e-6, "layer 0, router": 0.3, "layer 0, experts": 0.5}
    status, told = parts(Attribution(distances, (1e-4, 1e-4)))
    assert status is CheckStatus.FAILED
    assert "they part in layer 0, router, whose outputs differ by 3.0e-01" in told
    assert parts(Attribution(distances, (0.6, 0.6))) == (
        CheckStatus.OK,
        "none differs by more than 5.0e-01 of its size",
    )


V2_LITE, CARD = 2 * 15_706_484_224, 85_520_809_984
"""Bytes of DeepSeek-V2-Lite's weights in bfloat16, and of an H100 or A100 of 80 GB."""


def test_both_engines_of_v2_lite_fit_a_card_of_80_gb() -> None:
    share = sampler_share(V2_LITE, CARD)
    assert (1 - share) * CARD >= V2_LITE + LEARNER_ROOM
    assert share * CARD >= V2_LITE + SAMPLER_ROOM


def test_what_does_not_fit_is_said_with_its_sizes() -> None:
    with pytest.raises(
        UserError, match=r"do not fit one GPU of 80 GiB: each holds 58\.5 GiB of weights.*--dtype bfloat16"
    ):
        sampler_share(2 * V2_LITE, CARD)


@pytest.fixture
def engines_on(policy: ModelOptions, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function of the number of cards of 80 GB and of workers: the options of the doctor's sampler and learner there."""

    def options(cards: int, workers: int) -> tuple[FleetOptions, LearnerOptions]:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: SimpleNamespace(total_memory=CARD))
        learner = LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=1e-3))
        return on_gpus(policy, FleetOptions(workers=workers), learner)

    return options


def test_sampler_and_learner_share_the_only_gpu(engines_on: Any) -> None:
    rollout, learner = engines_on(cards=1, workers=1)
    assert rollout.gpus + learner.gpus == 1
    assert rollout.gpu_memory_share <= (CARD - LEARNER_ROOM) / CARD


def test_with_a_gpu_for_each_they_share_none(engines_on: Any) -> None:
    rollout, learner = engines_on(cards=3, workers=2)
    assert rollout.gpus == learner.gpus == 1


def test_more_workers_than_there_are_gpus_beside_the_learner_are_refused(engines_on: Any) -> None:
    with pytest.raises(UserError, match="--workers 2"):
        engines_on(cards=2, workers=2)
