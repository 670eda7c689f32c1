"""What a learner rank computes, with plain PyTorch in the place of DeepSpeed: the gradient is that of the formula as it is written."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from align.learner.batch import TrainingSequence
from align.learner.objective import LogProbs, Objective
from align.learner.policy import FrugalRank, PolicyRank, checkpoint_in_every_mode, pad_id_of
from align.model.policy import persistent_buffers
from align.recipe import GrpoOptions, LearnerOptions, ModelOptions, OptimizerOptions

from ..small_models import SIZES, V2, rank_of, small_config

TEMPERATURE = 0.7
RATE, DECAY = 0.1, 0.5


class PlainEngine:
    """What the worker asks of DeepSpeed's engine."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.basic_optimizer, self.global_rank = module, optimizer, 0
        self.train, self.eval, self.step = module.train, module.eval, optimizer.step

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def get_global_grad_norm(self) -> float:
        return 1.0


def network(seed: int) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(small_config("Llama", vocab_size=32))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PolicyRank]:
    """A rank of a tiny Llama, and of another as the KL's reference."""

    def initialize(*, model: Any, optimizer: Any, config: Any) -> Any:
        made = optimizer(None)
        return PlainEngine(model, made), made, None, None

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(initialize=initialize))

    def make(**options: Any) -> PolicyRank:
        made = object.__new__(PolicyRank)
        optimizer = OptimizerOptions(learning_rate=RATE, weight_decay=DECAY)
        made._model = ModelOptions(path="a tiny Llama")
        made._options = LearnerOptions(ranks=1, optimizer=optimizer, **options)
        made._device, made._pad_id = torch.device("cpu"), 0
        policy = network(0)
        made._start_engine(LogProbs(policy), policy)
        made._checkpointed = checkpoint_in_every_mode(policy)
        made._reference = LogProbs(network(1)).eval().requires_grad_(False)
        made._teacher = None
        made._watch(policy)
        return made

    return make


def grpo(**given: Any) -> GrpoOptions:
    return GrpoOptions(steps=1, prompts_per_step=1, group_size=2, **given)


