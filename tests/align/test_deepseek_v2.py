"""The nano policy with DeepSeek-V2's own options: a query latent, experts from the best groups, their weights scaled by 16.

The nano recipes' policy is DeepSeek-V2-Lite in small, which has none of the three.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.evaluate.agreement import AgreementGate, Disagreement, probe
from align.evaluate.doctor import CheckStatus, examine, verdict
from align.experience import training_sequence
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective
from align.model.policy import load_tokenizer
from align.recipe import AgreementOptions, GrpoOptions, LearnerOptions, ModelOptions, OptimizerOptions
from rollout import Fleet, FleetOptions, Prompt, SamplingOptions

PROMPTS = [Prompt(f"p{i}", [0, 40 + i, 60 + 3 * i, 17]) for i in range(8)]
GRPO = GrpoOptions(steps=1, prompts_per_step=8, group_size=2, kl_coefficient=0.1)


def test_the_doctor_finds_nothing_wrong_with_it(deepseek_v2: ModelOptions) -> None:
    checks = examine(deepseek_v2, load_tokenizer(deepseek_v2.path))
    assert verdict(checks, deepseek_v2.path)
    assert next(check for check in checks if check.name == "routing").status is CheckStatus.OK


@pytest.mark.parametrize("changed", [{"routed_scaling_factor": 1.0}, {"topk_method": "greedy", "n_group": 1}])
def test_what_it_says_depends_on_its_groups_and_its_scaling(deepseek_v2: ModelOptions, changed: dict[str, Any]) -> None:
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        own, other = (
            AutoModelForCausalLM.from_pretrained(deepseek_v2.path, **more)(input_ids=ids).logits.log_softmax(-1)
            for more in ({}, changed)
        )
    assert (own - other).abs().mean() > 0.01


def test_sampler_and_learner_agree_through_updates_of_both_stages(
    deepseek_v2: ModelOptions, ray_session: None, tmp_path: Path, warm_processes: Any
) -> None:
    """Under ZeRO-3 with gradient checkpointing, as DeepSeek-V2's recipes train."""
    gate = AgreementGate(AgreementOptions(), "float32", pytest.fail)
    options = FleetOptions(workers=1, max_length=64, kv_cache_gb=0.25)
    fleet = Fleet(deepseek_v2.path, "float32", options, stop_token_ids=[1])
    rate = OptimizerOptions(learning_rate=1e-2, weight_decay=0.1)
    warm_processes.ranks.close()  # a process that had another ZeRO-3 engine has hooks of it
    learner = LearnerGroup(
        deepseek_v2,
        LearnerOptions(ranks=2, zero_stage=3, gradient_checkpointing=True, micro_batch_tokens=100, optimizer=rate),
        seed=0,
        reference=deepseek_v2,
    )
    try:
        fleet.wait_until_ready()
        learner.wait_until_ready()
        gate.check(probe(fleet, learner, PROMPTS), "at the start")
        demonstrations = [
            TrainingSequence.of_completion([*p.token_ids, *range(300 + i, 340 + i)], 4, 1 / 320)
            for i, p in enumerate(PROMPTS)
        ]
        losses = []
        for version in (1, 2):
            losses.append(learner.accumulate(demonstrations, Objective()).loss)
            learner.apply(1e-2)
            learner.sync_weights(fleet, version=version)
            gate.check(probe(fleet, learner, PROMPTS), f"after update {version}")
        assert losses[1] < losses[0]
        groups = fleet.sample(PROMPTS, 2, SamplingOptions(temperature=0.8, max_new_tokens=16), seed=0, step=0)
        sampled = [
            training_sequence(t, weight=1e-2, advantage=(-1.0) ** t.index)
            for group in groups
            for t in group.trajectories
        ]
        sums = learner.accumulate(sampled, Objective(GRPO, 0.8))
        gate.check(Disagreement.of(sums), "of the samples")
        assert sums.kl > 0
        assert 0 < learner.apply(1e-2) < float("inf")
        learner.sync_weights(fleet, version=3)
        gate.check(probe(fleet, learner, PROMPTS), "after GRPO")
        learner.save(tmp_path / "final")
    finally:
        learner.close()
        fleet.close()
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(told.values()), told


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipes_of_sft_and_grpo_train_it(deepseek_v2: ModelOptions, tmp_path: Path, agreements: Any) -> None:
    small = ["evaluation={limit: 8, samples: 0, max_new_tokens: 16}", "save_every=null"]
    sft = ["sft={steps: 2, sequences_per_step: 16, validation_limit: 8}"]
    grpo = ["grpo={steps: 3, prompts_per_step: 8, group_size: 4}", "init_from=null"]
    grpo += ["learner.optimizer.learning_rate=1e-3"]
    found = agreements("sft", deepseek_v2.path, tmp_path / "sft", *small, *sft)
    found += agreements("grpo", tmp_path / "sft" / "final", tmp_path / "grpo", *small, *grpo)
    print(f"agreement {max(found):.1e}")
    assert max(found) < 1e-5
