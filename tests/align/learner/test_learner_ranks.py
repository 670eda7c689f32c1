"""However many ranks, whatever the ZeRO stage and the split into micro-batches: the same losses and gradients.

The reference is plain PyTorch in this process: one rank, one padded batch, no DeepSpeed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from align.learner.batch import TrainingSequence, collate
from align.learner.group import LearnerGroup
from align.learner.objective import LogProbs, Objective
from align.learner.offload import storages
from align.losses import grpo_token_loss
from align.model.names import from_checkpoint
from align.model.policy import load_policy
from align.recipe import GrpoOptions, LearnerOptions, ModelOptions, OptimizerOptions

STEPS = 5
CLIP = 0.5
DECAY = 1.0
UNUSED = slice(512, None)  # of the vocabulary, by the sequences
# With a first beta of 0, Adam's first moment is the gradient that the last step was taken with.
OPTIMIZER = OptimizerOptions(learning_rate=1e-3, betas=(0.0, 0.95), clip_norm=CLIP, weight_decay=DECAY)
GRPO = GrpoOptions(steps=1, prompts_per_step=1, group_size=2, kl_coefficient=0.1)


Draw = Callable[[int], list[TrainingSequence]]


def plain_steps(policy: ModelOptions, sequences: Draw) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the steps, and the weights after them."""
    model = load_policy(policy)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.0, 0.95))
    losses = []
    for step in range(STEPS):
        batch = collate(sequences(step), pad_id=0)
        labels = torch.full_like(batch.token_ids, -100)
        kept = batch.targets.shape[1]
        labels[:, -kept:] = torch.where(batch.mask, batch.targets, -100)
        logits = model(input_ids=batch.token_ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def plain_gradient(weights: dict[str, torch.Tensor], policy: ModelOptions, batch_of: list[TrainingSequence]) -> Any:
    module = LogProbs(load_policy(policy))
    reference = LogProbs(load_policy(policy))
    module.policy.load_state_dict(from_checkpoint(weights))
    batch = collate(batch_of, pad_id=0)
    log_probs, _ = module(batch.token_ids, batch.targets, 1.0)
    with torch.no_grad():
        before, _ = reference(batch.token_ids, batch.targets, 1.0)
    terms = grpo_token_loss(
        log_probs, batch.old_log_probs, before, batch.advantages, batch.mask, kl_coefficient=GRPO.kl_coefficient
    )
    (terms.loss * batch.weights).sum().backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
    return {name: p.grad for name, p in module.policy.named_parameters()}


def gradient_of_last_step(learner: LearnerGroup) -> dict[str, torch.Tensor]:
    """The whole gradient, gathered from the ranks' optimizers."""
    import ray

    def read(worker: Any) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        parameters = dict(worker._engine.module.policy.named_parameters())
        if worker._options.zero_stage == 0:
            return {name: worker._engine.optimizer.state[p]["exp_avg"] for name, p in parameters.items()}
        if worker._options.zero_stage < 3:
            # DeepSpeed links the states once, after the first parameter group's first step: too early for the others.
            worker._optimizer._hp_optimizer_states_linked = False
            worker._optimizer._lazy_init_hp_params_optimizer_state()
        return {name: safe_get_full_optimizer_state(p, "exp_avg") for name, p in parameters.items()}

    return ray.get([rank.__ray_call__.remote(read) for rank in learner._ranks])[0]


@pytest.fixture(scope="module")
def teacher(policy: ModelOptions, tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    """Of another architecture, and with the policy's tokens."""
    directory, vocabulary = tmp_path_factory.mktemp("teacher"), load_policy(policy).config.vocab_size
    torch.manual_seed(1)
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **sizes)).save_pretrained(directory)
    return ModelOptions(path=str(directory))


@pytest.fixture(scope="module")
def expected(policy: ModelOptions, sequences: Draw) -> tuple[list[float], dict[str, torch.Tensor]]:
    return plain_steps(policy, sequences)


@pytest.fixture(
    scope="module",
    params=[
        (2, 1, False),
        (2, 3, True),
        *(pytest.param(way, marks=pytest.mark.slow) for way in ((1, 1, False), (2, 0, False), (2, 2, False))),
    ],
    ids=lambda p: f"{p[0]} rank{'s' * (p[0] > 1)}, ZeRO-{p[1]}{', checkpointing' * p[2]}",
)
def learner(
    request: pytest.FixtureRequest, policy: ModelOptions, teacher: ModelOptions, ray_session: None
) -> Iterator[LearnerGroup]:
    ranks, zero_stage, checkpointing = request.param
    options = LearnerOptions(
        ranks=ranks,
        zero_stage=zero_stage,
        gradient_checkpointing=checkpointing,
        micro_batch_tokens=200,
        optimizer=OPTIMIZER,
    )
    group = LearnerGroup(policy, options, seed=0, reference=policy, teacher=teacher)
    group.wait_until_ready()
    yield group
    group.close()


