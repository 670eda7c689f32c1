"""What the tests that run real engines share: one Ray, and the nano policy with weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from align.recipe import ModelOptions

    from .warm import WarmProcesses

# A busy machine is no reason to fail.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

NANO = Path(__file__).parents[1] / "recipes" / "nano" / "policy"
DEEPSEEK_V2 = {
    "q_lora_rank": 48,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "num_experts_per_tok": 3,
    "n_routed_experts": 16,
}
COUNTED_GPUS = 5
FIRST = ("test_deepseek_v2", "test_end_to_end", "test_resume", "test_sandbox_removed", "test_chat")
"""DeepSeek-V2's ranks must be new processes, which all others then use again; the rest start whole commands, which take the longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that share engines, and put some files first."""
    for item in items:
        if "ray_session" in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker("engines")
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    import torch

    # The tensors of these tests are tiny: a second thread costs more than it gives.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def warm_processes() -> Iterator[WarmProcesses]:
    """Learners and fleets get the processes of those before them."""
    from .warm import WarmProcesses

    with pytest.MonkeyPatch.context() as patch:
        warm = WarmProcesses(patch)
        yield warm
        warm.close()


@pytest.fixture(scope="session")
def ray_session(warm_processes: WarmProcesses) -> Iterator[None]:
    import torch

    from align.session.ray import local_ray

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            if not torch.cuda.is_available():
                # What Ray is told it counts, and no more: nothing takes a GPU where torch is built for CPUs.
                patch.setattr(torch.cuda, "device_count", lambda: COUNTED_GPUS)
            stack.enter_context(local_ray())
        yield


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    """The nano policy with random weights."""
    from align.model.policy import write_random_policy
    from align.recipe import ModelOptions

    directory = tmp_path_factory.mktemp("policy")
    write_random_policy(ModelOptions(path=str(NANO), init="random"), directory, seed=0)
    return ModelOptions(path=str(directory))


@pytest.fixture(scope="session")
def deepseek_v2(tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    """The nano policy, DeepSeek-V2-Lite in small, with DeepSeek-V2's own options and random weights."""
    from align.model.policy import write_random_policy
    from align.recipe import ModelOptions

    configured, drawn = tmp_path_factory.mktemp("configured"), tmp_path_factory.mktemp("drawn")
    for file in NANO.iterdir():
        (configured / file.name).write_bytes(file.read_bytes())
    config = json.loads((NANO / "config.json").read_text())
    (configured / "config.json").write_text(json.dumps(config | DEEPSEEK_V2))
    write_random_policy(ModelOptions(path=str(configured), init="random"), drawn, seed=0)
    return ModelOptions(path=str(drawn))
