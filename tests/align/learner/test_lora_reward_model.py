"""A reward model from adapters: its head trains as a whole, and what is saved is an ordinary reward model."""

from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from align.learner.reward_model import RewardModelGroup, TrainingPair
from align.recipe import LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions
from reward.learned.model import _load

EOS = 1


def pairs(seed: int, count: int = 9) -> list[TrainingPair]:
    """Random conversations that end as conversations do; the chosen ones hold token 7."""
    random = Random(seed)

    def conversation(mark: int) -> list[int]:
        return [0, *(random.randrange(10, 500) for _ in range(random.randint(3, 40))), mark, EOS]

    return [TrainingPair(conversation(7), conversation(8), 0.0, 1 / count) for _ in range(count)]


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_head_and_adapters_learn_and_every_loader_gives_the_same_rewards(
    zero_stage: int, policy: ModelOptions, ray_session: None, tmp_path: Path
) -> None:
    options = LearnerOptions(
        ranks=2,
        zero_stage=zero_stage,
        micro_batch_tokens=150,
        optimizer=OptimizerOptions(learning_rate=3e-3),
        lora=LoraOptions(rank=4, targets=["attention+shared", "experts"]),
    )
    with closing(RewardModelGroup(policy, options, seed=0)) as group:
        group.wait_until_ready()
        assert group.trained.description.endswith("and score as a whole")
        losses = []
        for _ in range(15):
            losses.append(group.accumulate(pairs(0), "pairwise").loss)
            group.apply(3e-3)
        assert losses[-1] < 0.1 < losses[0], "one batch is learned by heart"
        assert group.missing_gradients() == []
        sequences = [list(pair.chosen) for pair in pairs(99)] + [list(pair.rejected) for pair in pairs(99)]
        rewards = group.rewards(sequences)
        group.save(tmp_path / "final")
    final = tmp_path / "final"
    whole = AutoModelForSequenceClassification.from_pretrained(final)
    base = AutoModelForSequenceClassification.from_pretrained(policy.path, num_labels=1, pad_token_id=0)
    adapted = PeftModel.from_pretrained(base, str(final / "adapter"))
    assert whole.score.weight.any()
    for model in (whole, adapted):
        found = [model(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in sequences]
        assert found == pytest.approx(rewards, abs=1e-5)
    assert _load(str(final), "float32", "cpu").numbers(sequences, 4) == pytest.approx(rewards, abs=1e-5)
