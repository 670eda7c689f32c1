"""Routing replay: tokens go through the experts that are given, with the weights that the router itself would give these."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from align.errors import UserError
from align.learner.batch import (
    UNKNOWN,
    Batch,
    TrainingSequence,
    collate,
    collate_after_prompts,
    experts_of,
    prompts_routed_otherwise,
)
from align.learner.experts import ExpertCounter, routers_of
from align.learner.objective import LogProbs
from align.learner.policy import checkpoint_in_every_mode
from align.learner.routing import TIE, Routes, RoutingReplay, is_tie, rounding_decided, routing_metrics

from ..small_models import CHOSEN, EXPERTS, LAYERS, WITH_EXPERTS, small_policy


def policy_of(name: str) -> LogProbs:
    return LogProbs(small_policy(name))


def some_sequences(seed: int = 0) -> list[TrainingSequence]:
    """Two prompts, two completions of each, and the experts of nobody in particular."""
    random, sequences = np.random.default_rng(seed), []
    for group, length in enumerate((4, 7)):
        prompt = random.integers(0, 64, length).tolist()
        experts = np.argsort(random.random((40, LAYERS, EXPERTS)))[..., :CHOSEN].astype(np.uint8)
        for more in (5, 9):
            ids = [*prompt, *random.integers(0, 64, more).tolist()]
            # A group has its prompt's experts in common.
            own = np.argsort(random.random((len(ids) - 1, LAYERS, EXPERTS)))[..., :CHOSEN].astype(np.uint8)
            own[: length - 1] = experts[: length - 1]
            sequences.append(TrainingSequence.of_completion(ids, length, 1.0, group=group, experts=own))
    return sequences


def computed(policy: LogProbs, replay: RoutingReplay, batch: Batch, **how: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The log-probabilities of a batch, and the gradient of their sum."""
    policy.zero_grad()
    with replay.given(how.get("experts", batch.routes), forced=how.get("forced", True)):
        values, _ = policy(**batch.inputs, temperature=1.0)
        torch.where(batch.mask, values, 0.0).sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return values.detach()[batch.mask], gradients


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_the_own_choice_replayed_changes_no_bit(name: str) -> None:
    policy, batch = policy_of(name), collate(some_sequences(), 0)
    replay = RoutingReplay(policy)
    with replay.recording() as passes, torch.no_grad():
        policy(**batch.inputs, temperature=1.0)
    own = [chosen.view(*batch.token_ids.shape, LAYERS, CHOSEN) for chosen in passes]
    plain = computed(policy, replay, batch, experts=[])
    replayed = computed(policy, replay, batch, experts=own)
    # In another order too: of equal sets the router's own order stays.
    turned = computed(policy, replay, batch, experts=[own[0].flip(-1)])
    for values, gradients in (replayed, turned):
        assert torch.equal(values, plain[0])
        assert all(torch.equal(gradients[key], plain[1][key]) for key in plain[1])
    assert routing_metrics([replay.take()])["routing/changed"] == 0


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_other_experts_get_the_weights_that_the_model_gives_to_its_own(name: str) -> None:
    """Beside a model whose routers are forced by other means: affinities that are infinitely small but for the experts given."""
    policy, sequences = policy_of(name), some_sequences()
    batch = collate(sequences, 0)
    values, gradients = computed(policy, RoutingReplay(policy), batch)
    expected, its_gradients = forced_by_its_scores(policy_of(name), batch)
    assert torch.allclose(values, expected, atol=1e-5)
    assert all(torch.allclose(gradients[key], its_gradients[key], atol=1e-5) for key in its_gradients)


