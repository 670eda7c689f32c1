"""What the tests that run real engines share: one Ray, and the nano policy with weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from align.model.policy import write_random_policy
from align.recipe import ModelOptions
from align.session.ray import local_ray

# A busy machine is no reason to fail.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

NANO = Path(__file__).parents[1] / "recipes" / "nano" / "policy"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    """The nano policy with random weights."""
    directory = tmp_path_factory.mktemp("policy")
    write_random_policy(ModelOptions(path=str(NANO), init="random"), directory, seed=0)
    return ModelOptions(path=str(directory))
