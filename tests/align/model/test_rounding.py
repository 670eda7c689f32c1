"""Weights on the grid of a narrower format: nearest points, in float64's judgement; and which weights."""

from typing import Any

import pytest
import torch

from align.model.names import layout_of, to_checkpoint
from align.model.policy import load_policy
from align.model.rounding import BLOCK, is_rounded, on_grid, round_parameter, rounded
from align.recipe import ModelOptions

SHAPE = (BLOCK + 2, 2 * BLOCK + 44)
"""Blocks of 128 x 128, and smaller ones at both edges."""


@pytest.fixture
def weight() -> torch.Tensor:
    """Columns of very different size, a row of zeros, and a row with one large value."""
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, SHAPE[1])
    drawn[3], drawn[5, 7] = 0.0, 40.0
    return drawn


def test_int8_takes_the_nearest_of_255_points_of_each_row(weight: torch.Tensor) -> None:
    found, exact = on_grid(weight, "int8").double(), weight.double()
    scale = exact.abs().amax(dim=1, keepdim=True) / 127
    points = found / scale.clamp(min=1e-30)
    assert (points - points.round()).abs().max() < 1e-4
    assert points.abs().amax(dim=1).round().unique().tolist() == [0.0, 127.0]
    assert ((found - exact).abs() <= 0.5001 * scale).all()
    assert found[3].count_nonzero() == 0


def test_fp8_takes_the_nearest_e4m3_number_of_each_block(weight: torch.Tensor) -> None:
    """All 253 finite numbers of the format, against every weight in float64."""
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = bits[bits.isfinite()].unique()
    found, exact = on_grid(weight, "fp8").double(), weight.double()
    for rows in (slice(0, BLOCK), slice(BLOCK, None)):
        for columns in (slice(0, BLOCK), slice(BLOCK, 2 * BLOCK), slice(2 * BLOCK, None)):
            block, on = exact[rows, columns], found[rows, columns]
            scale = block.abs().max() / 448
            nearest = (block[..., None] / scale - numbers).abs().amin(dim=-1) * scale
            assert ((on - block).abs() <= nearest + 1e-4 * scale).all()
            assert (on[..., None] / scale - numbers).abs().amin(dim=-1).max() < 1e-4


def test_bfloat16_is_the_dtypes_own_rounding(weight: torch.Tensor) -> None:
    assert torch.equal(on_grid(weight, "bfloat16"), weight.bfloat16().float())


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_model_in_bfloat16_keeps_its_dtype_and_stacked_experts_are_rounded_one_by_one(
    weight: torch.Tensor, precision: Any
) -> None:
    stacked = torch.stack([weight, 0.01 * weight]).bfloat16()
    found = on_grid(stacked, precision)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.stack([on_grid(one, precision) for one in stacked]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.1.mlp.experts.3.down_proj.weight", True),
        ("model.layers.1.mlp.experts.gate_up_proj", True),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", True),
        ("model.layers.0.mlp.gate_proj.weight", True),
        ("model.layers.1.mlp.gate.weight", False),
        ("model.layers.1.mlp.router.gate.weight", False),
        ("model.layers.1.block_sparse_moe.gate.weight", False),
        ("model.layers.1.mlp.shared_expert_gate.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_routers_embeddings_and_head_are_left_as_in_quantised_checkpoints(name: str, expected: bool) -> None:
    assert is_rounded(name, 2, "int8") is is_rounded(name, 2, "fp8") is expected
    assert is_rounded(name, 2, "bfloat16")
    assert not is_rounded(name, 2, "model")
    assert not is_rounded(name, 1, "int8"), "a norm or a bias"


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "fp8"])
def test_a_model_rounded_in_place_is_what_is_sent(policy: ModelOptions, precision: Any) -> None:
    """Its experts are stacked, gate over up, where a checkpoint has a tensor for each."""
    model: Any = load_policy(policy)
    layout = layout_of(model.config.model_type)

    def checkpoint() -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in to_checkpoint(model.named_parameters(), layout)}

    exact = checkpoint()
    sent = dict(rounded(exact.items(), precision))
    own = {name: round_parameter(name, parameter, precision) for name, parameter in model.named_parameters()}
    assert_same(checkpoint(), sent)
    assert sum(not torch.equal(sent[name], exact[name]) for name in exact) > len(exact) / 2
    for name, parameter in model.named_parameters():
        if (before := own[name]) is not None:
            parameter.data.copy_(before)
    assert_same(checkpoint(), exact)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
