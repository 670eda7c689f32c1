"""Evaluation hooks by name: registering, discovering, refusing what is misspelt, and what comes back."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.errors import UserError
from align.evaluate import hooks
from align.evaluate.hooks import (
    EvaluationError,
    Metrics,
    PolicyCheckpoint,
    available,
    check_params,
    check_ready,
    get,
    register,
    run,
)
from rollout import Fleet

NO_FLEET: Any = None

PLUGIN = '''
from align.evaluate.hooks import Metrics, register

@register("plugged")
def plugged(checkpoint, fleet, *, least=0.5):
    """From a package that somebody installed."""
    return Metrics({"score": least})
'''


@pytest.fixture(autouse=True)
def own_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    available()
    monkeypatch.setattr(hooks, "_hooks", dataclasses.replace(hooks._hooks, entries=dict(hooks._hooks.entries)))


def test_the_hooks_of_the_toolkit_are_known_with_their_parameters() -> None:
    known = {hook.name: hook for hook in available()}
    assert {"instructions", "judged", "lm_eval", "needle"} <= known.keys()
    assert list(known) == sorted(known)
    assert all(hook.description for hook in known.values())
    needle = {parameter.name: parameter for parameter in known["needle"].parameters}
    assert needle["lengths"].required
    assert needle["per_cell"].default == 4
    assert not needle.keys() & {"checkpoint", "fleet"}


def test_an_unknown_name_or_parameter_gets_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"unknown evaluation hook 'nedle' \(did you mean 'needle'\?\)\. .*instructions, "
    ):
        get("nedle")
    with pytest.raises(UserError, match=r"'needle': unknown parameter 'length' \(did you mean 'lengths'\?\)"):
        check_params("needle", {"length": [128]})
    with pytest.raises(UserError, match=r"'needle': missing parameter 'lengths'\. Its parameters: lengths, depths"):
        check_params("needle", {})


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("needle", {"lengths": [128, "many"]}, r"needle': lengths\.1: .*valid integer"),
        ("needle", {"lengths": [128], "depths": [0.5, 1.5]}, r"depths\.1: .*less than or equal to 1"),
        ("lm_eval", {"tasks": ["x"], "backend": "tf"}, r"backend: .*'hf' or 'vllm'"),
        ("judged", {"benchmark": "mt_bench", "questions": "nowhere.jsonl", "judge": {}}, r"questions: Path does not"),
    ],
)
def test_values_are_checked_before_anything_runs(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_params(name, params)


def test_a_key_given_in_place_of_its_variable_is_not_repeated(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.touch()
    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": "sk-secret"}
    with pytest.raises(UserError, match=r"judge\.api_key_env") as caught:
        check_params("judged", {"benchmark": "mt_bench", "questions": str(questions), "judge": judge})
    assert "secret" not in str(caught.value)


def test_a_hook_gets_its_parameters_as_it_annotates_them(checkpoint: PolicyCheckpoint) -> None:
    @register("mine")
    def mine(checkpoint: PolicyCheckpoint, fleet: Fleet, *, file: Path, shares: list[float]) -> Metrics:
        return Metrics({"total": sum(shares)}, {"other": "no data"}, [{"name": file.name}])

    metrics = run("mine", checkpoint, NO_FLEET, {"file": "a/b.txt", "shares": ["0.5", 1]})
    assert metrics == Metrics({"total": 1.5}, {"other": "no data"}, [{"name": "b.txt"}])


def test_what_leaves_no_room_for_a_prompt_is_not_asked_and_has_no_numbers(checkpoint: PolicyCheckpoint) -> None:
    asked = {"a": [{"role": "user", "content": "?"}]}
    with pytest.raises(
        EvaluationError, match=r"max_new_tokens, \d+, leave no room for a prompt in rollout\.max_length"
    ):
        checkpoint.ask(NO_FLEET, asked, max_new_tokens=checkpoint.max_length)
    with pytest.raises(EvaluationError, match="none of 3 requests leaves room"):
        run("instructions", checkpoint, NO_FLEET, {"count": 3, "max_new_tokens": checkpoint.max_length - 5})


def test_a_number_of_numpy_is_one(checkpoint: PolicyCheckpoint) -> None:
    @register("mine")
    def mine(checkpoint: PolicyCheckpoint, fleet: Fleet) -> Metrics:
        return Metrics({"a": np.float32(3.5), "b": np.int64(2), "c": 7})

    assert json.dumps(dict(run("mine", checkpoint, NO_FLEET, {}).values)) == '{"a": 3.5, "b": 2.0, "c": 7}'


@pytest.mark.parametrize(
    "returned",
    [
        {"accuracy": 1.0},
        Metrics({"accuracy": math.nan}),
        Metrics({"a": "1"}),
        Metrics({"problems": 3}),
        Metrics({"step": 1}),
    ],
)
def test_a_hook_returns_finite_numbers_with_names_of_their_own_or_is_refused(
    checkpoint: PolicyCheckpoint, returned: Any
) -> None:
    @register("mine")
    def mine(checkpoint: PolicyCheckpoint, fleet: Fleet) -> Any:
        return returned

    with pytest.raises(EvaluationError, match="'mine'"):
        run("mine", checkpoint, NO_FLEET, {})


def test_a_name_belongs_to_one_function_that_names_its_parameters() -> None:
    def first(checkpoint: PolicyCheckpoint, fleet: Fleet) -> Metrics:
        return Metrics({})

    def second(checkpoint: PolicyCheckpoint, fleet: Fleet, **params: float) -> Metrics:
        return Metrics({})

    assert register("mine")(first) is first
    with pytest.raises(UserError, match=r"evaluation hook 'mine' is already registered by .*first"):
        register("mine")(second)
    with pytest.raises(UserError, match="must name its parameters"):
        register("yours")(second)


def test_an_installed_package_announces_a_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_hooks_module.py").write_text(PLUGIN)
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_align.evaluations]\nplugged = plugin_hooks_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugin_hooks_module", raising=False)
    check_params("plugged", {"least": 0.25})
    assert get("plugged").description == "From a package that somebody installed."
    del sys.modules["plugin_hooks_module"]


def test_what_asks_the_policy_runs_with_real_rollout_workers(checkpoint: PolicyCheckpoint, nano_fleet: Fleet) -> None:
    for name, params in (
        ("needle", {"lengths": [160, 320], "depths": [0, 1], "per_cell": 1, "max_new_tokens": 8}),
        ("instructions", {"count": 6, "max_new_tokens": 24}),
    ):
        metrics = run(name, checkpoint, nano_fleet, params)
        assert len(metrics.rows) in (4, 6)
        assert all(0 <= value <= 1 for value in metrics.values.values())
        assert any(row["completion"] for row in metrics.rows)
        assert run(name, checkpoint, nano_fleet, params) == metrics


def test_a_hook_says_before_the_stage_what_will_not_work_after_it() -> None:
    asked = []

    def ready(server: str, port: int = 80) -> None:
        asked.append((server, port))
        if server == "away":
            raise EvaluationError("the server is away")

    @register("distant", ready=ready)
    def distant(checkpoint: PolicyCheckpoint, fleet: Fleet, *, server: str, port: int = 80, limit: int = 1) -> Metrics:
        return Metrics({})

    check_ready("distant", {"server": "here", "port": "8000", "limit": 3})
    assert asked == [("here", 8000)]
    with pytest.raises(UserError, match="evaluation hook 'distant': the server is away"):
        check_ready("distant", {"server": "away"})
    with pytest.raises(UserError, match="missing parameter 'server'"):
        check_ready("distant", {})
    check_ready("needle", {"lengths": [128]}, 512)
    with pytest.raises(
        UserError, match=r"a prompt of 500 tokens with 32 new ones does not fit into rollout\.max_length = 512"
    ):
        check_ready("needle", {"lengths": [128, 500]}, 512)
    with pytest.raises(
        UserError, match=r"its max_new_tokens, 512, leave no room for a prompt in rollout\.max_length, 256"
    ):
        check_ready("instructions", {}, 256)


def test_the_older_name_of_the_checkpoint_is_still_imported() -> None:
    with pytest.deprecated_call(match="is called PolicyCheckpoint"):
        from align.evaluate.hooks import Checkpoint
    assert Checkpoint is PolicyCheckpoint
