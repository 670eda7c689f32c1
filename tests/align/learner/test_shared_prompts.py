"""A prompt that is computed once for its group: the log-probabilities and gradients are those of separate sequences."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PretrainedConfig

from align.learner.batch import (
    TrainingSequence,
    collate,
    collate_after_prompts,
    plan_micro_batches,
    rows_after_prompts,
)
from align.learner.group import LearnerGroup
from align.learner.objective import LogProbs, Objective
from align.model.policy import load_policy
from align.recipe import GrpoOptions, LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions

from ..small_models import SIZES, small_config

OTHERS: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama": lambda: small_config("Llama"),
    "Qwen3-MoE": lambda: small_config("Qwen3-MoE"),
    "Gemma 3, a window shorter than the sequences": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, sliding_window_pattern=2
    ),
}
OPTIMIZER = OptimizerOptions(learning_rate=1e-3, clip_norm=0)
GRPO = GrpoOptions(steps=1, prompts_per_step=1, group_size=2, kl_coefficient=0.1)


def groups(seed: int, vocabulary: int = 64, sizes: tuple[int, ...] = (4, 3, 1)) -> list[TrainingSequence]:
    """Completions of some prompts in a mixed order; the last prompt is one token."""
    random = Random(seed)

    def tokens(count: int) -> list[int]:
        return [random.randrange(vocabulary) for _ in range(count)]

    prompts = [tokens(random.randint(12, 20)) for _ in sizes[:-1]] + [tokens(1)]
    drawn = [
        TrainingSequence.of_completion(
            [*prompt, *tokens(random.randint(1, 12))], len(prompt), 1.0, advantage=random.gauss(0, 1), group=number
        )
        for number, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
        for _ in range(size)
    ]
    random.shuffle(drawn)
    total = sum(s.sampled_tokens for s in drawn)
    return [replace(s, weight=1 / total) for s in drawn]


@pytest.mark.parametrize("name", ["DeepSeek-V2", *OTHERS])
def test_log_probabilities_and_gradients_are_the_same(name: str, policy: ModelOptions) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(OTHERS[name]()) if name in OTHERS else load_policy(policy)
    module = LogProbs(network)
    found = []
    for together in (collate, collate_after_prompts):
        batch = together(groups(0), 0)
        log_probs, entropy = module(**batch.inputs, temperature=0.7, with_entropy=True)
        (log_probs * batch.weights * batch.advantages[:, None])[batch.mask].sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
        found.append((log_probs[batch.mask].detach(), entropy[batch.mask], gradient))
        module.zero_grad()
    (apart, entropy_apart, gradient), (shared, entropy_shared, gradient_shared) = found
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy_shared, entropy_apart, atol=1e-5, rtol=0)
    assert (gradient_shared - gradient).norm() < 1e-5 * gradient.norm()


def learner_of(policy: ModelOptions, **options: Any) -> LearnerGroup:
    learner_options = LearnerOptions(micro_batch_tokens=200, optimizer=OPTIMIZER, **options)
    group = LearnerGroup(policy, learner_options, seed=0, reference=policy)
    group.wait_until_ready()
    return group


@pytest.fixture(scope="module")
def experience(policy: ModelOptions, ray_session: None) -> list[TrainingSequence]:
    """Samples of an older policy."""
    drawn = groups(1, vocabulary=512, sizes=(6, 5, 3))
    generator = torch.Generator().manual_seed(2)
    noise = [0.2 * torch.randn(s.sampled_tokens, generator=generator).numpy() - 6 for s in drawn]
    return [
        replace(s, old_log_probs=values, sampler_log_probs=values + 0.1) for s, values in zip(drawn, noise, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(policy: ModelOptions, experience: list[TrainingSequence]) -> Any:
    learner = learner_of(policy, ranks=1)
    yield outcome(learner, experience)
    learner.close()


@pytest.fixture(
    scope="module",
    params=[
        {"ranks": 2, "zero_stage": 1},
        pytest.param({"ranks": 1, "zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param({"ranks": 2, "zero_stage": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda p: f"{p['ranks']} ranks, ZeRO-{p['zero_stage']}",
)
def sharing(request: pytest.FixtureRequest, policy: ModelOptions, ray_session: None) -> Iterator[LearnerGroup]:
    learner = learner_of(policy, share_prompts=True, **request.param)
    yield learner
    learner.close()


def outcome(learner: LearnerGroup, batch: list[TrainingSequence]) -> dict[str, Any]:
    """What a learner tells of a batch."""
    log_probs = learner.log_probs(batch, 1.0)
    sums = learner.accumulate(batch, Objective(GRPO))
    load = learner.expert_load()
    return {"log_probs": log_probs, "sums": sums, "load": load, "norm": learner.apply(0.0)}


def test_a_learner_finds_the_same_with_fewer_tokens(
    sharing: LearnerGroup, expected: Any, experience: list[TrainingSequence]
) -> None:
    found = outcome(sharing, experience)
    for mine, theirs in zip(found["log_probs"], expected["log_probs"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert found["sums"].loss == pytest.approx(expected["sums"].loss, abs=1e-6)
    assert found["sums"].kl == pytest.approx(expected["sums"].kl, abs=1e-6)
    assert found["sums"].difference == pytest.approx(expected["sums"].difference, rel=1e-5)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    assert found["load"] == pytest.approx(expected["load"])
    assert found["sums"].padded_tokens < 0.75 * expected["sums"].padded_tokens


@pytest.mark.slow
def test_an_adapter_and_its_reference_see_the_same_prompts(
    policy: ModelOptions, experience: list[TrainingSequence]
) -> None:
    found = []
    for share in (False, True):
        learner = learner_of(policy, ranks=1, lora=LoraOptions(rank=4), share_prompts=share)
        learner.accumulate(experience, Objective(GRPO))
        learner.apply(0.01)
        found.append(outcome(learner, experience))
        learner.close()
    assert found[1]["sums"].kl == pytest.approx(found[0]["sums"].kl, rel=1e-3)
    assert found[1]["sums"].kl > 1e-4
    assert found[1]["norm"] == pytest.approx(found[0]["norm"], rel=1e-3)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(10, 200), st.integers(1, 3), st.integers(0, 2**32)
)
def test_micro_batches_hold_every_sequence_once_within_the_budget(
    sizes: list[int], budget: int, ranks: int, seed: int
) -> None:
    sequences = groups(seed, sizes=tuple(sizes))
    order, padded = rows_after_prompts(sequences)
    plan = plan_micro_batches(order, padded, budget, ranks)
    assert sorted(i for rank in plan for m in rank for i in m) == list(range(len(sequences)))
    assert len({len(rank) for rank in plan}) == 1
    for micro_batch in (m for rank in plan for m in rank if m):
        tokens = collate_after_prompts([sequences[i] for i in micro_batch], 0).padded_tokens
        assert tokens == padded(micro_batch)
        assert len(micro_batch) == 1 or tokens <= budget


def test_a_group_stays_together_unless_its_lengths_are_far_apart() -> None:
    prompt = list(range(40))
    lengths = [10, 11, 12, 100, 101, 102]
    sequences = [TrainingSequence.of_completion([*prompt, *[1] * n], 40, 1.0, group=0) for n in lengths]
    order, padded = rows_after_prompts(sequences)
    (micro_batches,) = plan_micro_batches(order, padded, 400, 1)
    assert sorted(sorted(m) for m in micro_batches) == [[0, 1, 2], [3, 4, 5]]
    assert sum(map(padded, micro_batches)) == 39 + 3 * 13 + 39 + 3 * 103


@pytest.mark.parametrize(
    ("beside", "why"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing drops the keys and values of prompts"),
        ({"zero_stage": 3}, "ZeRO-3 cannot use a parameter twice"),
    ],
)
def test_what_cannot_be_beside_it_is_refused(beside: Any, why: str) -> None:
    with pytest.raises(ValidationError, match=f"share_prompts: {why}"):
        LearnerOptions(optimizer=OPTIMIZER, share_prompts=True, **beside)
