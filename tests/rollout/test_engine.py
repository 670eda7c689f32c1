"""What a worker and its engine ask of vLLM, without one: trust in a model's own code, and answers that must not be passed over."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout import AdapterFiles, Fleet, FleetOptions, Prompt, SamplingOptions, WeightUpdateError
from rollout.engine import Engine, Request, use_one_router_kernel
from rollout.low_rank import Factors
from rollout.sync.object_store import StoredWeights
from rollout.types import EngineOptions
from rollout.weights import WeightUpdate, check_coverage
from rollout.worker import RolloutWorker

ACTIONS: dict[str, Callable[[Engine], object]] = {
    "sampling": lambda engine: engine.sample([Request(Prompt("p", [1]), 0, 0)], SamplingOptions()),
    "new weights": lambda engine: engine.load(StoredWeights([]), version=1),
    "a new adapter": lambda engine: engine.load(AdapterFiles(Path("adapter")), version=1),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_keys_and_values_that_vllm_does_not_forget_are_an_error(action: str) -> None:
    engine = object.__new__(Engine)
    engine.weight_version, engine._adapters, engine._options, engine._stop_token_ids = 0, 0, EngineOptions(), [2]
    engine._llm = SimpleNamespace(
        reset_prefix_cache=lambda: False,
        collective_rpc=lambda do, args=(): [None],
        llm_engine=SimpleNamespace(add_lora=lambda adapter: True),
    )
    with pytest.raises(WeightUpdateError, match="did not clear its prefix cache"):
        ACTIONS[action](engine)
    assert engine.weight_version == 0


def test_an_update_that_leaves_a_parameter_out_is_refused_by_name() -> None:
    check_coverage({"norm.weight", "head.weight"}, {"norm.weight", "head.weight", "more"})
    with pytest.raises(WeightUpdateError, match=r"1 of the sampler's 2 parameters .*: head\.weight"):
        check_coverage({"norm.weight", "head.weight"}, {"norm.weight"})


def test_a_graph_takes_no_adapter_beside_its_weights() -> None:
    update = object.__new__(WeightUpdate)
    update._config = SimpleNamespace(enforce_eager=False)
    with pytest.raises(WeightUpdateError, match=r"rollout\.cuda_graphs: .*weights\.transport: adapter"):
        update.take(Factors(torch.ones(1, 2), torch.ones(3, 1), 1.0).named("model.layers.0.mlp.up_proj.weight"))


def test_routers_have_one_kernel_for_any_number_of_tokens() -> None:
    gate, head = SimpleNamespace(allow_ll_bf16_gemm=True), SimpleNamespace()
    model = SimpleNamespace(modules=lambda: [gate, head])
    use_one_router_kernel(SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: model)))
    assert gate.allow_ll_bf16_gemm is False
    assert not hasattr(head, "allow_ll_bf16_gemm")
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    assert "if (\n            self.allow_ll_bf16_gemm\n" in inspect.getsource(GateLinear.forward)


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
        patch.setattr("rollout.fleet.Supervisor", captured)
        with pytest.raises(Captured) as supervisor:
            Fleet("model", "float32", FleetOptions(), [1], trust_remote_code=trusted)
    (_, setup, _), _ = supervisor.value.args
    monkeypatch.setattr("rollout.engine.Engine.__init__", captured)
    with pytest.raises(Captured) as engine:
        RolloutWorker.__new__(RolloutWorker).start(setup)
    assert engine.value.args[1] == {"trust_remote_code": trusted}