def test_some_steps_have_the_losses_and_the_weights_of_plain_pytorch(
    learner: LearnerGroup, policy: ModelOptions, expected: tuple[list[float], dict[str, torch.Tensor]], sequences: Draw
) -> None:
    expected_losses, expected_weights = expected
    losses = []
    for step in range(STEPS):
        losses.append(learner.accumulate(sequences(step), Objective()).loss)
        learner.apply(1e-3)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    weights, before = from_checkpoint(learner.weights()), load_policy(policy).state_dict()
    moved = torch.sqrt(sum((expected_weights[n] - before[n]).square().sum() for n in weights))
    apart = torch.sqrt(sum((expected_weights[n] - weights[n]).square().sum() for n in weights))
    print(f"apart {apart / moved:.5f}")
    assert apart < 0.01 * moved
    unused = "model.embed_tokens.weight"
    shrunk = before[unused][UNUSED] * (1 - 1e-3 * DECAY) ** STEPS
    torch.testing.assert_close(weights[unused][UNUSED], shrunk, rtol=1e-5, atol=0)


def test_with_checkpointing_a_layer_is_computed_again_in_backward(learner: LearnerGroup, sequences: Draw) -> None:
    import ray

    def listen(worker: Any) -> None:
        worker.passes = 0

        def count(*_: Any) -> None:
            worker.passes += 1

        # Before it: the second pass ends as soon as it has what backward asks for.
        worker.handle = worker._network.model.layers[0].mlp.register_forward_pre_hook(count)

    def heard(worker: Any) -> int:
        worker.handle.remove()
        return worker.passes

    batch = [replace(s, advantage=1.0) for s in sequences(0)]
    for objective in (Objective(), Objective(GRPO)):
        ray.get([rank.__ray_call__.remote(listen) for rank in learner._ranks])
        learner._options = learner._options.model_copy(update={"micro_batch_tokens": 10**6})
        learner.accumulate(batch, objective)
        passes = ray.get([rank.__ray_call__.remote(heard) for rank in learner._ranks])
        assert set(passes) == {2 if learner._options.gradient_checkpointing else 1}
        learner.apply(0.0)


def test_every_parameter_and_every_expert_had_a_gradient(learner: LearnerGroup) -> None:
    assert learner.missing_gradients() == []


def test_the_grpo_gradient_is_the_same_under_every_split(
    learner: LearnerGroup, policy: ModelOptions, sequences: Draw, experience: Any
) -> None:
    batch = experience(sequences(99), learner.log_probs(sequences(99), 1.0))
    expected = plain_gradient(learner.weights(), policy, batch)
    size = torch.sqrt(sum(g.square().sum() for g in expected.values()))
    for micro_batch_tokens, calls in ((50, 1), (200, 3), (10**6, 1)):
        learner._options = learner._options.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
        for part in range(calls):
            [told] = learner.accumulate(batch[part::calls], Objective(GRPO)).log_probs
            assert [list(values) for values in told] == [list(s.old_log_probs) for s in batch[part::calls]]
        learner.apply(0.0)
        found = gradient_of_last_step(learner)
        assert found.keys() == expected.keys()
        apart = torch.sqrt(sum((found[n] - g).square().sum() for n, g in expected.items()))
        assert apart / size < 1e-5, (micro_batch_tokens, calls)


@pytest.mark.parametrize("which", ["_reference", "_teacher"])
def test_what_is_frozen_says_what_a_whole_copy_says_and_is_shared_out_under_zero_3(
    learner: LearnerGroup, policy: ModelOptions, teacher: ModelOptions, sequences: Draw, which: str
) -> None:
    import ray

    copied = policy if which == "_reference" else teacher

    def compare(worker: Any, drawn: list[TrainingSequence]) -> tuple[bool, int, int, int]:
        frozen, batch, whole = getattr(worker, which), worker._collate(drawn), LogProbs(load_policy(copied))
        with torch.no_grad():
            expected = whole(**batch.inputs, temperature=0.7)[0]
        # Three times: in the first two passes DeepSpeed sees in which order modules are computed, and then it prefetches.
        equal = [torch.equal(worker._frozen_log_probs(frozen, batch, 0.7), expected) for _ in range(3)]
        # DeepSpeed leaves small parameters whole, which most of nano's are.
        small = sum(4 * p.ds_numel for p in frozen.parameters() if getattr(p, "ds_persist", False))
        return all(equal), small, *(sum(s.nbytes() for s in storages(held)) for held in (frozen, whole))

    # Each rank has sequences of its own, of which the experts of a layer get other tokens.
    calls = [r.__ray_call__.remote(compare, sequences(n)[n : 3 * n + 4]) for n, r in enumerate(learner._ranks)]
    for equal, small, held, whole in ray.get(calls):
        assert equal
        assert held - small == pytest.approx(whole / (2 if learner._options.zero_stage == 3 else 1), rel=0.01)
