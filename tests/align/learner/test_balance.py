"""Balance losses: what the learner adds to its gradient is that of the report's equations as they are written."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from align.errors import UserError
from align.learner.balance import BalanceLosses, balance_metrics, factors_of
from align.learner.batch import TrainingSequence
from align.learner.experts import routers_of
from align.learner.objective import Objective
from align.learner.policy import Weights
from align.learner.reward_model import RewardModelRank, Rewards, TrainingPair
from align.recipe import BalanceOptions, LearnerOptions, OptimizerOptions

from ..small_models import CHOSEN, EXPERTS, GROUPS, GROUPS_A_TOKEN, WITH_EXPERTS, rank_of, small_config, small_policy

FACTORS = {"expert": 0.3, "device": 0.5, "communication": 0.2}


def some_sequences() -> list[TrainingSequence]:
    """Two prompts of two completions of different lengths, one of which is not trained on."""
    random, drawn = np.random.default_rng(0), []
    for group, length in enumerate((4, 7)):
        prompt = random.integers(0, 64, length).tolist()
        for more, weight in ((5, 0.01), (12, 0.01 * group)):
            ids = [*prompt, *random.integers(0, 64, more).tolist()]
            drawn.append(TrainingSequence.of_completion(ids, length, weight, group=group))
    return drawn


def gradient_of(policy: Any) -> Tensor:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    found = torch.cat([gradient.double().flatten() for gradient in gradients])
    policy.zero_grad()
    return found


def layer_losses(logits: Tensor, groups: int) -> dict[str, Tensor]:
    """Equations 23-31 for one sequence in one layer, token by token, of its router's logits [T, E] in float64."""
    affinities, tokens, size = logits.softmax(-1), len(logits), EXPERTS // groups
    chosen_by, sent_to = [0] * EXPERTS, [0] * groups
    for scores in affinities.tolist():
        best = sorted(range(groups), key=lambda i: max(scores[i * size : (i + 1) * size]))[-GROUPS_A_TOKEN:]
        allowed = [j for j in range(EXPERTS) if groups == 1 or j // size in best]
        chosen = sorted(allowed, key=scores.__getitem__)[-CHOSEN:]
        for expert in chosen:
            chosen_by[expert] += 1
        for device in {expert // size for expert in chosen}:
            sent_to[device] += 1
    f = [EXPERTS / (CHOSEN * tokens) * count for count in chosen_by]
    p = [affinities[:, j].sum() / tokens for j in range(EXPERTS)]
    on = [range(i * size, (i + 1) * size) for i in range(groups)]
    zero = torch.zeros(())
    return {
        "expert": sum((f[j] * p[j] for j in range(EXPERTS)), zero),
        "device": sum((sum(f[j] for j in d) / size * sum(p[j] for j in d) for d in on), zero),
        "communication": sum(
            (groups / (GROUPS_A_TOKEN * tokens) * sent_to[i] * sum(p[j] for j in d) for i, d in enumerate(on)), zero
        ),
    }


def expected(
    name: str, factors: dict[str, float], sequences: list[TrainingSequence]
) -> tuple[Tensor, dict[str, float]]:
    """The gradient in float64, of one sequence after the other; and the mean losses of a layer."""
    policy = small_policy(name).double()
    policy.set_experts_implementation("eager")  # one expert after the other
    trained = [s for s in sequences if s.weight]
    total, means = torch.zeros((), dtype=torch.float64), dict.fromkeys(factors, 0.0)
    logits: list[Tensor] = []
    for router in routers_of(policy).values():
        router.register_forward_hook(lambda _, __, output: logits.append(output[0].double()))
    for sequence in trained:
        logits.clear()
        ids = torch.tensor([list(sequence.token_ids)])
        log_probs = policy(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        total = total - sequence.weight * log_probs[sequence.prompt_length - 1 :].sum()
        for of_layer in logits:
            losses = layer_losses(of_layer, GROUPS if name == "DeepSeek-V2" else 1)
            for level, factor in factors.items():
                total = total + factor * losses[level] / len(trained)
                means[level] += float(losses[level]) / len(trained) / len(logits)
    total.backward()
    return gradient_of(policy), means


@pytest.fixture(scope="module")
def of_v2() -> tuple[Tensor, dict[str, float]]:
    return expected("DeepSeek-V2", FACTORS, some_sequences())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", [[4], [1, 3], [1, 1, 1, 1]], ids=str)
def test_the_gradient_is_that_of_the_report_s_equations_however_a_batch_is_divided(
    of_v2: Any, parts: list[int], checkpointing: bool
) -> None:
    policy, left = small_policy("DeepSeek-V2"), iter(some_sequences())
    rank = rank_of(policy, balance=FACTORS, gradient_checkpointing=checkpointing)
    rank.accumulate([[next(left) for _ in range(count)] for count in parts], Objective(), batch_size=3)
    found, (gradient, means) = gradient_of(policy), of_v2
    assert (found - gradient).norm() / gradient.norm() < 1e-5
    assert balance_metrics([rank.take_expert_load()[1]]) == pytest.approx(
        {f"balance/{level}": mean for level, mean in means.items()}, rel=1e-5
    )
    # Each of them is more than the cross-entropy, or the comparison would say nothing of it.
    rank_of(policy := small_policy("DeepSeek-V2")).accumulate([some_sequences()], Objective())
    assert (gradient - gradient_of(policy)).norm() / gradient.norm() > 0.5


@pytest.mark.parametrize("parts", [[4], [1, 3]], ids=str)
def test_a_prompt_that_is_computed_once_counts_in_each_of_its_sequences(of_v2: Any, parts: list[int]) -> None:
    policy, left = small_policy("DeepSeek-V2"), iter(some_sequences())
    rank = rank_of(policy, balance=FACTORS, share_prompts=True)
    rank.accumulate([[next(left) for _ in range(count)] for count in parts], Objective(), batch_size=3)
    assert (gradient_of(policy) - of_v2[0]).norm() / of_v2[0].norm() < 1e-5


@pytest.mark.parametrize("name", [name for name in WITH_EXPERTS if name != "DeepSeek-V2"])
def test_it_is_for_every_router_that_is_known(name: str) -> None:
    policy, sequences = small_policy(name), some_sequences()
    gradient, _ = expected(name, {"expert": 0.3}, sequences)
    rank_of(policy, balance={"expert": 0.3}).accumulate([sequences], Objective(), batch_size=3)
    assert (gradient_of(policy) - gradient).norm() / gradient.norm() < 1e-5


def test_both_conversations_of_a_pair_count_for_a_reward_model() -> None:
    torch.manual_seed(0)
    config = small_config("Qwen3-MoE", pad_token_id=0, num_labels=1)
    model: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    for router in routers_of(model).values():
        torch.nn.init.normal_(router.weight, std=0.5)
    logits: list[Tensor] = []
    for router in routers_of(model).values():
        router.register_forward_hook(lambda _, __, output: logits.append(output[0].double()))
    texts = [s.token_ids for s in some_sequences()]
    pairs = [TrainingPair(texts[0], texts[1], weight=0.5), TrainingPair(texts[2], texts[3])]
    total = torch.zeros((), dtype=torch.float64)
    for ids in (texts[0], texts[1]):
        logits.clear()
        model(input_ids=torch.tensor([list(ids)]))
        total = total + sum((0.3 * layer_losses(of_layer, 1)["expert"] / 2 for of_layer in logits), total * 0)
    total.backward()
    expected = gradient_of(model)
    gradients = []
    for factor in (0.0, 0.3):
        rank: Any = object.__new__(RewardModelRank)
        balance = BalanceOptions(expert=factor)
        rank._options = LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=1e-3), balance=balance)
        rank._engine, rank._device, rank._pad_id = Weights(Rewards(model)), torch.device("cpu"), 0
        rank._engine.forward = rank._engine.module.forward
        rank._balance = BalanceLosses(model, balance)
        rank.accumulate([pairs], "pairwise")
        gradients.append(gradient_of(model))
    assert balance_metrics([rank.take_balance()]).keys() == {"balance/expert"}
    found = gradients[1] - gradients[0]
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_experts_that_are_replayed_are_those_that_count() -> None:
    policy, sequences = small_policy("OLMoE"), some_sequences()
    sequences = [s for s in sequences if s.weight]
    same = np.tile(np.arange(CHOSEN, dtype=np.uint8), (1, 2, 1))
    forced = [replace(s, experts=np.repeat(same, len(s.token_ids) - 1, axis=0)) for s in sequences]
    rank = rank_of(policy, balance={"expert": 1.0})
    rank.accumulate([sequences], Objective(), batch_size=3)
    own = balance_metrics([rank._balance.take()])["balance/expert"]
    rank.accumulate([forced], Objective(), True, batch_size=3)
    assert balance_metrics([rank._balance.take()])["balance/expert"] != pytest.approx(own, rel=0.1)


def test_without_factors_nothing_is_computed_and_no_bit_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy("Qwen3-MoE")
    rank = rank_of(policy)
    rank.accumulate([some_sequences()], Objective())
    found = gradient_of(policy)
    monkeypatch.setattr(rank, "_balance", BalanceLosses(policy, BalanceOptions(expert=1.0)))
    rank.accumulate([some_sequences()], Objective(), batch_size=3)
    assert not torch.equal(gradient_of(policy), found)
    assert balance_metrics([BalanceLosses(policy, BalanceOptions()).take()]) == {}


def test_the_factor_of_the_checkpoint_is_taken_where_it_is_asked_for() -> None:
    asked = BalanceOptions(expert="config")
    assert factors_of(asked, small_config("DeepSeek-V2", aux_loss_alpha=0.002)) == (0.002, 0.0, 0.0)
    assert factors_of(asked, small_config("Mixtral", router_aux_loss_coef=0.02)) == (0.02, 0.0, 0.0)
    with pytest.raises(
        UserError, match=r"learner.balance.expert: config takes the factor of the checkpoint.*give a number"
    ):
        factors_of(asked, small_config("Mixtral", router_aux_loss_coef=0.0))


@pytest.mark.parametrize(
    ("options", "config", "said"),
    [
        ({"device": 0.1}, small_config("OLMoE"), r"names no groups \(n_group\)"),
        ({"communication": 0.1}, small_config("DeepSeek-V2", n_group=1), r"names no groups \(n_group\)"),
        ({"expert": 0.1}, small_config("Llama"), "a llama has none"),
    ],
)
def test_what_a_model_has_nothing_for_is_refused(options: Any, config: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        factors_of(BalanceOptions(**options), config)


def test_a_router_of_another_kind_is_refused() -> None:
    policy = small_policy("Qwen2-MoE")
    for router in routers_of(policy).values():
        router.register_forward_hook(lambda _, __, output: (output[0], output[1].sigmoid(), output[2]))
    rank = rank_of(policy, balance={"expert": 1.0})
    with pytest.raises(UserError, match=r"learner.balance: Qwen2MoeTopKRouter weighs experts in a way"):
        rank.accumulate([some_sequences()], Objective())
