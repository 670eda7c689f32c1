"""Experts spread over two ranks train as experts that each rank has all of: same losses, gradients, loads and checkpoints."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig

from align.errors import UserError
from align.learner.batch import TrainingSequence
from align.learner.experts import check_spreadable
from align.learner.group import LearnerGroup
from align.learner.objective import Objective
from align.learner.reward_model import RewardModelGroup, TrainingPair
from align.model.policy import load_tokenizer
from align.recipe import BalanceOptions, LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions

Draw = Callable[[int], list[TrainingSequence]]
STEPS = 3
OPTIMIZER = OptimizerOptions(learning_rate=1e-3, weight_decay=0.01, clip_norm=0.5)
# Large enough to make a twentieth of the gradient's norm.
BALANCE = BalanceOptions(expert=0.1)
WHOLE = LearnerOptions(ranks=2, micro_batch_tokens=200, optimizer=OPTIMIZER, balance=BALANCE)
SPREAD = WHOLE.model_copy(update={"expert_parallel": 2})


def train(policy: ModelOptions, options: LearnerOptions, sequences: Draw, saved: Path) -> dict[str, Any]:
    """Some steps; the losses and norms, the tokens of each expert, and what is left of them."""
    with closing(LearnerGroup(policy, options, seed=0)) as learner:
        learner.wait_until_ready()
        losses, norms = [], []
        for step in range(STEPS):
            losses.append(learner.accumulate(sequences(step), Objective()).loss)
            norms.append(learner.apply(1e-3))
        load = learner.expert_load()
        learner.save(saved)
        return {
            "losses": losses,
            "norms": norms,
            "load": load,
            "log_probs": learner.log_probs(sequences(99), 1.0),
            "weights": learner.weights(),
            "missing": learner.missing_gradients(),
        }


@pytest.fixture(scope="module")
def whole(ray_session: None, policy: ModelOptions, sequences: Draw, tmp_path_factory: Any) -> dict[str, Any]:
    return train(policy, WHOLE, sequences, tmp_path_factory.mktemp("whole") / "final")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("spread")
    return path


@pytest.fixture(scope="module")
def spread(ray_session: None, policy: ModelOptions, sequences: Draw, directory: Path) -> dict[str, Any]:
    return train(policy, SPREAD, sequences, directory / "final")


def test_losses_and_norms_are_those_of_whole_experts(whole: dict[str, Any], spread: dict[str, Any]) -> None:
    assert spread["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    assert spread["norms"] == pytest.approx(whole["norms"], rel=1e-3)


def test_each_expert_had_the_same_tokens_and_a_gradient(whole: dict[str, Any], spread: dict[str, Any]) -> None:
    assert spread["load"] == pytest.approx(whole["load"], abs=0.02)
    assert spread["load"]["balance/expert"] == pytest.approx(whole["load"]["balance/expert"], rel=1e-3)
    assert spread["missing"] == []


def test_the_weights_are_gathered_whole_under_the_checkpoints_names(
    whole: dict[str, Any], spread: dict[str, Any]
) -> None:
    assert spread["weights"].keys() == whole["weights"].keys()
    for name, tensor in spread["weights"].items():
        torch.testing.assert_close(tensor, whole["weights"][name], atol=2e-3, rtol=0, msg=name)


def test_transformers_loads_the_checkpoint_and_computes_the_same(
    spread: dict[str, Any], directory: Path, sequences: Draw
) -> None:
    model, told = AutoModelForCausalLM.from_pretrained(directory / "final", output_loading_info=True)
    assert not any(told.values()), told
    for sequence, expected in zip(sequences(99), spread["log_probs"], strict=True):
        ids = torch.tensor([sequence.token_ids])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found = log_probs.gather(1, ids[0, 1:, None])[sequence.prompt_length - 1 :, 0]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_reward_models_too(ray_session: None, policy: ModelOptions, sequences: Draw) -> None:
    losses: list[list[float]] = []
    eos = load_tokenizer(policy.path).eos_token_id
    texts = [[*s.token_ids, eos] for s in sequences(0)]
    pairs = [TrainingPair(a, b, weight=1 / 6) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    for options in (WHOLE, SPREAD):
        with closing(RewardModelGroup(policy, options, seed=0)) as learner:
            learner.wait_until_ready()
            losses.append([])
            for _ in range(3):
                losses[-1].append(learner.accumulate(pairs, "pairwise").loss)
                learner.apply(1e-3)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[1][2] < losses[1][0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sft_and_grpo_sample_and_learn_the_same(tmp_path: Path, align: Any, read_lines: Any) -> None:
    small = ["evaluation={limit: 8, samples: 0}", "save_every=null"]
    runs = []
    for size in (1, 2):
        run = tmp_path / str(size)
        spread = [f"learner.expert_parallel={size}", f"run.dir={run}", *small]
        align("sft", "recipes/nano/sft.yaml", *spread, "sft={steps: 5, sequences_per_step: 32}").ends(0)
        started = [f"model={{path: {run / 'final'}}}", "init_from=null", f"run.dir={run / 'grpo'}"]
        shape = "grpo={steps: 3, prompts_per_step: 8, group_size: 4}"
        align("grpo", "recipes/nano/grpo.yaml", *spread[:1], *started, *small, shape).ends(0)
        runs.append([*read_lines(run / "metrics.jsonl"), *read_lines(run / "grpo" / "metrics.jsonl")])
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in runs]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    agreements = [[line["agreement/mean"] for line in lines if "agreement/mean" in line] for lines in runs]
    assert len(agreements[1]) == len(agreements[0]) >= 3
    assert max(agreements[1]) < 1e-5


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ranks": 3}, "multiple of expert_parallel"),
        ({"zero_stage": 3}, "zero_stage 1 or 2"),
        ({"lora": LoraOptions()}, "leave out lora"),
        ({"freeze": ["experts"]}, "experts and first layers out of freeze"),
        ({"freeze": ["first_2_layers"]}, "experts and first layers out of freeze"),
        ({"expert_parallel": 1, "freeze": ["routr"]}, "should be one of router, .*, or first_N_layers such as"),
    ],
)
def test_what_does_not_go_together_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LearnerOptions.model_validate({"optimizer": OPTIMIZER, "ranks": 2, "expert_parallel": 2} | changed)


def test_models_whose_experts_cannot_be_spread_are_refused(policy: ModelOptions) -> None:
    config = AutoModelForCausalLM.from_pretrained(policy.path).config
    with pytest.raises(UserError, match="8 experts of a layer cannot be divided"):
        check_spreadable(config, 3)
    with pytest.raises(UserError, match="not for llama"):
        check_spreadable(LlamaConfig(), 2)
