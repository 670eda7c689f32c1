"""What an engine asks of vLLM, without one: the answers that must not be passed over."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rollout import Prompt, SamplingOptions, WeightUpdateError
from rollout.engine import Engine, Request
from rollout.types import EngineOptions

ACTIONS: dict[str, Callable[[Engine], object]] = {
    "sampling": lambda engine: engine.sample([Request(Prompt("p", [1]), 0, 0)], SamplingOptions()),
    "new weights": lambda engine: engine.load([], version=1),
    "a new adapter": lambda engine: engine.load_adapter(Path("adapter"), version=1),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_keys_and_values_that_vllm_does_not_forget_are_an_error(action: str) -> None:
    engine = object.__new__(Engine)
    engine.weight_version, engine._options, engine._stop_token_ids = 0, EngineOptions(), [2]
    engine._llm = SimpleNamespace(
        reset_prefix_cache=lambda: False,
        collective_rpc=lambda do, args=(): [None],
        llm_engine=SimpleNamespace(add_lora=lambda adapter: True),
    )
    with pytest.raises(WeightUpdateError, match="did not clear its prefix cache"):
        ACTIONS[action](engine)
    assert engine.weight_version == 0
