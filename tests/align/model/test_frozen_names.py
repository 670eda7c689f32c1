"""What `learner.freeze` means in each architecture."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.errors import UserError
from align.model.lora import without_layers
from align.model.names import PARTS, frozen_names

from ..small_models import MODELS, small_config


def names_of(name: str, **changed: Any) -> list[str]:
    dense_first = {"first_k_dense_replace": 1} if name == "DeepSeek-V2" else {}
    config = small_config(name, **dense_first, **changed)
    with torch.device("meta"):
        return [parameter for parameter, _ in AutoModelForCausalLM.from_config(config).named_parameters()]


def short(names: set[str]) -> set[str]:
    return {without_layers(name) for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_of_a_part_and_routers_are_one_in_each_layer(name: str) -> None:
    names, experts = names_of(name), name != "Llama"
    parts = [part for part in PARTS if experts or part not in ("router", "experts", "shared_experts")]
    parts = [part for part in parts if part != "shared_experts" or name in ("DeepSeek-V2", "Qwen2-MoE")]
    parts = [part for part in parts if part != "mlp" or name in ("DeepSeek-V2", "Llama")]
    found = {part: frozen_names(names, [part]) for part in parts}
    assert set().union(*found.values()) == set(names)
    if experts:
        assert short(found["router"]) == {"mlp.gate.weight"}
        assert short(found["experts"]) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
        assert len(found["router"]) == 1 if name == "DeepSeek-V2" else 2
    # An attention's own norms are of both; nothing else is of two parts.
    assert {n for n in names if sum(n in of for of in found.values()) > 1} == found["attention"] & found["norms"]


def test_shared_experts_are_not_those_that_are_routed_and_come_with_their_gate() -> None:
    names = names_of("Qwen2-MoE")
    expected = {f"mlp.shared_expert.{one}_proj.weight" for one in ("gate", "up", "down")}
    assert short(frozen_names(names, ["shared_experts"])) == {*expected, "mlp.shared_expert_gate.weight"}


@pytest.mark.parametrize("name", ["Llama", "DeepSeek-V2"])
def test_layers_are_frozen_whole_from_the_first_one_on(name: str) -> None:
    names = names_of(name)
    frozen = frozen_names(names, ["first_1_layers"])
    assert frozen == {each for each in names if ".layers.0." in each}
    assert frozen
    assert frozen_names(names, ["first_1_layers", "embeddings"]) == frozen | frozen_names(names, ["embeddings"])


@pytest.mark.parametrize(
    ("name", "freeze", "said"),
    [
        ("Llama", ["router"], "the model has no router of its own; it has attention, mlp, norms, embeddings, head"),
        ("Llama", ["first_9_layers"], "first_9_layers is more than all but one of the model's 2 layers"),
        ("Mixtral", ["shared_experts"], "the model has no shared_experts of its own"),
        (
            "Llama",
            ["attention", "mlp", "norms", "embeddings", "head"],
            "attention, mlp, norms, embeddings, head is all that the model has",
        ),
    ],
)
def test_what_means_nothing_or_everything_is_refused(name: str, freeze: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"learner.freeze: {said}"):
        frozen_names(names_of(name), freeze)


def test_a_head_that_is_tied_to_the_embeddings_is_frozen_with_them() -> None:
    names = names_of("Llama", tie_word_embeddings=True)
    assert frozen_names(names, ["embeddings"]) == {"model.embed_tokens.weight"}
    with pytest.raises(UserError, match=r"no head of its own"):
        frozen_names(names, ["head"])
