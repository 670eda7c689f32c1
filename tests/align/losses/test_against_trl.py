"""Our GRPO against the code of TRL 1.16 itself, on the same tensors: losses, gradients, advantages.

`GRPOTrainer._compute_loss` is called as it is, on a trainer made without its constructor, and a model whose
logits are one leaf tensor: its hidden states are the logits and its LM head is the identity, under TRL's own
fused head. So the gradient compared is that of the logits, through TRL's log-probabilities and through ours.

=================================  =====================================================
TRL                                here
=================================  =====================================================
`loss_type="grpo"`                 weights `sample_mean`
`loss_type="bnpo"`, `"dapo"`       weights `token_mean`
`loss_type="luspo"`                weights `sequence_sum`
`beta`                             `kl_coefficient`
`epsilon`, `epsilon_high`          `clip_low`, `clip_high`
no `old_per_token_logps`           `old_log_probs=None`
`importance_sampling_ratio`        `importance`
`num_items_in_batch`               the sum of the lengths in the global batch
=================================  =====================================================

TRL's correction for vLLM's log-probabilities is off (`use_vllm=False`) except where it is itself compared.
Its auxiliary loss, entropy bonus and off-policy mask are off. TRL has no form of the report's eq. 32: its
`importance_sampling_level="sequence"` is GSPO, the geometric mean over tokens.
"""

from collections import defaultdict
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from align.losses import (
    Aggregation,
    completion_weights,
    group_advantages,
    grpo_token_loss,
    importance_weights,
    token_log_probs,
)

B, PROMPT, T, V = 6, 3, 7, 13
TEMPERATURE = 0.7
TOLERANCE = 1e-5
WEIGHTS: dict[str, Aggregation] = {
    "grpo": "sample_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "luspo": "sequence_sum",
}


@cache
def trl_grpo() -> Any:
    """TRL's module of GRPO. It imports vLLM, which is too slow for the collection of tests."""
    from trl.trainer import grpo_trainer

    return grpo_trainer


class LogitsModel(nn.Module):
    """A causal LM that answers everything with the same logits, its only parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)  # [B, PROMPT + T, V]
        self.lm_head = nn.Linear(V, V, bias=False)
        self.lm_head.weight = nn.Parameter(torch.eye(V), requires_grad=False)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def forward(self) -> None:
        raise NotImplementedError("only TRL's fused head calls this model")

    def base_model(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.logits)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


class Case:
    """One batch: random logits and tokens, and log-probabilities of an older policy and a reference."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.model = LogitsModel(2 * torch.randn(B, PROMPT + T, V, generator=g))
        self.tokens = torch.randint(0, V, (B, PROMPT + T), generator=g)
        self.targets = self.tokens[:, PROMPT:]
        self.lengths = torch.tensor([T, 1, 4, 6, 2, 5])
        self.mask = torch.arange(T) < self.lengths[:, None]
        present = self.log_probs().detach()
        self.old = present + 0.3 * torch.randn(B, T, generator=g)
        self.ref = present + 0.5 * torch.randn(B, T, generator=g)
        self.sampler = self.old + 0.2 * torch.randn(B, T, generator=g)
        self.advantages = torch.randn(B, generator=g)

    def log_probs(self) -> Tensor:
        """Ours; the logits one place before each completion token predict it."""
        return token_log_probs(self.model.logits[:, PROMPT - 1 : -1], self.targets, TEMPERATURE)[0]

    def gradient(self, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, self.model.logits)
        return gradient

    def trl(
        self, loss_type: str, beta: float, old: Tensor | None, importance: Tensor | None = None
    ) -> tuple[Tensor, dict[str, list[float]]]:
        """TRL's loss and metrics."""
        trl_grpo().add_fused_lm_head(self.model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
        trainer = trl_grpo().GRPOTrainer.__new__(trl_grpo().GRPOTrainer)
        trainer.__dict__.update(
            model=self.model,
            loss_type=loss_type,
            beta=beta,
            epsilon_low=0.2,
            epsilon_high=0.25,
            importance_sampling_level="token",
            use_vllm=importance is not None,
            vllm_importance_sampling_correction=importance is not None,
            aux_loss_enabled=False,
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
            _entropy_bonus_enabled=False,
            current_gradient_accumulation_steps=1,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1, report_to=[]),
            state=SimpleNamespace(global_step=0),
            accelerator=SimpleNamespace(
                autocast=nullcontext,
                gather=lambda x: x,
                reduce=lambda x, reduction: x,
                num_processes=1,
                is_main_process=True,
            ),
            _metrics=defaultdict(lambda: defaultdict(list)),
        )
        inputs = {
            "prompt_ids": self.tokens[:, :PROMPT],
            "prompt_mask": torch.ones(B, PROMPT, dtype=torch.long),
            "completion_ids": self.targets,
            "completion_mask": self.mask.long(),
            "advantages": self.advantages,
            "ref_per_token_logps": self.ref,
            "num_items_in_batch": self.lengths.sum(),
            "importance_sampling_ratio": importance,
        }
        if old is not None:
            inputs["old_per_token_logps"] = old
        loss = trainer._compute_loss(self.model, inputs)
        return loss, trainer._metrics["train"]


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Relative difference, in the norm, at most 1e-5."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    assert difference <= TOLERANCE, f"relative difference {difference:.1e}"