def forced_by_its_scores(policy: LogProbs, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same where `torch.topk` is told what is largest, in the router's own forward pass."""
    topk, place = torch.topk, iter(range(LAYERS))
    assert batch.experts is not None

    def forced(values: torch.Tensor, k: int, *arguments: Any, **named: Any) -> Any:
        if values.shape[-1] != EXPERTS:
            return topk(values, k, *arguments, **named)  # of groups
        given = batch.experts[:, :, next(place)].flatten(0, 1).long()  # type: ignore[index]
        own = topk(values, k, *arguments, **named)
        chosen = torch.where(given >= 0, given, own[1])
        return values.gather(-1, chosen), chosen

    everything = policy.policy.config.model_type == "deepseek_v2"
    for router in routers_of(policy).values():
        if everything:  # experts of groups that are not among the best have no affinity in the router
            router.topk_method = "greedy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "topk", forced)
        values, _ = policy(**batch.inputs, temperature=1.0)
    torch.where(batch.mask, values, 0.0).sum().backward()
    return values.detach()[batch.mask], {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


def test_prompts_that_are_shared_and_layers_that_are_computed_again_go_through_the_same_experts() -> None:
    sequences = some_sequences()
    policy = policy_of("DeepSeek-V2")
    plain = computed(policy, RoutingReplay(policy), collate(sequences, 0))
    policy = policy_of("DeepSeek-V2")
    shared = computed(policy, RoutingReplay(policy), collate_after_prompts(sequences, 0))
    policy = policy_of("DeepSeek-V2")
    policy.policy.gradient_checkpointing_enable()
    for layer in checkpoint_in_every_mode(policy.policy):
        layer.training = True
    again = computed(policy, RoutingReplay(policy), collate(sequences, 0))
    for values, gradients in (shared, again):
        assert torch.allclose(values, plain[0], atol=1e-5)
        assert all(torch.allclose(gradients[key], plain[1][key], atol=1e-5) for key in plain[1])


@pytest.mark.parametrize("together", [collate, collate_after_prompts])
def test_what_was_recorded_can_be_replayed_by_sequence(together: Callable[..., Batch]) -> None:
    """Without the tokens after the last sampled one, whose experts nothing depends on."""
    policy, sequences = policy_of("OLMoE"), some_sequences()
    replay, batch = RoutingReplay(policy), together(sequences, 0)
    with replay.given(batch.routes, forced=True), replay.recording() as passes, torch.no_grad():
        policy(**batch.inputs, temperature=1.0)
    own = experts_of(batch, passes)
    assert [len(experts) for experts in own] == [len(s.token_ids) - 1 for s in sequences]
    alone = [replace(s, experts=experts) for s, experts in zip(sequences, own, strict=True)]
    computed(policy, replay, together(alone, 0), forced=False)
    replay.take()
    computed(policy, replay, together(alone, 0), forced=False)
    # Free routers choose otherwise only where others were forced before them.
    assert routing_metrics([replay.take()])[f"routing/layer_{0}/changed"] == 0


def test_a_token_without_known_experts_and_a_pass_that_only_compares_leave_the_router_its_choice() -> None:
    policy, sequences = policy_of("Qwen2-MoE"), some_sequences()
    replay, counter = RoutingReplay(policy), ExpertCounter(policy)
    free, _ = computed(policy, replay, collate([replace(s, experts=None) for s in sequences], 0))
    batch = collate(sequences, 0)
    compared, _ = computed(policy, replay, batch, forced=False)
    assert torch.equal(compared, free)
    assert batch.experts is not None
    found = routing_metrics([replay.take()])
    assert 0.5 < found["routing/changed"] < 1.0
    unknown = computed(policy, replay, batch, experts=[torch.full_like(batch.experts, -1)])
    assert torch.equal(unknown[0], free)
    assert routing_metrics([replay.take()]) == {}
    unknown = batch.experts.clone()
    unknown[0, :3] = UNKNOWN
    computed(policy, replay, batch, experts=[unknown])
    real = sum(len(s.token_ids) - 1 for s in sequences)
    assert routing_metrics([replay.take()])["routing/fell_back"] == 3 / real
    counter.take()
    with counter.counting(*batch.token_counts()):
        computed(policy, replay, batch)
    forced = np.concatenate([s.experts[:, 0] for s in sequences if s.experts is not None])
    loads = np.array(counter.take()[0])
    # Of the last token of each row nothing is known.
    assert (loads - np.bincount(forced.flatten(), minlength=EXPERTS) >= 0).all()


def test_a_router_with_a_correction_bias_decides_by_what_it_chooses_by() -> None:
    near = TIE / 4
    logits = torch.tensor([[2.0, 0.0, -3.0, -4.0]])
    bias = torch.tensor([0.0, 0.0, float(torch.tensor(0.0).sigmoid() - torch.tensor(-3.0).sigmoid()) + near, 0.0])
    router = SimpleNamespace(e_score_correction_bias=bias)
    own, given = torch.tensor([[0, 2]]), torch.tensor([[0, 1]])
    assert not is_tie(logits, own, given)
    assert rounding_decided(router, logits, own, given)
    assert not rounding_decided(router, logits, own, torch.tensor([[0, 3]]))
    # Two groups of the same sum, in which no two experts are near each other.
    scores = torch.tensor([[0.9, 0.3, 0.7, 0.5 - near]])
    grouped = SimpleNamespace(e_score_correction_bias=torch.zeros(4), num_group=2)
    own, given = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    assert rounding_decided(grouped, scores.logit(), own, given)
    assert not rounding_decided(SimpleNamespace(e_score_correction_bias=torch.zeros(4)), scores.logit(), own, given)


def test_experts_of_a_tie_are_not_changed_but_undecided_and_the_first_layer_that_differs_is_told() -> None:
    near, far = TIE / 2, 3 * TIE
    logits = torch.tensor([[4.0, 3.0, 3.0 + near, 1.0], [4.0, 3.0, 3.0 + far, 1.0], [4.0, 3.0, 2.0, 1.0]])
    own, given = torch.tensor([[0, 2]] * 2 + [[0, 1]]), torch.tensor([[1, 0]] * 2 + [[1, 0]])
    assert is_tie(logits, own, given).tolist() == [True, False, False]
    layers = {1: Routes(10, 0, 1, 0), 4: Routes(10, 3, 0, 2), 2: Routes(10, 1, 0, 2)}
    found = routing_metrics([layers, {2: Routes(10, 1, 0, 0)}, {}])
    assert found["routing/first_layer"] == 2
    assert found["routing/undecided"] == 1 / 40
    assert found["routing/changed"] == 5 / 40
    assert found["routing/layer_2/changed"] == 2 / 20
    assert "routing/first_layer" not in routing_metrics([{1: Routes(10, 0, 1, 0)}])


def test_experts_whose_logits_tie_are_undecided() -> None:
    policy, batch = policy_of("OLMoE"), collate(some_sequences(), 0)
    for router in routers_of(policy).values():
        router.weight.data[1] = router.weight.data[0]
    replay = RoutingReplay(policy)
    with replay.recording() as passes, torch.no_grad():
        policy(**batch.inputs, temperature=1.0)
    (own,) = [chosen.view(*batch.token_ids.shape, LAYERS, CHOSEN) for chosen in passes]
    computed(policy, replay, batch, experts=[torch.where(own < 2, 1 - own, own)])
    counts = replay.take()
    assert sum(layer.undecided for layer in counts.values()) > 0
    assert sum(layer.changed for layer in counts.values()) == 0


def test_of_shared_prompts_what_later_completions_had_otherwise_is_counted() -> None:
    sequences = some_sequences()
    assert prompts_routed_otherwise(sequences) == (0, (3 + 6) * LAYERS)
    other = sequences[1].experts.copy()  # type: ignore[union-attr]
    other[1, 0] = (other[1, 0] + 1) % EXPERTS
    other[2, 1] = other[2, 1][::-1]
    assert prompts_routed_otherwise([sequences[0], replace(sequences[1], experts=other)])[0] == 1
    assert prompts_routed_otherwise([replace(s, group=None) for s in sequences]) == (0, 0)


def test_a_router_that_weighs_experts_in_another_way_is_refused() -> None:
    policy = policy_of("Qwen2-MoE")
    for router in routers_of(policy).values():
        router.register_forward_hook(lambda _, __, output: (output[0], output[1].sigmoid(), output[2]))
    with pytest.raises(UserError, match=r"Qwen2MoeTopKRouter weighs experts in a way that is not known here"):
        computed(policy, RoutingReplay(policy), collate(some_sequences(), 0))
    # What is only compared needs no weights.
    computed(policy, RoutingReplay(policy), collate(some_sequences(), 0), forced=False)


def test_a_router_that_does_not_tell_what_it_chooses_is_refused() -> None:
    policy, batch = policy_of("OLMoE"), collate(some_sequences(), 0)
    replay = RoutingReplay(policy)
    output = torch.zeros(batch.token_ids.numel(), EXPERTS)
    with (
        replay.given(batch.routes, forced=False),
        pytest.raises(UserError, match="OlmoeTopKRouter does not tell which experts"),
    ):
        replay._route(0, 0, routers_of(policy)[0], (), output)


IMPOSSIBLE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "an id twice": (lambda e: torch.where(e >= 0, 1, e), "with an id twice or beyond its last"),
    "an id out of range": (lambda e: torch.where(e == EXPERTS - 1, EXPERTS, e), "with an id twice or beyond its last"),
    "too few experts": (lambda e: e[..., :-1], "where this model's have"),
    "too few layers": (lambda e: e[:, :, :-1], "where this model's have"),
    "too few tokens": (lambda e: e[:, :-1], "where this model's have"),
}


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_experts_that_no_router_can_choose_are_refused(what: str, forced: bool) -> None:
    policy, batch = policy_of("DeepSeek-V2"), collate(some_sequences(), 0)
    replay, (spoil, expected) = RoutingReplay(policy), IMPOSSIBLE[what]
    assert batch.experts is not None

    def counted() -> None:
        computed(policy, replay, batch, experts=[spoil(batch.experts)], forced=forced)
        replay.take()

    with pytest.raises(UserError, match=expected) as refused:
        counted()
    assert "\n" not in str(refused.value)
