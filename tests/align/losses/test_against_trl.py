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
`loss_type="dr_grpo"`              weights `constant_length`
`loss_type="cispo"`                `cispo_max` (their `epsilon_high`), weights `token_mean`
`importance_sampling_level`        `level`: their `"sequence"` is `"geometric"`
`use_bias_correction_kl`           `kl="unbiased"`
`beta`                             `kl_coefficient`
`epsilon`, `epsilon_high`          `clip_low`, `clip_high`
no `old_per_token_logps`           `old_log_probs=None`
`importance_sampling_ratio`        `importance`, by `correction_weights`
`RLOOTrainer`                      `baseline="leave_one_out"`, `level="sequence"`, weights `sequence_sum`
`num_items_in_batch`               the sum of the lengths in the global batch
=================================  =====================================================

TRL's correction for vLLM's log-probabilities is off (`use_vllm=False`) except where it is itself compared.
Its auxiliary loss, entropy bonus and off-policy mask are off. What is computed in the middle of one of TRL's long methods is run
as its lines stand there (`run_lines`). TRL's RLOO has its KL in the reward, ours in the loss: compared without one.
"""

import inspect
import math
from collections import defaultdict
from contextlib import nullcontext
from functools import cache
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from align.learner.batch import Batch
from align.learner.objective import Objective, loss_and_sums
from align.losses import (
    Aggregation,
    CorrectionOptions,
    completion_weights,
    correction_weights,
    group_advantages,
    grpo_token_loss,
    token_entropies,
    token_log_probs,
)
from align.recipe import GrpoOptions

B, PROMPT, T, V = 6, 3, 7, 13
TEMPERATURE = 0.7
TOLERANCE = 1e-5
WEIGHTS: dict[str, Aggregation] = {
    "grpo": "sample_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "luspo": "sequence_sum",
    "dr_grpo": "constant_length",
}
LONGEST = T + 3


@cache
def trl_grpo() -> Any:
    """TRL's module of GRPO. It imports vLLM, which is too slow for the collection of tests."""
    from trl.trainer import grpo_trainer

    return grpo_trainer


@cache
def trl_rloo() -> Any:
    """TRL's module of RLOO."""
    from trl.trainer import rloo_trainer

    return rloo_trainer


