"""Log-probabilities from hidden states in tiles: those of the whole logits, and what is in memory."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from align.learner import head as tiles
from align.learner.head import head_log_probs, head_replaced
from align.learner.objective import LogProbs
from align.losses import token_entropies, token_log_probs

TEMPERATURE = 0.7
VOCABULARY, HIDDEN = 50, 8
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def three_positions_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 3 * VOCABULARY)


def linear(**options: Any) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(HIDDEN, VOCABULARY, **options)


def with_adapter() -> Any:
    """A linear layer with a LoRA adapter on it, as PEFT makes it."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"head": linear(bias=False)})
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    return adapted.base_model.model["head"]


HEADS = {"plain": lambda: linear(bias=False), "with a bias": linear, "LoRA": with_adapter}


def gradients(head: torch.nn.Module, states: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in head.named_parameters() if p.grad is not None} | {"states": states.grad}
    head.zero_grad()
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("positions", [1, 3, 10])
def test_values_and_gradients_are_those_of_the_whole_logits(name: str, positions: int) -> None:
    head = HEADS[name]()
    states = torch.randn(2, positions, HIDDEN)
    targets = torch.randint(0, VOCABULARY, (2, positions))
    weights = torch.randn(2, positions)
    whole = states.clone().requires_grad_()
    logits = head(whole)
    expected = token_log_probs(logits, targets, TEMPERATURE)
    (expected * weights).sum().backward()
    exact = gradients(head, whole)
    tiled = states.clone().requires_grad_()
    found = head_log_probs(head, head.forward, tiled, targets, TEMPERATURE, with_entropy=True)
    (found[0] * weights + found[1]).sum().backward()  # the entropy has no gradient
    both = torch.stack([expected, token_entropies(logits, TEMPERATURE)])
    torch.testing.assert_close(found, both, rtol=1e-6, atol=1e-6)
    alone = head_log_probs(head, head.forward, states, targets, TEMPERATURE)
    assert torch.equal(alone, found[:1])
    torch.testing.assert_close(gradients(head, tiled), exact, rtol=1e-5, atol=1e-6)
    assert exact


def test_in_bfloat16_the_weights_gradient_adds_up_in_float32() -> None:
    head = linear(bias=False, dtype=torch.bfloat16)
    states = torch.randn(300, 1, HIDDEN, dtype=torch.bfloat16)
    targets = torch.randint(0, VOCABULARY, (300, 1))
    head_log_probs(head, head.forward, states, targets, 1.0)[0].sum().backward()
    rounded = head.weight.detach().float().requires_grad_()
    token_log_probs(states.float() @ rounded.T, targets).sum().backward()
    assert rounded.grad is not None
    assert head.weight.grad is not None
    difference = head.weight.grad.float() - rounded.grad
    assert difference.norm() < 0.004 * rounded.grad.norm()


def test_weights_that_are_frozen_have_no_gradient_and_the_states_have() -> None:
    head = linear().requires_grad_(False)
    states = torch.randn(1, 7, HIDDEN, requires_grad=True)
    head_log_probs(head, head.forward, states, torch.ones(1, 7, dtype=torch.int64), 1.0)[0].sum().backward()
    assert states.grad is not None
    assert head.weight.grad is None


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("name", HEADS)
def test_nothing_is_larger_than_a_tile_the_weights_or_the_states(name: str) -> None:
    head = HEADS[name]()
    states = torch.randn(1, 40, HIDDEN, requires_grad=True)
    targets = torch.ones(1, 40, dtype=torch.int64)
    with Largest() as largest:
        head_log_probs(head, head.forward, states, targets, TEMPERATURE)[0].sum().backward()
    assert largest.elements <= max(tiles.TILE, VOCABULARY * HIDDEN, states.numel()) < 40 * VOCABULARY


MEMORY = """
import resource, torch
from align.learner.head import head_log_probs
head = torch.nn.Linear(256, 102_400, bias=False)
head.weight.grad = torch.zeros_like(head.weight)
states, targets = torch.randn(1, 8192, 256, requires_grad=True), torch.zeros(1, 8192, dtype=torch.int64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
head_log_probs(head, head.forward, states, targets, 1.0)[0].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
def test_eight_thousand_tokens_of_deepseek_v2_s_vocabulary_take_less_than_half_a_gibibyte() -> None:
    """Of the whole logits it is 12.5: four copies in float32."""
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 0.5


def llama(*, tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=tied, **SIZES)
    return LlamaForCausalLM(config)


def gemma() -> Any:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, **SIZES)
    )


@pytest.mark.parametrize(
    ("model", "in_tiles"),
    [(llama(tied=False), True), (llama(tied=True), True), (gemma(), False)],
    ids=["a head of its own", "the head is the embedding", "the logits are capped after the head"],
)
def test_a_policy_s_log_probs_and_gradients_are_those_of_its_logits(model: Any, in_tiles: bool) -> None:
    ids = torch.randint(0, VOCABULARY, (2, 9))
    targets = ids[:, 4:]
    module = LogProbs(model)
    assert module.in_tiles == in_tiles
    found, entropy = module(ids, targets, TEMPERATURE, with_entropy=True)
    found.sum().backward()
    tiled = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=ids).logits[:, 3:-1]
    expected = token_log_probs(logits, targets, TEMPERATURE)
    expected.sum().backward()
    torch.testing.assert_close((found, entropy), (expected, token_entropies(logits, TEMPERATURE)))
    assert module(ids, targets, TEMPERATURE)[1] is None
    torch.testing.assert_close(tiled, {name: p.grad for name, p in model.named_parameters()})


def test_the_head_is_itself_again_afterwards_also_where_the_forward_pass_fails() -> None:
    model = llama(tied=False)
    ids = torch.ones(1, 4, dtype=torch.int64)
    before = model(input_ids=ids).logits

    def fails(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), head_replaced(model.lm_head, fails):
        model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert "forward" not in vars(model.get_output_embeddings())
