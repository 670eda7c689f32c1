"""What compares the sampler with the learner: the correction's weights, and agreement."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses import CORRECTIONS, CorrectionOptions, agreement, correction_weights

NAN, INF = float("nan"), float("inf")

KINDS = [
    ({"kind": "tis", "level": "token"}, 0, 2),
    ({"kind": "tis", "level": "sequence", "high": 1.5}, 0, 1.5),
    ({"kind": "icepop", "level": "token"}, 0.5, 5),
    ({"kind": "icepop", "level": "sequence", "low": 0.8}, 0.8, 5),
    ({"kind": "sequence_mask"}, 0, 3),
    ({"kind": "sequence_mask", "low": 0.5}, 0.5, 3),
    ({"kind": "geometric_mask"}, 0.99, 1.01),
    ({"kind": "geometric_mask", "low": 0.9, "high": 1.1}, 0.9, 1.1),
]


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([0.01, 0.3, 1.5]))
def test_correction_weights_match_plain_loops_and_ignore_padding(
    seed: int, kind: tuple[dict[str, Any], float, float], spread: float
) -> None:
    given_options, low, high = kind
    options, g = CorrectionOptions(**given_options), torch.Generator().manual_seed(seed)
    lengths = [7, 0, 3, 5]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    sampler = -3 * torch.rand(4, 7, generator=g, dtype=torch.float64)
    learner = sampler + spread * torch.randn(4, 7, generator=g, dtype=torch.float64)
    learner = torch.where(mask, learner, NAN).requires_grad_()
    found = correction_weights(learner, sampler, mask, options)
    assert not found.weights.requires_grad
    assert found.weights[~mask].tolist() == [1] * int((~mask).sum())
    for i, length in enumerate(lengths):
        logs = [(learner[i, t] - sampler[i, t]).item() for t in range(length)]
        for t in range(length):
            ratio = math.exp(logs[t])
            if options.level == "sequence" or options.kind == "sequence_mask":
                ratio = math.prod(map(math.exp, logs))
            elif options.kind == "geometric_mask":
                ratio = math.prod(map(math.exp, logs)) ** (1 / length)
            inside = low <= ratio <= high
            expected = {"tis": min(ratio, high), "geometric_mask": float(inside)}.get(options.kind, ratio * inside)
            assert found.weights[i, t].item() == pytest.approx(expected, rel=1e-9)
            assert found.cut[i, t] == (options.kind == "tis" and ratio > high)
            assert found.masked[i, t] == (options.kind != "tis" and not inside)
    assert not (found.cut | found.masked)[~mask].any()


@pytest.mark.parametrize("kind", [kind for kind in CORRECTIONS if kind != "none"])
def test_a_correction_neither_overflows_nor_masks_a_value_that_is_not_finite(kind: Any) -> None:
    options, mask = CorrectionOptions(kind=kind), torch.ones(1, 2).bool()
    sampler = torch.zeros(1, 2)
    assert correction_weights(torch.full((1, 2), 1e4), sampler, mask, options).weights.isfinite().all()
    assert correction_weights(torch.full((1, 2), NAN), sampler, mask, options).weights.isnan().all()


def test_agreement_matches_plain_loops_and_ignores_padding() -> None:
    torch.manual_seed(0)
    lengths = [7, 0, 3]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    sampler = -3 * torch.rand(3, 7)
    learner = torch.where(mask, sampler + 0.3 * torch.randn(3, 7), NAN)
    differences = [
        learner[i, t].item() - sampler[i, t].item() for i, length in enumerate(lengths) for t in range(length)
    ]
    found = agreement(learner, sampler, mask)
    assert agreement(learner, torch.where(torch.arange(7) == 1, learner, sampler), mask).equal == int(mask[:, 1].sum())
    assert found.tokens == len(differences)
    assert found.mean_abs == pytest.approx(math.fsum(map(abs, differences)) / len(differences))
    assert found.max_abs == pytest.approx(max(map(abs, differences)))
    assert found.k3 == pytest.approx(math.fsum(math.exp(d) - d - 1 for d in differences) / len(differences))


@pytest.mark.parametrize("side", ["learner", "sampler"])
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_agreement_never_hides_a_value_that_is_not_finite(side: str, junk: float) -> None:
    x = {"learner": torch.full((2, 3), -1.0), "sampler": torch.full((2, 3), -1.0)}
    x[side][1, 1] = junk
    found = agreement(x["learner"], x["sampler"], torch.ones(2, 3).bool())
    for value in (found.mean_abs, found.max_abs, found.k3):
        assert not math.isfinite(value)


def test_agreement_over_no_token_is_not_agreement() -> None:
    found = agreement(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2).bool())
    assert found.tokens == 0
    assert not found.mean_abs <= 1e9
