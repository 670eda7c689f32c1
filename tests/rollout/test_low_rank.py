"""What a sampler computes beside its weights: W x + s B (A x), of linear layers and of experts, whatever W would round away."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from rollout.low_rank import Factors, experts_forward, silu_and_mul, split
from rollout.weights import memory_that_sleeps

EXPERTS, HIDDEN, INNER, TOKENS = 4, 32, 16, 24
RANK = 3
BF16 = torch.bfloat16


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def factors(rows: int, columns: int, scale: float) -> Factors:
    return Factors(drawn(EXPERTS, RANK, columns, seed=rows), scale * drawn(EXPERTS, rows, RANK, seed=columns), 2.0)


def beside(weights: tuple[torch.Tensor, ...], updates: tuple[Factors, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up, down = (update.beside(weight) for update, weight in zip(updates, weights, strict=True))
    return gate_up, down


def routing() -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts a token and their shares; nobody goes to expert 2."""
    places = torch.rand(TOKENS, 3, generator=torch.Generator().manual_seed(1)).topk(2).indices
    return torch.tensor([0, 1, 3])[places], torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(2))


def plain(
    x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The experts one token after the other, in float64, from whole weights."""
    rows = []
    for token, experts, parts in zip(x.double(), chosen, shares.double(), strict=True):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert, part in zip(experts, parts, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            total += part * (down[expert].double() @ (silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def test_experts_are_those_of_their_weights_with_the_update_in_them() -> None:
    x, (chosen, shares) = drawn(TOKENS, HIDDEN), routing()
    weights = drawn(EXPERTS, 2 * INNER, HIDDEN), drawn(EXPERTS, HIDDEN, INNER)
    updates = factors(2 * INNER, HIDDEN, 0.5), factors(HIDDEN, INNER, 0.5)
    found = experts_forward(x, chosen, shares, beside(weights, updates), updates, silu_and_mul)
    whole = [w.double() + u.scale * (u.b.double() @ u.a.double()) for w, u in zip(weights, updates, strict=True)]
    expected = plain(x, chosen, shares, *whole)
    assert found.dtype == BF16
    assert float((found.double() - expected).norm() / expected.norm()) < 0.02


def test_an_update_that_the_weights_would_round_away_is_there() -> None:
    """The inputs add up to nothing and all weights of gate and up are 1, so that the outputs are the update's alone."""
    half, (chosen, shares) = drawn(TOKENS, HIDDEN // 2), routing()
    x = torch.cat([half, -half], dim=1)
    ones, down = torch.ones(EXPERTS, 2 * INNER, HIDDEN, dtype=BF16), drawn(EXPERTS, HIDDEN, INNER)
    update = factors(2 * INNER, HIDDEN, 1e-4)
    change = update.scale * (update.b.float() @ update.a.float())
    assert torch.equal((ones.float() + change).to(BF16), ones)
    found = experts_forward(x, chosen, shares, (update.beside(ones), down), (update, None), silu_and_mul)
    expected = plain(x, chosen, shares, change.double(), down)
    assert float((found.double() - expected).norm() / expected.norm()) < 0.02
    one = Factors(update.a[0], update.b[0], update.scale)
    alone = one.widened(x) @ one.beside(ones[0]).T
    assert float((alone.float() - x.float() @ change[0].T).norm() / (x.float() @ change[0].T).norm()) < 0.02


def test_without_updates_it_is_what_transformers_computes_to_the_bit() -> None:
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Experts

    config = DeepseekV2Config(n_routed_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=INNER)
    for dtype in (torch.float32, BF16):
        experts = DeepseekV2Experts(config).to(dtype)
        experts.gate_up_proj.data = drawn(EXPERTS, 2 * INNER, HIDDEN).to(dtype)
        experts.down_proj.data = drawn(EXPERTS, HIDDEN, INNER).to(dtype)
        x, (chosen, shares) = drawn(TOKENS, HIDDEN).to(dtype), routing()
        weights = experts.gate_up_proj, experts.down_proj
        found = experts_forward(x, chosen, shares, weights, (None, None), experts._apply_gate)
        assert torch.equal(found, grouped_mm_experts_forward(experts, x, chosen, shares))


def test_what_is_sent_of_an_update_is_told_from_weights_by_its_name() -> None:
    update = Factors(drawn(RANK, HIDDEN), drawn(INNER, RANK), 8 / 3)
    sent = update.named("layer.weight")
    weights, updates = split({"layer.weight": drawn(INNER, HIDDEN), **sent})
    assert weights.keys() == {"layer.weight"}
    assert updates.keys() == sent.keys()
    assert float(sent["layer.weight.lora_scale"]) == 8 / 3


@pytest.mark.parametrize("sleeps", [True, False])
def test_on_a_gpu_that_is_shared_what_is_beside_the_weights_is_offloaded_with_them(
    sleeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the weights of which it has a copy leave the pool that they were loaded into."""
    happened: list[Any] = []

    @contextmanager
    def pool(tag: str) -> Any:
        happened.append(tag)
        yield
        happened.append("end of it")

    allocator = SimpleNamespace(allocator_and_pools={"weights": [("a pool", None)]}, _trim=happened.append)
    monkeypatch.setattr("vllm.device_allocator.get_mem_allocator_instance", lambda: allocator)
    config = SimpleNamespace(model_config=SimpleNamespace(enable_cumem_allocator=sleeps))
    worker = SimpleNamespace(device=torch.device("cuda"), vllm_config=config, _maybe_get_memory_pool_context=pool)
    with memory_that_sleeps(worker):
        happened.append("added")
    assert happened == ["runtime", "added", "end of it", *(["a pool"] if sleeps else [])]
