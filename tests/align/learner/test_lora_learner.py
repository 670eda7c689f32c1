"""LoRA in the learner: plain PEFT's losses on whatever ranks and ZeRO stage, an untouched base, and what is saved."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from align.learner.batch import TrainingSequence, collate
from align.learner.group import LearnerGroup
from align.learner.objective import LogProbs, Objective, Sums
from align.losses import grpo_token_loss
from align.model.names import to_checkpoint
from align.recipe import GrpoOptions, LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions

STEPS = 6
CLIP = 0.5
RATE = 1e-2
OPTIMIZER = OptimizerOptions(learning_rate=RATE, betas=(0.9, 0.95), clip_norm=CLIP)
GRPO = GrpoOptions(steps=1, prompts_per_step=1, group_size=2, kl_coefficient=0.5)
EVERYTHING = LoraOptions(rank=4, alpha=8, targets=["attention+shared", "kv_b_proj", "experts"])


Draw = Callable[[int], list[TrainingSequence]]


def peft_model(base: ModelOptions, adapter: Path, *, trainable: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)


def log_probs(model: Any, batch_of: list[TrainingSequence]) -> torch.Tensor:
    batch = collate(batch_of, pad_id=0)
    with torch.no_grad():
        values, _ = LogProbs(model)(batch.token_ids, batch.targets, 1.0)
    return values[batch.mask]


class Trained(NamedTuple):
    learner: LearnerGroup
    losses: list[float]
    sampled: list[TrainingSequence]
    grpo: Sums
    start: Path
    end: Path


@pytest.fixture(
    scope="module",
    params=[(1, 0), (2, 3), pytest.param((2, 2), marks=pytest.mark.slow)],
    ids=lambda p: f"{p[0]} rank{'s' * (p[0] > 1)}, ZeRO-{p[1]}",
)
def trained(
    request: pytest.FixtureRequest,
    policy: ModelOptions,
    sequences: Draw,
    experience: Any,
    ray_session: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Trained]:
    """A learner of adapters after some steps, what it saved before and after them, and a look at a batch of GRPO."""
    ranks, zero_stage = request.param
    directory = tmp_path_factory.mktemp("lora")
    options = LearnerOptions(
        ranks=ranks, zero_stage=zero_stage, micro_batch_tokens=200, optimizer=OPTIMIZER, lora=EVERYTHING
    )
    learner = LearnerGroup(policy, options, seed=0, reference=policy)
    learner.wait_until_ready()
    learner.save(directory / "start")
    losses = []
    for step in range(STEPS):
        losses.append(learner.accumulate(sequences(step), Objective()).loss)
        learner.apply(RATE)
    sampled = experience(sequences(99), learner.log_probs(sequences(99), 1.0))
    grpo = learner.accumulate(sampled, Objective(GRPO))
    learner.apply(0.0)
    learner.save(directory / "end")
    yield Trained(learner, losses, sampled, grpo, directory / "start", directory / "end")
    learner.close()


def test_the_losses_are_those_of_plain_peft(trained: Trained, policy: ModelOptions, sequences: Draw) -> None:
    model = peft_model(policy, trained.start / "adapter", trainable=True)
    module = LogProbs(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    losses = []
    for step in range(STEPS):
        batch = collate(sequences(step), pad_id=0)
        values, _ = module(batch.token_ids, batch.targets, 1.0)
        loss = -values[batch.mask].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert trained.losses == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < losses[0] - 0.01


def test_the_reference_is_the_policy_without_its_adapter(trained: Trained, policy: ModelOptions) -> None:
    batch = collate(trained.sampled, pad_id=0)
    assert batch.old_log_probs is not None
    now, _ = LogProbs(peft_model(policy, trained.end / "adapter"))(batch.token_ids, batch.targets, 1.0)
    before, _ = LogProbs(AutoModelForCausalLM.from_pretrained(policy.path))(batch.token_ids, batch.targets, 1.0)
    terms = grpo_token_loss(
        now, batch.old_log_probs, before, batch.advantages, batch.mask, kl_coefficient=GRPO.kl_coefficient
    )
    assert trained.grpo.loss == pytest.approx((terms.loss * batch.weights).sum().item(), abs=1e-5)
    assert trained.grpo.kl == pytest.approx(float(terms.kl.sum()), rel=1e-3)
    assert trained.grpo.kl > 1e-3


def test_the_base_is_untouched_to_the_last_bit_and_nothing_but_adapters_trains(
    trained: Trained, policy: ModelOptions
) -> None:
    import ray

    def own_parameters(worker: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
        from align.model.lora import plain_parameters

        found = {}
        for name, parameter in plain_parameters(worker._network).items():
            with worker._whole([parameter]):
                found[name] = parameter.detach().clone()
        return found, [name for name, p in worker._network.named_parameters() if p.requires_grad]

    found, names = ray.get([rank.__ray_call__.remote(own_parameters) for rank in trained.learner._ranks])[0]
    base = dict(AutoModelForCausalLM.from_pretrained(policy.path).named_parameters())
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in base.items())
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert trained.learner.missing_gradients() == []


def test_what_is_sent_is_peft_s_merge_of_the_modules_that_change(trained: Trained, policy: ModelOptions) -> None:
    whole = peft_model(policy, trained.end / "adapter").merge_and_unload()
    expected = dict(to_checkpoint((n, p.detach()) for n, p in whole.named_parameters()))
    sent = trained.learner.weights()
    assert {name for name in expected if name not in sent} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.{part}_layernorm.weight" for i in range(4) for part in ("input", "post_attention")),
        *(f"model.layers.{i}.mlp.gate.weight" for i in (1, 2, 3)),
    }
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-6)


def test_the_checkpoint_and_the_adapter_in_it_give_the_learner_s_log_probabilities(
    trained: Trained, policy: ModelOptions, sequences: Draw
) -> None:
    batch = sequences(99)
    learned = torch.from_numpy(np.concatenate(trained.learner.log_probs(batch, 1.0)))
    base = log_probs(AutoModelForCausalLM.from_pretrained(policy.path), batch)
    assert float((learned - base).abs().mean()) > 0.01
    adapted = log_probs(peft_model(policy, trained.end / "adapter"), batch)
    checkpoint = log_probs(AutoModelForCausalLM.from_pretrained(trained.end), batch)
    torch.testing.assert_close(adapted, learned, atol=2e-5, rtol=0)
    torch.testing.assert_close(checkpoint, learned, atol=2e-5, rtol=0)
