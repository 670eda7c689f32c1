"""A model that brings code of its own: nothing of it is run by the workers unless the model is trusted."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollout import Fleet, FleetOptions
from rollout.engine import Engine
from rollout.types import EngineOptions
from rollout.worker import RolloutWorker
from rollout.worker_handle import Member

CODE = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


class Captured(Exception):  # noqa: N818
    """Carries what a class was made with."""


def captured(*arguments: Any, **named: Any) -> None:
    raise Captured(arguments, named)


def test_vllm_is_told_whether_the_model_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_configuration.py").write_text(CODE)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own_configuration.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("vllm.LLM", captured)
    with pytest.raises(Captured) as llm:
        Engine(tmp_path, "float32", EngineOptions(), [1], trust_remote_code=True)
    assert llm.value.args[1]["trust_remote_code"] is True
    with pytest.raises(ValueError, match="trust_remote_code"):
        Engine(tmp_path, "float32", EngineOptions(), [1])


@pytest.mark.parametrize("trusted", [False, True])
def test_the_trust_in_a_model_reaches_the_engine_of_a_worker(monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rollout.supervisor.Member", captured)
        with pytest.raises(Captured) as member:
            Fleet("model", "float32", FleetOptions(), [1], trust_remote_code=trusted)
    arguments, _ = member.value.args
    monkeypatch.setattr("rollout.worker.Engine", captured)
    with pytest.raises(Captured) as engine:
        RolloutWorker.__new__(RolloutWorker).start(*Member(*arguments)._start_arguments)
    assert engine.value.args[1] == {"trust_remote_code": trusted}