def test_log_probs_are_trls() -> None:
    case = Case()
    trl_grpo().add_fused_lm_head(case.model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    theirs = case.model(labels=case.tokens, fused_lm_head=True)
    log_probs, entropy = token_log_probs(case.model.logits[:, :-1], case.tokens[:, 1:], TEMPERATURE)
    assert_same(log_probs, theirs.log_probs)
    assert_same(entropy, theirs.entropy)


@pytest.mark.parametrize("loss_type", list(WEIGHTS))
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("policy", ["on", "off"])
@pytest.mark.parametrize("corrected", [False, True])
def test_grpo_loss_and_gradient_are_trls(loss_type: str, beta: float, policy: str, corrected: bool) -> None:
    case = Case()
    old = case.old if policy == "off" else None
    importance = importance_weights(case.old, case.sampler, cap=1.1) if corrected else None
    theirs, metrics = case.trl(loss_type, beta, old, importance)
    terms = grpo_token_loss(
        case.log_probs(),
        old,
        case.ref,
        case.advantages,
        case.mask,
        clip_low=0.2,
        clip_high=0.25,
        kl_coefficient=beta,
        importance=importance,
    )
    weights = completion_weights(case.lengths, torch.ones(B, dtype=torch.bool), WEIGHTS[loss_type])
    ours = (terms.loss * weights[:, None]).sum()

    assert abs(theirs.item()) > 1e-2  # so that a relative difference means something
    assert_same(ours, theirs)
    assert_same(case.gradient(ours), case.gradient(theirs))

    tokens = case.mask.sum().item()
    assert metrics["clip_ratio/region_mean"] == [pytest.approx(terms.clipped.sum().item() / tokens)]
    assert (terms.clipped.sum() > 5) == (policy == "off")
    if beta:
        assert metrics["kl"] == [pytest.approx(terms.kl.sum().item() / tokens, rel=TOLERANCE)]


def test_dropped_completions_leave_the_denominators_where_trl_keeps_one() -> None:
    """TRL drops a truncated completion by zeroing its mask. For "bnpo" and "dapo" that is all; for "grpo" its
    mean over completions still counts the dropped ones, so that ours is larger by B over the number kept.
    """
    case = Case()
    kept = torch.tensor([True, True, False, True, True, False])
    case.mask = case.mask & kept[:, None]
    case.lengths = case.lengths * kept
    for loss_type, correction in {"grpo": B / kept.sum(), "bnpo": 1.0, "dapo": 1.0}.items():
        theirs, _ = case.trl(loss_type, 0.04, case.old)
        terms = grpo_token_loss(
            case.log_probs(),
            case.old,
            case.ref,
            case.advantages,
            case.mask,
            clip_high=0.25,
            kl_coefficient=0.04,
        )
        weights = completion_weights(case.lengths, kept, WEIGHTS[loss_type])
        ours = (terms.loss * weights[:, None]).sum()
        assert_same(ours, theirs * correction)
        assert_same(case.gradient(ours), case.gradient(theirs * correction))


def trl_advantages(rewards: Tensor, group_size: int, scale: bool) -> Tensor:
    """The lines of `GRPOTrainer._generate_and_score_completions`, `scale_rewards="group"` or `"none"`."""
    mean = torch.nanmean(rewards.view(-1, group_size), dim=1).repeat_interleave(group_size, dim=0)
    std = trl_grpo().nanstd(rewards.view(-1, group_size), dim=1).repeat_interleave(group_size, dim=0)
    advantages = rewards - mean
    if scale:
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


@pytest.mark.parametrize("binary", [False, True])
def test_advantages_are_trls(binary: bool) -> None:
    """With five groups of eight; a reward that could not be scored is NaN there and invalid here."""
    g = torch.Generator().manual_seed(1)
    rewards = torch.rand(40, generator=g)
    rewards = rewards.round() if binary else rewards
    valid = torch.rand(40, generator=g) < 0.9
    rewards[~valid] = torch.nan
    groups = torch.arange(5).repeat_interleave(8)
    assert_same(group_advantages(rewards, groups, valid)[0], trl_advantages(rewards, 8, scale=True))
    centred, _ = group_advantages(rewards, groups, valid, scale="none")
    assert_same(centred, trl_advantages(rewards, 8, scale=False))


def test_equal_rewards_leave_a_residue_in_trl_and_none_here() -> None:
    """Seven times 0.1 in float32: the mean is off by one bit, and over 1e-4 that is an advantage of 7e-5."""
    rewards = torch.full((7,), 0.1)
    assert trl_advantages(rewards, 7, scale=True).abs().max() > 1e-5
    assert (group_advantages(rewards, torch.zeros(7).long(), torch.ones(7).bool())[0] == 0).all()
