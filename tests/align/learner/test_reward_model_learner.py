"""The learner of a reward model: however it is split, plain PyTorch's losses and gradients; and what it saves."""

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.errors import UserError
from align.learner.batch import in_order, plan_micro_batches, share_out, whole_rows
from align.learner.reward_model import PairLoss, PairSums, RewardModelGroup, TrainingPair, collate_pairs
from align.model.policy import load_tokenizer
from align.model.reward_model import load_reward_model, padding_token_id, tokenizer_hash
from align.recipe import LearnerOptions, ModelOptions, OptimizerOptions

STEPS = 6
CLIP = 0.5
OPTIMIZER = OptimizerOptions(learning_rate=1e-3, betas=(0.9, 0.95), clip_norm=CLIP)
EOS = 1


def pairs(seed: int, count: int = 9) -> list[TrainingPair]:
    """Random conversations that end as conversations do; the chosen ones hold token 7."""
    random = Random(seed)

    def conversation(mark: int) -> list[int]:
        return [0, *(random.randrange(10, 500) for _ in range(random.randint(3, 40))), mark, EOS]

    return [TrainingPair(conversation(7), conversation(8), random.random(), 1 / count) for _ in range(count)]


def plain_rewards(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    """One conversation at a time, without padding, read at the last token."""
    hidden = [model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences]
    return model.score(torch.stack(hidden))[:, 0]


def plain_losses(policy: ModelOptions, loss: PairLoss) -> list[float]:
    model = load_reward_model(policy, load_tokenizer(policy.path))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = pairs(step)
        chosen = plain_rewards(model, [list(pair.chosen) for pair in batch])
        rejected = plain_rewards(model, [list(pair.rejected) for pair in batch])
        if loss == "pairwise":
            value = -logsigmoid(chosen - rejected - torch.tensor([pair.margin for pair in batch])).mean()
        else:
            labels = torch.tensor([1.0] * len(batch) + [0.0] * len(batch))
            value = binary_cross_entropy_with_logits(torch.cat([chosen, rejected]), labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


class Trained(NamedTuple):
    group: RewardModelGroup
    loss: PairLoss
    sums: list[PairSums]


@pytest.fixture(
    scope="module",
    params=[(1, 2, "pointwise"), (2, 1, "pairwise"), (2, 3, "pairwise")],
    ids=lambda p: f"{p[0]} rank{'s' * (p[0] > 1)}, ZeRO-{p[1]}, {p[2]}",
)
def trained(request: pytest.FixtureRequest, policy: ModelOptions, ray_session: None) -> Iterator[Trained]:
    """A learner after some steps."""
    ranks, zero_stage, loss = request.param
    options = LearnerOptions(ranks=ranks, zero_stage=zero_stage, micro_batch_tokens=150, optimizer=OPTIMIZER)
    group = RewardModelGroup(policy, options, seed=0)
    group.wait_until_ready()
    sums = []
    for step in range(STEPS):
        sums.append(group.accumulate(pairs(step), loss))
        group.apply(1e-3)
    yield Trained(group, loss, sums)
    group.close()


def test_the_losses_are_those_of_plain_pytorch(trained: Trained, policy: ModelOptions) -> None:
    losses = [sums.loss for sums in trained.sums]
    assert losses == pytest.approx(plain_losses(policy, trained.loss), abs=1e-4)
    assert losses[-1] < losses[0]


def test_a_new_reward_model_prefers_nothing_which_is_half_right(trained: Trained) -> None:
    first = trained.sums[0]
    assert (first.pairs, first.right, first.difference) == (9, 4.5, 0.0)
    if trained.loss == "pointwise":
        assert first.loss == pytest.approx(math.log(2))


def test_an_ordinary_checkpoint_gives_the_learners_rewards_whatever_the_padding(
    trained: Trained, tmp_path: Path
) -> None:
    group = trained.group
    sequences = [list(pair.chosen) for pair in pairs(99)] + [list(pair.rejected) for pair in pairs(99)]
    rewards = group.rewards(sequences)
    group.save(tmp_path / "final")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert (model.config.num_labels, model.config.architectures) == (1, ["DeepseekV2ForSequenceClassification"])
    assert tokenizer.get_chat_template()
    assert plain_rewards(model, sequences).tolist() == pytest.approx(rewards, abs=1e-5)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        assert model(**batch).logits[:, 0].tolist() == pytest.approx(rewards, abs=1e-5), side
    with safe_open(tmp_path / "final" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == group.weights().keys()
    assert {"score.weight", "model.layers.1.mlp.experts.3.gate_proj.weight"} <= names
    assert "lm_head.weight" not in names


def test_every_parameter_had_a_gradient(trained: Trained) -> None:
    assert trained.group.missing_gradients() == []


def test_the_sums_do_not_count_what_keeps_an_idle_rank_busy(trained: Trained) -> None:
    sums = trained.group.accumulate(pairs(3, count=1), trained.loss)
    trained.group.apply(0.0)
    assert sums.pairs == 1
    assert sums.right in (0.0, 1.0)


def test_both_completions_of_a_pair_are_in_one_batch() -> None:
    batch = collate_pairs(
        [TrainingPair([5, 6, 1], [5, 1], 0.5, 0.25), TrainingPair([7, 1], [8, 9, 9, 1])], 0, torch.device("cpu")
    )
    assert batch.token_ids.tolist() == [[5, 6, 1, 0], [7, 1, 0, 0], [5, 1, 0, 0], [8, 9, 9, 1]]
    assert (batch.margins.tolist(), batch.weights.tolist()) == ([0.5, 0.0], [0.25, 0.0])


def test_results_of_ranks_come_back_in_order() -> None:
    items = [f"item {i}" for i in range(7)]
    plan = plan_micro_batches(*whole_rows([5, 1, 9, 3, 3, 8, 2]), 10, 3)
    work = share_out(items, plan, "idle")
    assert in_order(plan, [[[item.upper() for item in m] for m in rank] for rank in work]) == [i.upper() for i in items]


def test_batches_are_padded_with_anything_but_the_end(policy: ModelOptions) -> None:
    """transformers reads a reward at the last token that is no padding: with the end as padding, before the end."""
    tokenizer = load_tokenizer(policy.path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert padding_token_id(tokenizer, policy.path) == tokenizer.pad_token_id == tokenizer.bos_token_id
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match="has no token to pad with but the one that ends an answer"):
        padding_token_id(tokenizer, policy.path)


@pytest.mark.parametrize("pad", ["<unk>", "<turn>"])
def test_where_another_token_ends_an_answer_the_end_of_sequence_is_padding_too(policy: ModelOptions, pad: str) -> None:
    tokenizer = load_tokenizer(policy.path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}<turn>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.bos_token = tokenizer.unk_token = None
    tokenizer.pad_token = tokenizer.eos_token if pad == "<unk>" else pad
    assert padding_token_id(tokenizer, policy.path) == tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_reward_model_keeps_its_head_and_a_classifier_of_more_labels_is_refused(
    policy: ModelOptions, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(policy.path)
    model = load_reward_model(policy, tokenizer)
    assert model.score.weight.abs().max() == 0
    torch.nn.init.ones_(model.score.weight)
    model.save_pretrained(tmp_path)
    assert load_reward_model(ModelOptions(path=str(tmp_path)), tokenizer).score.weight.min() == 1
    wide = AutoModelForSequenceClassification.from_pretrained(policy.path, num_labels=3)
    wide.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot make a reward model of"):
        load_reward_model(ModelOptions(path=str(tmp_path)), tokenizer)


def test_a_tokenizers_hash_is_of_its_vocabulary_and_template(policy: ModelOptions) -> None:
    one, other = load_tokenizer(policy.path), load_tokenizer(policy.path)
    padding_token_id(other, policy.path)
    assert tokenizer_hash(one) == tokenizer_hash(other)
    other.chat_template += " "
    assert tokenizer_hash(one) != tokenizer_hash(other)
    other = load_tokenizer(policy.path)
    other.add_tokens(["<new>"])
    assert tokenizer_hash(one) != tokenizer_hash(other)
