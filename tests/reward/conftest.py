import pytest

from reward import registry


@pytest.fixture
def own_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_rewards", dict(registry._rewards))