def drawn(*, gaps: bool = False) -> list[TrainingSequence]:
    """Two groups of two sequences whose log-probabilities, some with ratios on either side of the trust region, are of an older policy.

    With `gaps`, an environment wrote tokens between those that the policy drew.
    """
    random = np.random.default_rng(0)
    prompts = [[int(t) for t in random.integers(1, 32, 3)] for _ in range(2)]
    found = []
    for place, advantage in enumerate((1.0, -1.0, 0.5, -2.0)):
        length = int(random.integers(4, 8))
        sampled = random.random(length) < 0.6 if gaps else np.ones(length, dtype=bool)
        sampled[0] = sampled[-1] = True
        count = int(sampled.sum())
        found.append(
            TrainingSequence(
                [*prompts[place // 2], *(int(t) for t in random.integers(1, 32, length))],
                np.concatenate([np.zeros(3, dtype=bool), sampled]),
                weight=1 / (4 * count),
                advantage=advantage,
                old_log_probs=(-np.log(32) + random.normal(0, 0.4, count)).astype(np.float32),
                group=place // 2,
            )
        )
    assert not gaps or any(not s.sampled[3:].all() for s in found)
    return found


def log_probs(model: Any, sequence: TrainingSequence, temperature: float) -> torch.Tensor:
    ids, sampled = torch.tensor([list(sequence.token_ids)]), torch.as_tensor(sequence.sampled)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0][sampled[1:]]


def expected_gradient(options: GrpoOptions, sequences: Sequence[TrainingSequence]) -> torch.Tensor:
    """Of DeepSeekMath's equations 3 and 4, or the report's 32 and 33, one sequence after the other."""
    policy, reference = network(0), network(1)
    total = torch.zeros(())
    for sequence in sequences:
        now = log_probs(policy, sequence, TEMPERATURE)
        before = log_probs(reference, sequence, TEMPERATURE).detach()
        to_old, to_reference = now - torch.as_tensor(sequence.old_log_probs), before - now
        if options.level == "sequence":
            to_old, to_reference = to_old.sum(0, keepdim=True), to_reference.sum(0, keepdim=True)
        ratio = to_old.exp()
        clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        surrogate = torch.minimum(ratio * sequence.advantage, clipped * sequence.advantage)
        kl = to_reference.exp() - to_reference - 1
        total = total - sequence.weight * (surrogate - options.kl_coefficient * kl).sum()
    total.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("clip", [(0.1, 0.5), (0.5, 0.1)])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize(("gaps", "share"), [(False, False), (True, False), (True, True)])
def test_the_gradient_is_that_of_the_papers_equation(
    worker: Any, level: Any, clip: Any, kl: float, gaps: bool, share: bool
) -> None:
    aggregation = "sequence_sum" if level == "sequence" else "sample_mean"
    options = grpo(clip_low=clip[0], clip_high=clip[1], kl_coefficient=kl, level=level, aggregation=aggregation)
    rank, sequences = worker(share_prompts=share), drawn(gaps=gaps)
    rank.accumulate([sequences[:3], sequences[3:]], Objective(options, TEMPERATURE))
    found = torch.cat([p.grad.flatten() for p in rank._network.parameters()])
    expected = expected_gradient(options, sequences)
    assert expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("aggregation", ["sample_mean", "sequence_sum"])
def test_the_kl_is_in_nats_a_token_however_the_loss_is_weighed(worker: Any, aggregation: Any) -> None:
    policy, reference, sequences = network(0), network(1), drawn()
    apart = [log_probs(reference, s, TEMPERATURE) - log_probs(policy, s, TEMPERATURE) for s in sequences]
    expected = torch.cat([one.exp() - one - 1 for one in apart]).mean()
    options = grpo(kl_coefficient=0.1, aggregation=aggregation)
    sums = worker().accumulate([sequences], Objective(options, TEMPERATURE))
    assert sums.kl / sums.tokens == pytest.approx(float(expected.detach()), rel=1e-4)


def plain_weights(correction: dict[str, Any], learner: torch.Tensor, sampler: torch.Tensor) -> torch.Tensor:
    ratio = (learner - sampler).exp()
    if correction["kind"] == "tis":
        return ratio.clamp(max=correction["high"])
    if correction["kind"] == "icepop":
        return ratio * ((ratio >= correction["low"]) & (ratio <= correction["high"]))
    return torch.ones_like(ratio)


def plain_kl(kl: str, to_reference: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """With the gradient of the estimator of this name; of k3+ not its value."""
    k3 = to_reference.exp() - to_reference - 1
    return {"k2": to_reference**2 / 2, "k3": k3, "k3+": to_reference**2 / 2, "unbiased": ratio * k3}[kl]


@pytest.mark.parametrize(
    "given",
    [
        {"level": "geometric", "clip_low": 0.02, "clip_high": 0.02},
        {"cispo_max": 1.1},
        {"kl": "k2"},
        {"kl": "k3+"},
        {"kl": "unbiased"},
        {"correction": {"kind": "tis", "high": 1.05}},
        {"correction": {"kind": "icepop", "low": 0.9, "high": 1.1}},
    ],
)
def test_what_a_recipe_chooses_of_the_loss_is_what_is_computed(worker: Any, given: dict[str, Any]) -> None:
    options = grpo(kl_coefficient=0.3, **given)
    correction, random = {"kind": "none", **given.get("correction", {})}, np.random.default_rng(1)
    sequences = [
        replace(s, sampler_log_probs=s.old_log_probs + random.normal(0, 0.2, s.sampled_tokens).astype(np.float32))
        for s in drawn()
    ]
    policy, reference = network(0), network(1)
    total, weights = torch.zeros(()), []
    for sequence in sequences:
        old = torch.as_tensor(sequence.old_log_probs)
        now, before = log_probs(policy, sequence, TEMPERATURE), log_probs(reference, sequence, TEMPERATURE).detach()
        ratio = (now - old).exp()
        kl = plain_kl(options.kl, before - now, ratio)
        if options.level == "geometric":
            ratio = (now - old).mean().exp().expand_as(now)
        clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        surrogate = torch.minimum(ratio * sequence.advantage, clipped * sequence.advantage)
        if options.cispo_max is not None:
            surrogate = ratio.detach().clamp(max=options.cispo_max) * sequence.advantage * now
        weights.append(plain_weights(correction, old, torch.as_tensor(sequence.sampler_log_probs)))
        total = total - sequence.weight * (weights[-1] * surrogate - options.kl_coefficient * kl).sum()
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])

    rank = worker()
    sums = rank.accumulate([sequences[:3], sequences[3:]], Objective(options, TEMPERATURE))
    found = torch.cat([p.grad.flatten() for p in rank._network.parameters()])
    assert (found - expected).norm() / expected.norm() < 1e-4
    all_weights = torch.cat(weights)
    if correction["kind"] != "none":
        assert sums.correction_masked == int((all_weights == 0).sum())
        assert sums.correction_cut == (int((all_weights == 1.05).sum()) if correction["kind"] == "tis" else 0)
        assert max(sums.correction_masked, sums.correction_cut) > 2
        assert sums.correction_weights == pytest.approx(float(all_weights.sum()), rel=1e-5)
        assert sums.correction_squares == pytest.approx(float(all_weights.square().sum()), rel=1e-5)
    # The gate looks at the difference as it is, before it is corrected.
    apart = [np.abs(s.old_log_probs - s.sampler_log_probs) for s in sequences]
    assert sums.difference == pytest.approx(float(np.concatenate(apart).sum()), rel=1e-5)
    assert sums.compared == len(all_weights)


