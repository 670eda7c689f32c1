"""Which Ray cluster a run may connect to, and whether its nodes have room for the weights."""

from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_constants

from align.errors import UserError
from align.recipe import load_recipe
from align.session.checks import check_recipe
from align.session.ray import check_address, check_stores, give_token, job_config, local_ray, short_places

GIB = 2**30


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "[::1]:10001", "127.0.0.2:6379", "local"])
def test_a_cluster_on_loopback_needs_no_token(address: str) -> None:
    check_address(address, None)


@pytest.mark.parametrize("address", ["10.0.0.5:6379", "head.example:10001", "auto", "[2001:db8::1]:6379", ":6379"])
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


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://127.0.0.1:8265", "is the dashboard of a cluster"),
        ("192.0.2.1:6379", "anyone who reaches it"),
        ("ray://127.0.0.1:10001", "weights cannot be sent through Ray's client"),
    ],
)
def test_a_check_refuses_the_cluster_that_the_run_would(
    address: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UserError, match=told):
        check_recipe(load_recipe(Path("recipes/nano/sft.yaml"), ["machine={}"]))


@pytest.mark.parametrize("kind", [ConnectionError, ValueError, RuntimeError])
def test_why_a_cluster_cannot_be_joined_is_told_with_what_caused_it(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise kind("Version mismatch:\n    Ray: 2.1") from RuntimeError("no node here")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ray.init", refuse)
    told = r"RAY_ADDRESS=127\.0\.0\.1:1: .*: Version mismatch: Ray: 2\.1: no node here"
    with pytest.raises(UserError, match=told), local_ray():
        pass


def test_below_uv_run_workers_are_in_the_environment_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would make them another, of the working directory."""

    def join(**_: Any) -> None:
        assert not ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
        raise ConnectionError("nobody")

    monkeypatch.setattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ray.init", join)
    with pytest.raises(UserError, match="nobody"), local_ray():
        pass


def node(address: str, store: float, gpus: int) -> dict[str, Any]:
    return {
        "NodeManagerAddress": address,
        "Resources": {"object_store_memory": store * GIB} | ({"GPU": gpus} if gpus else {}),
    }


def test_a_node_whose_object_store_is_too_small_for_weights_twice_is_named(caplog: pytest.LogCaptureFixture) -> None:
    head, large, small = node("head", 0.1, 0), node("large", 75, 8), node("small", 60, 8)
    check_stores([head, large], 30 * GIB)
    assert caplog.messages == []
    check_stores([head, large, small], 30 * GIB)
    [told] = caplog.messages
    assert "node small has 60.0 GiB, and 30.0 GiB of weights take one of 75.0 GiB" in told
    assert f"--object-store-memory={75 * GIB + 1}" in told
    check_stores([head], 30 * GIB)
    assert "node head" in caplog.messages[1]


def test_sockets_have_room_whatever_temporary_directory_a_batch_system_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("os.getpid", lambda: 1234567)
    for place, expected in (
        ("/tmp", {}),
        ("/x" * 19, {}),
        ("/x" * 20, {"_temp_dir": "/tmp/ray", "object_spilling_directory": "/x" * 20}),
    ):
        monkeypatch.setenv("TMPDIR", place)
        assert short_places() == expected
    monkeypatch.setenv("RAY_TMPDIR", "/x" * 20)
    with pytest.raises(UserError, match=r"RAY_TMPDIR=/x/x.* is too long for the sockets of Ray"):
        short_places()


@pytest.mark.parametrize("given", [[], ["/elsewhere"]])
def test_workers_look_into_the_working_directory_where_the_run_does_and_else_find_no_reward_py_in_it(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", ["/scripts", *given])
    config = job_config()
    config._py_driver_sys_path.extend(["/scripts", "/elsewhere"])  # as `ray.init` does
    assert list(config._get_proto_job_config().py_driver_sys_path) == ["/scripts", *given]


def test_a_ray_of_our_own_has_the_token_that_is_there_and_else_one_that_no_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environments: list[dict[str, str]] = [{}, {}, {"RAY_AUTH_TOKEN": "given"}, {"RAY_AUTH_TOKEN_PATH": "given"}]
    for environment in environments:
        give_token(environment)
    first, second, *given = environments
    assert len(first["RAY_AUTH_TOKEN"]) >= 32
    assert first != second
    assert given == [{"RAY_AUTH_TOKEN": "given"}, {"RAY_AUTH_TOKEN_PATH": "given"}]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("written by Ray")
    give_token(environment := {})
    assert environment == {}
