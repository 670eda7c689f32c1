"""The load of the experts: counted once for every trained token, whatever the ranks and micro-batches."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
import torch

from align.learner.batch import TrainingSequence
from align.learner.experts import ExpertCounter, load_metrics
from align.learner.group import LearnerGroup
from align.learner.objective import Objective
from align.model.policy import load_policy
from align.recipe import LearnerOptions, ModelOptions, OptimizerOptions

from ..small_models import small_policy

TOP_K = 2
EXPERTS = 8


def sequences(count: int) -> list[TrainingSequence]:
    random = Random(3)
    return [
        TrainingSequence.of_completion(
            [random.randrange(512) for _ in range(random.randint(5, 40))], random.randint(1, 4), 0.01
        )
        for _ in range(count)
    ]


def chosen_by_hand(policy: ModelOptions, trained: list[TrainingSequence]) -> dict[int, list[int]]:
    """One sequence at a time, without padding, from the logits of the routers that transformers itself gives out."""
    model = load_policy(policy)
    counts: dict[int, list[int]] = {}
    layers = [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    for sequence in trained:
        with torch.no_grad():
            output = model.model(input_ids=torch.tensor([sequence.token_ids]), output_router_logits=True)
        for layer, logits in zip(layers, output.router_logits, strict=True):
            own = counts.setdefault(layer, [0] * EXPERTS)
            for row in logits.tolist():
                for expert in sorted(range(EXPERTS), key=row.__getitem__)[-TOP_K:]:
                    own[expert] += 1
    return counts


@pytest.fixture(scope="module", params=[(2, 1, True), (2, 3, False)], ids=str)
def learner(request: pytest.FixtureRequest, policy: ModelOptions, ray_session: None) -> Iterator[LearnerGroup]:
    ranks, zero_stage, checkpointing = request.param
    options = LearnerOptions(
        ranks=ranks,
        zero_stage=zero_stage,
        micro_batch_tokens=100,
        gradient_checkpointing=checkpointing,
        optimizer=OptimizerOptions(learning_rate=1e-3),
    )
    group = LearnerGroup(policy, options, seed=0, reference=policy)
    group.wait_until_ready()
    yield group
    group.close()


def test_every_trained_token_counts_once_over_ranks_and_micro_batches(
    learner: LearnerGroup, policy: ModelOptions
) -> None:
    trained = sequences(9)
    idle = replace(trained[0], weight=0.0)
    learner.log_probs(trained, 1.0)  # looked at, not trained on
    learner.accumulate([*trained[:5], idle], Objective())
    learner.accumulate(trained[5:], Objective())
    found = learner.expert_load()
    expected = chosen_by_hand(policy, trained)
    assert all(sum(counts) == TOP_K * sum(len(s.token_ids) for s in trained) for counts in expected.values())
    assert found == pytest.approx(load_metrics(expected))
    assert learner.expert_load() == {}
    learner.apply(0.0)


def test_the_measures_of_unevenness() -> None:
    metrics = load_metrics({1: [4, 4, 4, 4], 3: [8, 0, 8, 0]})
    assert metrics == {
        "experts/cv": 0.5,
        "experts/max_over_mean": 2.0,
        "experts/dead": 0.25,
        "experts/layer_1/cv": 0.0,
        "experts/layer_1/max_over_mean": 1.0,
        "experts/layer_1/dead": 0.0,
        "experts/layer_3/cv": 1.0,
        "experts/layer_3/max_over_mean": 2.0,
        "experts/layer_3/dead": 0.5,
    }
    assert load_metrics({1: [0, 0]})["experts/dead"] == 1.0  # every sequence of the step had no weight


def test_a_dense_model_has_no_load() -> None:
    model = small_policy("Llama")
    counter = ExpertCounter(model)
    ids = torch.ones(2, 5, dtype=torch.long)
    with counter.counting(torch.ones_like(ids)):
        model(input_ids=ids)
    assert counter.take() == {}
    assert load_metrics(counter.take()) == {}