@pytest.mark.parametrize(
    ("given", "rewarded", "share"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"correction": {"kind": "tis", "high": 1.05}}, False, False),
        ({"kl_coefficient": 0.3}, True, False),
    ],
    ids=["alone", "beside rewards, prompts shared", "corrected", "beside a reference"],
)
def test_a_teacher_adds_the_gradient_of_the_kl_to_it_alone_or_beside_rewards(
    worker: Any, given: dict[str, Any], rewarded: bool, share: bool
) -> None:
    """rho log(pi / pi_teacher) grad log pi of every token, times what corrects the sampler; the reference is another model."""
    options = grpo(clip_low=0.9, clip_high=9, distill={"teacher": "t", "weight": 0.7}, **given)
    random = np.random.default_rng(1)
    sequences = [
        replace(
            s,
            advantage=s.advantage * rewarded,
            sampler_log_probs=s.old_log_probs + random.normal(0, 0.2, s.sampled_tokens).astype(np.float32),
        )
        for s in drawn()
    ]
    policy, reference, teacher = network(0), network(1), network(2)
    total, apart = torch.zeros(()), 0.0
    for sequence in sequences:
        old = torch.as_tensor(sequence.old_log_probs)
        now, then, wanted = (log_probs(model, sequence, TEMPERATURE) for model in (policy, reference, teacher))
        rho, far = (now - old).exp(), (now - wanted).detach()
        weight = plain_weights(
            {"kind": "none", **given.get("correction", {})}, old, torch.as_tensor(sequence.sampler_log_probs)
        )
        k3 = (then.detach() - now).exp() - (then.detach() - now) - 1
        learned = weight * (0.7 * rho.detach() * far * now - rho * sequence.advantage) + options.kl_coefficient * k3
        total = total + sequence.weight * learned.sum()
        apart += float((rho.detach() * ((-far).exp() + far - 1)).sum())
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])

    rank = worker(share_prompts=share)
    rank._teacher = LogProbs(network(2)).eval().requires_grad_(False)
    sums = rank.accumulate([sequences[:3], sequences[3:]], Objective(options, TEMPERATURE))
    found = torch.cat([p.grad.flatten() for p in rank._network.parameters()])
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert sums.teacher_kl == pytest.approx(apart, rel=1e-4)
    assert sums.tokens == sum(s.sampled_tokens for s in sequences)


def test_a_sample_without_advantage_adds_nothing_to_the_gradient(worker: Any) -> None:
    options = grpo()
    sequences = [replace(s, advantage=0.0 if place in (0, 3) else s.advantage) for place, s in enumerate(drawn())]
    gradients = []
    for computed in (sequences, [s for s in sequences if s.advantage]):
        rank = worker()
        rank.accumulate([computed], Objective(options, TEMPERATURE))
        gradients.append(torch.cat([p.grad.flatten() for p in rank._network.parameters()]))
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-6


@pytest.mark.parametrize(("gaps", "share"), [(False, False), (True, False), (True, True)])
def test_log_probabilities_are_those_after_the_temperature(worker: Any, gaps: bool, share: bool) -> None:
    sequences = drawn(gaps=gaps)
    rank = worker(share_prompts=share)
    [found] = rank.log_probs([sequences], TEMPERATURE)
    for values, sequence in zip(found, sequences, strict=True):
        assert values == pytest.approx(log_probs(network(0), sequence, TEMPERATURE).detach().numpy(), abs=1e-5)
    # A training pass tells them too, of the policy before the step's first update.
    objective = Objective(grpo(), TEMPERATURE)
    [older] = rank.accumulate([sequences], objective).log_probs
    [now] = rank.accumulate([[replace(s, old_log_probs=None) for s in sequences]], objective).log_probs
    for values, learned, old, sequence in zip(found, now, older, sequences, strict=True):
        assert learned == pytest.approx(values, abs=1e-5)
        assert list(old) == list(sequence.old_log_probs)


