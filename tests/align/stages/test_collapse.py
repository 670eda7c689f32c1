"""Routers in SFT: how even a balance loss makes the load, and one that collapses, of which the alarm tells and which a balance loss prevents.

The stage and what a rank computes are the real ones; DeepSpeed and Ray are not there.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from align.learner.balance import balance_metrics
from align.learner.batch import TrainingSequence
from align.learner.experts import load_metrics
from align.learner.objective import Objective, Sums
from align.model.policy import load_policy, write_random_policy
from align.recipe import BalanceOptions, ModelOptions

from ..small_models import rank_of

STEPS, GOOD_EXPERTS = 40, 2
RECIPE = (
    "data={card: nano_math}",
    f"sft={{steps: {STEPS}, sequences_per_step: 32, validation_limit: 96}}",
    "learner.optimizer={learning_rate: 2.0e-3, warmup_steps: 10, final_ratio: 0.5}",
    "run.overwrite=true",
)


class PlainLearner:
    """A learner of one rank in this process; what training does not need is `rest`'s."""

    def __init__(self, policy: Any, balance: BalanceOptions, rest: Any):
        self.policy, self._rest = policy, rest
        self.rank = rank_of(policy, balance=balance)
        self.optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rest, name)

    def accumulate(self, sequences: Sequence[TrainingSequence], objective: Objective) -> Sums:
        sums: Sums = self.rank.accumulate([list(sequences)], objective, batch_size=len(sequences))
        return sums

    def apply(self, learning_rate: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0))
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def expert_load(self) -> dict[str, float]:
        loads, balance = self.rank.take_expert_load()
        return load_metrics(loads) | balance_metrics([balance])

    def log_probs(self, sequences: Sequence[TrainingSequence], temperature: float) -> list[Any]:
        return self.rank.log_probs([list(sequences)], temperature)[0]  # type: ignore[no-any-return]


def damage(policy: Any) -> None:
    """Noise in all experts of each layer but the first ones."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in policy.model.layers:
            if hasattr(layer.mlp, "experts"):
                broken = layer.mlp.experts.down_proj[GOOD_EXPERTS:]
                broken += torch.randn(broken.shape, generator=generator)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_load_is_more_even_at_no_cost_to_the_held_out_loss(
    train: Callable[..., Any], fake_learner: Callable[[], Any], tmp_path: Path, seed: int
) -> None:
    torch.set_num_threads(1)
    write_random_policy(ModelOptions(path="recipes/nano/policy", init="random"), tmp_path / "policy", seed=seed)
    variation, held_out = [], []
    for factor in (0.0, 0.01):
        policy = load_policy(ModelOptions(path=str(tmp_path / "policy")))
        learner = PlainLearner(policy, BalanceOptions(expert=factor), fake_learner())
        stage = train("sft", *RECIPE, "sft.steps=80", f"seed={seed}", learner=learner)
        variation.append(last_of(stage, "experts/cv"))
        held_out.append(stage.steps[-1]["validation_loss"])
        busiest = last_of(stage, "experts/max_over_mean")
        print(f"seed {seed}, {factor}: cv {variation[-1]:.3f}, busiest {busiest:.2f}, held-out loss {held_out[-1]:.4f}")
    assert variation[1] < 0.5 * variation[0]
    assert held_out[1] < 1.01 * held_out[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_alarm_tells_of_it_and_a_balance_loss_prevents_it(
    train: Callable[..., Any], fake_learner: Callable[[], Any], policy: ModelOptions, tmp_path: Path
) -> None:
    """Most experts of a policy are damaged, so that its routers learn to use the others alone; with the loss all are used, and mended."""
    torch.set_num_threads(1)
    even, off = BalanceOptions(expert=0.05), BalanceOptions()
    healthy = PlainLearner(load_policy(policy), even, fake_learner())
    first = train("sft", *RECIPE, learner=healthy)
    assert last_of(first, "experts/max_over_mean") < 2
    healthy.policy.save_pretrained(tmp_path / "healthy")

    told, busiest = {}, {}
    for name, balance in (("collapsed", off), ("balanced", even)):
        damaged = load_policy(ModelOptions(path=str(tmp_path / "healthy")))
        damage(damaged)
        stage = train("sft", *RECIPE, "seed=1", learner=PlainLearner(damaged, balance, fake_learner()))
        told[name] = [event["message"] for event in stage.warnings if event.get("alarm") == "collapse"]
        busiest[name] = last_of(stage, "experts/max_over_mean")
        print(
            f"{name}: busiest {stage.steps[0]['experts/max_over_mean']:.2f} to {busiest[name]:.2f}, told {told[name]}"
        )
        print(f"  held-out loss {stage.steps[-1]['validation_loss']:.4f}")
    assert busiest["collapsed"] >= 3
    at = re.match(r"SFT step (\d+): the router collapses", told["collapsed"][0])
    assert at is not None
    assert int(at[1]) < STEPS / 2
    assert busiest["balanced"] < 2
    assert told["balanced"] == []


def last_of(stage: Any, metric: str) -> float:
    """The mean of the last eight steps."""
    return fmean(step[metric] for step in stage.steps[-8:])