def run_lines(method: Any, first: str, last: str, **names: Any) -> dict[str, Any]:
    """Run the lines of a method from the one that begins with `first` up to the one before `last`, with `names`; returns all names after them."""
    lines = inspect.getsource(method).splitlines()
    begin = next(n for n, line in enumerate(lines) if line.strip().startswith(first))
    end = next(n for n, line in enumerate(lines) if n > begin and line.strip().startswith(last))
    exec(dedent("\n".join(lines[begin:end])), names)
    return names


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
        return token_log_probs(self.model.logits[:, PROMPT - 1 : -1], self.targets, TEMPERATURE)

    def gradient(self, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, self.model.logits)
        return gradient

    def ours(self, options: GrpoOptions, old: Tensor | None) -> Tensor:
        """The learner's loss of the whole batch."""
        kept, aggregation = torch.ones(B, dtype=torch.bool), options.aggregation
        batch = Batch(
            token_ids=self.tokens,
            targets=self.targets,
            mask=self.mask,
            weights=completion_weights(self.lengths, kept, aggregation, LONGEST)[:, None].expand(B, T),
            advantages=self.advantages,
            sampler_log_probs=self.sampler,
            old_log_probs=old,
        )
        log_probs = self.log_probs()
        return loss_and_sums(log_probs, torch.zeros(B, T), self.ref, batch, Objective(options, TEMPERATURE))[0]

    def trl(
        self, loss_type: str, beta: float, old: Tensor | None, importance: Tensor | None = None, **settings: Any
    ) -> tuple[Tensor, dict[str, list[float]]]:
        """TRL's loss and metrics, by what its trainer and its `args` have of `settings`."""
        trl_grpo().add_fused_lm_head(self.model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
        trainer = trl_grpo().GRPOTrainer.__new__(trl_grpo().GRPOTrainer)
        trainer.__dict__.update(
            model=self.model,
            loss_type=loss_type,
            beta=beta,
            epsilon_low=0.2,
            epsilon_high=0.25,
            max_completion_length=LONGEST,
            importance_sampling_level="token",
            use_vllm=importance is not None,
            vllm_importance_sampling_correction=importance is not None,
            aux_loss_enabled=False,
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
            _entropy_bonus_enabled=False,
            current_gradient_accumulation_steps=1,
            args=SimpleNamespace(
                delta=None,
                use_bias_correction_kl=settings.pop("use_bias_correction_kl", False),
                steps_per_generation=1,
                report_to=[],
            ),
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
        trainer.__dict__.update(settings)
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
    logits = case.model.logits[:, :-1]
    assert_same(token_log_probs(logits, case.tokens[:, 1:], TEMPERATURE), theirs.log_probs)
    assert_same(token_entropies(logits, TEMPERATURE), theirs.entropy)


@pytest.mark.parametrize("loss_type", list(WEIGHTS))
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("policy", ["on", "off"])
@pytest.mark.parametrize("corrected", [False, True])
def test_grpo_loss_and_gradient_are_trls(loss_type: str, beta: float, policy: str, corrected: bool) -> None:
    case = Case()
    old = case.old if policy == "off" else None
    cut = CorrectionOptions(kind="tis", high=1.1)
    importance = correction_weights(case.old, case.sampler, case.mask, cut).weights if corrected else None
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
    weights = completion_weights(case.lengths, torch.ones(B, dtype=torch.bool), WEIGHTS[loss_type], LONGEST)
    ours = (terms.loss * weights[:, None]).sum()

    assert abs(theirs.item()) > 1e-2  # so that a relative difference means something
    assert_same(ours, theirs)
    assert_same(case.gradient(ours), case.gradient(theirs))

    tokens = case.mask.sum().item()
    assert metrics["clip_ratio/region_mean"] == [pytest.approx(terms.clipped.sum().item() / tokens)]
    assert (terms.clipped.sum() > 5) == (policy == "off")
    if beta:
        assert metrics["kl"] == [pytest.approx(terms.kl.sum().item() / tokens, rel=TOLERANCE)]


CLIPPED = {"epsilon_low": 0.2, "epsilon_high": 0.2}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", CLIPPED),
    "dr_grpo": ("dr_grpo", CLIPPED),
    "dapo": ("dapo", CLIPPED | {"epsilon_high": 0.28}),
    "gspo": ("grpo", {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"}),
    "cispo": ("cispo", {"epsilon_high": 5.0}),
    "reinforce++": ("dapo", CLIPPED),
}
"""What TRL is told for the same loss."""


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("beta", "kl"), [(0.0, "k3"), (0.04, "k3"), (0.04, "unbiased")])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 20.0])
def test_the_loss_and_the_gradient_of_a_preset_are_trls(preset: str, beta: float, kl: str, spread: float) -> None:
    if (preset, kl) == ("gspo", "unbiased"):
        pytest.skip("TRL weighs each token's KL by the sequence's ratio, which is not unbiased")
    case = Case()
    case.old = case.log_probs().detach() + spread * (case.old - case.log_probs().detach()).clamp(-0.2, 0.2)
    loss_type, settings = PRESETS[preset]
    theirs, _ = case.trl(loss_type, beta, case.old, **settings, use_bias_correction_kl=kl == "unbiased")
    options: Any = {"preset": preset, "kl_coefficient": beta} | ({"kl": kl} if beta else {})
    ours = case.ours(GrpoOptions(steps=1, prompts_per_step=1, group_size=2, **options), case.old)
    assert abs(theirs.item()) > 1e-3
    assert_same(ours, theirs)
    assert_same(case.gradient(ours), case.gradient(theirs))


