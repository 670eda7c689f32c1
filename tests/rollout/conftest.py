"""What the tests of fleets share: two workers that tell what happens to them."""

from collections.abc import Iterator

import pytest

from align.recipe import ModelOptions

from .injuries import WitnessedFleet


@pytest.fixture(scope="session")
def witnessed(policy: ModelOptions, ray_session: None) -> Iterator[WitnessedFleet]:
    witnessed = WitnessedFleet(policy.path)
    witnessed.until_healthy()
    yield witnessed
    witnessed.fleet.close()
