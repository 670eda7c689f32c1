"""Which Ray cluster a run may connect to."""

import pytest

from align.errors import UserError
from align.session.ray import check_address, local_ray


@pytest.mark.parametrize(
    "address", ["127.0.0.1:6379", "localhost:6379", "ray://[::1]:10001", "127.0.0.2:6379", "local"]
)
def test_a_cluster_on_loopback_needs_no_token(address: str) -> None:
    check_address(address, None)


@pytest.mark.parametrize(
    "address", ["10.0.0.5:6379", "ray://head.example:10001", "auto", "[2001:db8::1]:6379", ":6379"]
)
def test_any_other_cluster_needs_token_authentication(address: str) -> None:
    check_address(address, "token")
    check_address(address, "TOKEN")
    for mode in (None, "", "disabled"):
        with pytest.raises(UserError, match="RAY_AUTH_MODE=token"):
            check_address(address, mode)


def test_a_run_is_refused_before_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UserError, match="anyone who reaches it"), local_ray():
        pass