@pytest.mark.parametrize("policy", ["on", "off"])
def test_the_loss_and_the_gradient_of_rloo_are_trls(policy: str) -> None:
    case = Case()
    log_probs = case.log_probs()
    old = case.old if policy == "off" else log_probs.detach()
    trainer = SimpleNamespace(epsilon_low=0.2, epsilon_high=0.2)
    theirs = run_lines(
        trl_rloo().RLOOTrainer._compute_loss,
        "logps = (",
        "# Log the metrics",
        torch=torch,
        self=trainer,
        per_token_logps=log_probs,
        completion_mask=case.mask.long(),
        inputs={"old_logps": (old * case.mask).sum(1), "advantages": case.advantages},
    )["loss"]
    options = GrpoOptions(steps=1, prompts_per_step=1, group_size=2, preset="rloo")
    ours = case.ours(options, case.old if policy == "off" else None)
    assert_same(ours, theirs)
    assert_same(case.gradient(ours), case.gradient(theirs))


@pytest.mark.parametrize(
    ("correction", "mode", "low", "high"),
    [
        ({"kind": "tis", "high": 1.1}, "token_truncate", None, 1.1),
        ({"kind": "tis", "level": "sequence", "high": 1.3}, "sequence_truncate", None, 1.3),
        ({"kind": "icepop", "low": 0.9, "high": 1.1}, "token_mask", 0.9, 1.1),
        ({"kind": "icepop", "level": "sequence", "low": 0.8, "high": 1.3}, "sequence_mask", 0.8, 1.3),
        ({"kind": "sequence_mask", "high": 1.3}, "sequence_mask", None, 1.3),
    ],
)
def test_a_corrections_weights_and_what_becomes_of_the_loss_are_trls(
    correction: dict[str, Any], mode: str, low: float | None, high: float
) -> None:
    case = Case()
    trainer = SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    theirs = run_lines(
        trl_grpo().GRPOTrainer._generate_and_score_completions,
        "# Compute the importance sampling ratio when using vLLM",
        "# Compute the per-token log probabilities for the reference model",
        torch=torch,
        math=math,
        self=trainer,
        completion_mask=case.mask.long(),
        tool_mask=None,
        old_per_token_logps=case.old,
        sampling_per_token_logps=case.sampler,
    )["vllm_importance_sampling_ratio"]
    found = correction_weights(case.old, case.sampler, case.mask, CorrectionOptions(**correction))
    assert_same(found.weights[case.mask], theirs.expand(B, T)[case.mask])
    assert 0 < (found.cut | found.masked).sum() < case.mask.sum()

    expected, _ = case.trl("dapo", 0.04, case.old, theirs, epsilon_high=0.2)
    options: Any = {"aggregation": "token_mean", "kl_coefficient": 0.04, "correction": correction}
    ours = case.ours(GrpoOptions(steps=1, prompts_per_step=1, group_size=2, **options), case.old)
    assert_same(ours, expected)
    assert_same(case.gradient(ours), case.gradient(expected))


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


@pytest.mark.parametrize("normalised", [False, True])
def test_leave_one_out_advantages_are_those_of_trls_rloo(normalised: bool) -> None:
    g = torch.Generator().manual_seed(1)
    rewards = torch.rand(40, generator=g)
    valid = torch.rand(40, generator=g) < 0.9
    theirs = run_lines(
        trl_rloo().RLOOTrainer._generate_and_score_completions,
        "grouped_rewards = rewards.view",
        "is_std_zero =",
        torch=torch,
        nanstd=trl_rloo().nanstd,
        self=SimpleNamespace(normalize_advantages=normalised),
        rewards=torch.where(valid, rewards, torch.nan),
        num_generations=8,
    )["advantages"]
    groups = torch.arange(5).repeat_interleave(8)
    scale = "batch" if normalised else "none"
    assert_same(group_advantages(rewards, groups, valid, scale=scale, baseline="leave_one_out")[0], theirs)


def test_equal_rewards_leave_a_residue_in_trl_and_none_here() -> None:
    """Seven times 0.1 in float32: the mean is off by one bit, and over 1e-4 that is an advantage of 7e-5."""
    rewards = torch.full((7,), 0.1)
    assert trl_advantages(rewards, 7, scale=True).abs().max() > 1e-5
    assert (group_advantages(rewards, torch.zeros(7).long(), torch.ones(7).bool())[0] == 0).all()
