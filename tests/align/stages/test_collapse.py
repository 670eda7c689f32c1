"""Routers that collapse in SFT: most experts of a policy are damaged, so that its routers learn to use the others alone.

The alarm tells of it, and a balance loss keeps all experts in use, which are then mended. The stage and what a rank computes are the real ones, DeepSpeed
and Ray are not there.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from align.learner.balance import BalanceLosses, balance_metrics
from align.learner.batch import TrainingSequence
from align.learner.experts import ExpertCounter, load_metrics
from align.learner.objective import LogProbs, Objective, Sums
from align.learner.policy import LearnerWorker, Weights
from align.learner.routing import RoutingReplay
from align.model.policy import load_policy
from align.recipe import BalanceOptions, LearnerOptions, ModelOptions, OptimizerOptions

STEPS, GOOD_EXPERTS = 40, 2
RECIPE = (
    "data={card: nano_math}",
    f"sft={{steps: {STEPS}, sequences_per_step: 32, validation_limit: 32}}",
    "learner.optimizer={learning_rate: 2.0e-3, warmup_steps: 10, final_ratio: 0.5}",
    "run.overwrite=true",
)


class PlainLearner:
    """A learner of one rank in this process; what training does not need is `rest`'s."""

    def __init__(self, policy: Any, balance: BalanceOptions, rest: Any):
        self.policy, self._rest = policy, rest
        rank: Any = object.__new__(LearnerWorker)
        rank._options = LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=1e-3), balance=balance)
        rank._engine, rank._device, rank._pad_id = Weights(LogProbs(policy)), torch.device("cpu"), 1
        rank._reference, rank._checkpointed = None, []
        rank._routing, rank._expert_counter = RoutingReplay(policy), ExpertCounter(policy)
        rank._balance = BalanceLosses(policy, balance)
        self.rank, self.optimizer = rank, torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

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
        loads, _, balance = self.rank.take_expert_load()
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
def test_the_alarm_tells_of_it_and_a_balance_loss_prevents_it(
    train: Callable[..., Any], fake_learner: Callable[[], Any], policy: ModelOptions, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    even, off = BalanceOptions(expert=0.05), BalanceOptions()
    healthy = PlainLearner(load_policy(policy), even, fake_learner())
    first = train("sft", *RECIPE, learner=healthy)
    assert last_of(first, "experts/max_over_mean") < 2
    healthy.policy.save_pretrained(tmp_path / "healthy")

    found = {}
    for name, balance in (("collapsed", off), ("balanced", even)):
        damaged = load_policy(ModelOptions(path=str(tmp_path / "healthy")))
        damage(damaged)
        found[name] = train("sft", *RECIPE, "seed=1", learner=PlainLearner(damaged, balance, fake_learner()))
        told = [event["message"] for event in found[name].warnings if event.get("alarm") == "collapse"]
        loads = [step["experts/max_over_mean"] for step in found[name].steps]
        print(f"{name}: {loads[0]:.2f} to {last_of(found[name], 'experts/max_over_mean'):.2f}, {told}")
        print(f"  held-out loss {found[name].steps[-1]['validation_loss']:.4f}")
        found[name].told = told
    assert last_of(found["collapsed"], "experts/max_over_mean") >= 3
    at = re.match(r"SFT step (\d+): the router collapses", found["collapsed"].told[0])
    assert at is not None
    assert int(at[1]) < STEPS / 2
    assert last_of(found["balanced"], "experts/max_over_mean") < 2
    assert found["balanced"].told == []


def last_of(stage: Any, metric: str) -> float:
    """The mean of the last eight steps."""
    return fmean(step[metric] for step in stage.steps[-8:])
