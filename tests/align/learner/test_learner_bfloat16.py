"""A learner in bfloat16 is AdamW by hand on float32 copies: clipped, decayed, gradients of micro-batches summed in float32."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from align.learner.batch import TrainingSequence, collate
from align.learner.group import LearnerGroup
from align.learner.objective import LogProbs, Objective
from align.model.names import from_checkpoint
from align.model.policy import load_policy
from align.recipe import LearnerOptions, ModelOptions, OptimizerOptions

Draw = Callable[[int], list[TrainingSequence]]
STEPS, RATE, DECAY, CLIP, BETAS = 4, 1e-2, 1.0, 0.5, (0.5, 0.95)
# So large that an update is in proportion to the gradient: otherwise Adam takes steps of one size along the noise of bfloat16 too.
EPS = 1e-3
OPTIMIZER = OptimizerOptions(learning_rate=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, clip_norm=CLIP)
UNUSED = slice(512, None)  # of the vocabulary, by the sequences
WAYS: dict[str, dict[str, Any]] = {
    "ZeRO-3, checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
    "ZeRO-1, experts spread": {"zero_stage": 1, "expert_parallel": 2},
    "ZeRO-0": {"zero_stage": 0},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-2, experts spread": {"zero_stage": 2, "expert_parallel": 2},
}
QUICK = ("ZeRO-3, checkpointing", "ZeRO-1, experts spread")


@pytest.fixture(scope="module")
def bfloat16(policy: ModelOptions) -> ModelOptions:
    return policy.model_copy(update={"dtype": "bfloat16"})


@pytest.fixture(scope="module", params=[w if w in QUICK else pytest.param(w, marks=pytest.mark.slow) for w in WAYS])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def learner(way: str, bfloat16: ModelOptions, ray_session: None) -> Iterator[LearnerGroup]:
    options = LearnerOptions(ranks=2, micro_batch_tokens=200, optimizer=OPTIMIZER, **WAYS[way])
    group = LearnerGroup(bfloat16, options, seed=0)
    group.wait_until_ready()
    yield group
    group.close()


def by_hand(policy: ModelOptions, sequences: Draw) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The float32 copies before and after the steps."""
    module = LogProbs(load_policy(policy))
    parameters = dict(module.policy.named_parameters())
    before = {name: p.detach().float() for name, p in parameters.items()}
    masters = {name: p.clone() for name, p in before.items()}
    first, second = ({name: torch.zeros_like(m) for name, m in masters.items()} for _ in range(2))
    for step in range(STEPS):
        batch = collate(sequences(step), pad_id=0)
        log_probs, _ = module(batch.token_ids, batch.targets, 1.0)
        module.zero_grad()
        (-(log_probs * batch.weights)[batch.mask].sum()).backward()
        gradients = {name: p.grad.float() for name, p in parameters.items()}
        norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
        assert norm > 2 * CLIP
        for name, master in masters.items():
            gradient = gradients[name] * CLIP / norm
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient.square()
            root = (second[name] / (1 - BETAS[1] ** (step + 1))).sqrt()
            if master.dim() > 1:
                master *= 1 - RATE * DECAY
            master -= RATE * first[name] / (1 - BETAS[0] ** (step + 1)) / (root + EPS)
            parameters[name].data.copy_(master)
    return before, masters


def test_the_gradient_of_many_micro_batches_is_their_sum_to_float32(
    way: str, learner: LearnerGroup, sequences: Draw
) -> None:
    """Added up in bfloat16, 12 times the same gradient would be off by more than is allowed."""
    if way == "ZeRO-0":
        assert "add up in bfloat16" in learner.trained.description
        return
    norms = []
    learner._options = learner._options.model_copy(update={"micro_batch_tokens": 1})
    for times in (1, 12):
        learner.accumulate(sequences(0)[:1] * 2 * times, Objective())
        norms.append((learner.apply(0.0), first_moments(learner)))
    (norm, once), (norm_of_many, many) = norms
    assert norm_of_many == pytest.approx(12 * norm, rel=1e-5)
    # Clipped, both are the same direction at the same length: after a second update, (1 - beta + beta (1 - beta)) of it.
    for a, b in zip(once, many, strict=True):
        torch.testing.assert_close(b, (1 + BETAS[0]) * a, rtol=1e-4, atol=1e-9)
    learner._options = learner._options.model_copy(update={"micro_batch_tokens": 200})


def first_moments(learner: LearnerGroup) -> list[torch.Tensor]:
    """What each rank's optimizer holds of the gradient."""
    import ray

    def read(worker: Any) -> list[torch.Tensor]:
        return [state["exp_avg"].clone() for state in worker._engine.basic_optimizer.state.values()]

    return [moment for moments in ray.get([r.__ray_call__.remote(read) for r in learner._ranks]) for moment in moments]


def test_the_steps_are_those_of_adamw_by_hand(learner: LearnerGroup, bfloat16: ModelOptions, sequences: Draw) -> None:
    clear_optimizer(learner)
    for step in range(STEPS):
        learner.accumulate(sequences(step), Objective())
        assert learner.apply(RATE) > 2 * CLIP
    before, expected = by_hand(bfloat16, sequences)
    found = {name: tensor.float() for name, tensor in from_checkpoint(learner.weights()).items()}
    assert found.keys() == expected.keys()
    moved = torch.sqrt(sum((expected[n] - before[n]).square().sum() for n in expected))
    apart = torch.sqrt(sum((expected[n] - found[n]).square().sum() for n in expected))
    print(f"apart {apart / moved:.4f}")
    assert apart < 0.1 * moved
    unused = "model.embed_tokens.weight"
    shrunk = before[unused][UNUSED] * (1 - RATE * DECAY) ** STEPS
    torch.testing.assert_close(found[unused][UNUSED], shrunk, rtol=5e-3, atol=0)
    norms = [name for name in expected if name.endswith("layernorm.weight")]
    off = torch.cat([found[name] - expected[name] for name in norms]).mean()
    assert abs(float(off)) < 0.3 * RATE * DECAY * STEPS


def clear_optimizer(learner: LearnerGroup) -> None:
    """Let the optimizers forget what they have seen."""
    import ray

    def forget(worker: Any) -> None:
        for state in worker._engine.basic_optimizer.state.values():
            for value in state.values():
                value.zero_()

    ray.get([rank.__ray_call__.remote(forget) for rank in learner._ranks])


def test_routers_choose_by_float32_logits(learner: LearnerGroup, sequences: Draw) -> None:
    """Of the states that reach it, whether the experts are spread or not."""
    import ray

    def listen(worker: Any) -> None:
        worker.heard = []
        for name, router in worker._network.named_modules():
            if name.endswith(("mlp.gate", "mlp.router")):
                router.register_forward_hook(
                    lambda router, given, chosen: worker.heard.append(
                        (router, given[0].detach(), chosen[-1 - (chosen[-1].dim() == 1)])
                    )
                )

    def compare(worker: Any) -> list[int]:
        different = []
        for router, states, chosen in worker.heard:
            weight = getattr(router, "gate", router).weight
            with worker._whole([weight]):
                logits = states.flatten(0, -2).float() @ weight.detach().float().T
            best = logits.topk(chosen.shape[-1]).indices
            different.append(int((best.sort().values != chosen.sort().values).any(dim=-1).sum()))
        return different

    ray.get([rank.__ray_call__.remote(listen) for rank in learner._ranks])
    learner.log_probs(sequences(5), 1.0)
    for different in ray.get([rank.__ray_call__.remote(compare) for rank in learner._ranks]):
        assert len(different) >= 3
        assert set(different) == {0}