def test_matrices_decay_and_vectors_do_not(worker: Any) -> None:
    rank = worker()
    before = {name: p.detach().clone() for name, p in rank._network.named_parameters()}
    for parameter in rank._network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rank.apply(RATE)
    for name, parameter in rank._network.named_parameters():
        share = 1 - RATE * DECAY if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * share, msg=name)


def test_what_is_frozen_stays_and_takes_no_memory_of_the_optimizer(worker: Any) -> None:
    rank = worker(freeze=["norms", "embeddings"], gradient_checkpointing=True)
    before = {name: p.detach().clone() for name, p in rank._network.named_parameters()}
    rank.accumulate([drawn()], Objective())
    rank.apply(RATE)
    same = {name for name, p in rank._network.named_parameters() if torch.equal(p, before[name])}
    assert same == {name for name in before if "norm" in name or "embed" in name}
    stepped = [p for group in rank._optimizer.param_groups for p in group["params"]]
    assert len(stepped) == len(rank._optimizer.state) == len(before) - len(same)
    assert rank.missing_gradients() == []
    trained = sum(p.numel() for p in stepped)
    assert rank._what_is_trained().description.startswith(f"{trained:,} trainable parameters")


@pytest.mark.parametrize("on", [False, True])
def test_with_gradient_checkpointing_layers_are_computed_again_in_the_backward_pass(worker: Any, on: bool) -> None:
    rank = worker(gradient_checkpointing=on)
    passes: list[int] = []
    rank._network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    for objective in (Objective(), Objective(grpo())):
        passes.clear()
        rank.accumulate([drawn()], objective)
        assert len(passes) == 1 + on


@pytest.mark.parametrize(("pad", "end", "filled"), [(3, 5, 3), (0, 5, 0), (None, 5, 5), (None, None, 0)])
def test_rows_are_filled_up_whatever_tokens_a_tokenizer_has(pad: int | None, end: int | None, filled: int) -> None:
    assert pad_id_of(SimpleNamespace(pad_token_id=pad, eos_token_id=end)) == filled


def test_a_worker_without_an_optimizer_steps_by_the_signs_of_gradients_that_it_does_not_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As AdamW's first step does."""

    def join(self: Any, *_: Any) -> None:
        self._device, self._tokenizer = torch.device("cpu"), SimpleNamespace(pad_token_id=0)

    monkeypatch.setattr(FrugalRank, "_join", join)
    monkeypatch.setattr("align.learner.policy.load_policy", lambda _: network(0))
    rank = object.__new__(FrugalRank)
    rank._model = ModelOptions(path="a tiny Llama")
    rank._options = LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=RATE))
    trained = rank.setup("127.0.0.1", 0, 0, None)
    expected = network(0)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=FrugalRank.RATE, weight_decay=0.0, eps=1e-30)
    sequences = drawn()
    sum(-(s.weight * log_probs(expected, s, 1.0)).sum() for s in sequences).backward()
    optimizer.step()
    rank.accumulate([sequences], Objective())
    rank.apply(RATE)
    for (name, found), wanted in zip(rank._network.named_parameters(), expected.parameters(), strict=True):
        assert found.grad is None
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=0, msg=name)
    assert trained.sent_bytes == sum(t.nbytes for bucket in rank.publish(iter, 1e9) for t in bucket.values())


def test_the_bias_of_a_router_is_sent_as_a_checkpoint_has_it() -> None:
    sizes = {name: value for name, value in V2.items() if name != "topk_method"}
    policy: Any = AutoModelForCausalLM.from_config(DeepseekV3Config(**SIZES, **sizes), dtype=torch.float32)
    rank = rank_of(policy)
    rank._below = ("",)
    sent = {name: tensor for bucket in rank.publish(iter, 1e9) for name, tensor in bucket.items()}
    assert sent.keys() == revert_weight_conversion(policy, policy.state_dict()).keys()
    # Rounded weights leave it as it is: the learner, which computes with them for a comparison, has no other.
    for name, bias in persistent_buffers(policy):
        torch.nn.init.normal_(bias)
        coarse = [bucket[name] for bucket in rank.publish(iter, 1e9, precision="bfloat16") if name in bucket]
        assert torch.equal(coarse[0], bias)
    rank._below = ("lm_head.",)
    assert {name for bucket in rank.publish(iter, 1e9) for name in bucket} == {"lm_head.weight"}
