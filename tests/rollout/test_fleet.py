"""A fleet with real vLLM engines: what it samples, and what it does with new weights."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.model.names import from_checkpoint, to_checkpoint
from align.recipe import ModelOptions
from rollout import (
    BroadcastSync,
    FinishReason,
    Fleet,
    FleetOptions,
    Group,
    Prompt,
    RolloutError,
    SamplingOptions,
    WeightUpdateError,
    sample_seed,
    stored,
)
from rollout.engine import Request
from rollout.fleet import engine_batches
from rollout.worker import RolloutWorker

from .publisher import LocalPublisher, changed_weights

PROMPTS = [Prompt(f"p{i}", [1, 40 + i, 60 + 3 * i, 17]) for i in range(4)]
STOP = 2
OPTIONS = FleetOptions(workers=1, max_length=64, kv_cache_gb=0.25, batch_sequences=8)


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one process", "two processes"]
)
def fleet(request: pytest.FixtureRequest, policy: ModelOptions, ray_session: None) -> Iterator[Fleet]:
    """A worker whose engine is one process, then one whose engine is two that have half of each matrix."""
    options = OPTIONS.model_copy(update={"tensor_parallel": request.param})
    fleet = Fleet(policy.path, "float32", options, stop_token_ids=[STOP])
    fleet.wait_until_ready()
    yield fleet
    fleet.close()


@pytest.fixture
def weights(policy: ModelOptions, fleet: Fleet) -> Iterator[dict[str, torch.Tensor]]:
    """The policy's checkpoint; the fleet holds it again afterwards."""
    checkpoint = dict(to_checkpoint(AutoModelForCausalLM.from_pretrained(policy.path).state_dict().items()))
    yield dict(checkpoint)
    fleet.load(stored(checkpoint), version=0)


def sample(fleet: Fleet, *, temperature: float = 1.0, seed: int = 0, step: int = 0) -> list[Group]:
    sampling = SamplingOptions(temperature=temperature, max_new_tokens=8)
    groups = fleet.sample(PROMPTS, 4, sampling, seed=seed, step=step)
    return sorted(groups, key=lambda group: group.prompt.id)


def tokens(groups: list[Group]) -> list[list[int]]:
    return [list(completion.token_ids) for group in groups for completion in group.trajectories]


def test_groups_hold_a_completion_of_each_index_with_its_log_probabilities(fleet: Fleet) -> None:
    groups = sample(fleet)
    assert [group.prompt.id for group in groups] == [prompt.id for prompt in PROMPTS]
    for group in groups:
        assert [completion.index for completion in group.trajectories] == [0, 1, 2, 3]
        for completion in group.trajectories:
            assert len(completion.token_ids) == len(completion.log_probs) <= 8
            assert completion.log_probs.max() <= 0
            stopped = completion.finish_reason is FinishReason.STOP
            assert stopped == (completion.token_ids[-1] == STOP)


def test_what_is_drawn_depends_on_seed_and_step_alone(fleet: Fleet) -> None:
    first = tokens(sample(fleet))
    assert tokens(sample(fleet)) == first
    assert tokens(sample(fleet, seed=1)) != first
    assert tokens(sample(fleet, step=1)) != first


def test_whoever_asks_whether_the_workers_are_ready_is_answered(fleet: Fleet) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns at every step, so that a race is soon lost
    try:
        with ThreadPoolExecutor(4) as threads:
            for answered in [threads.submit(fleet.wait_until_ready) for _ in range(1000)]:
                answered.result(timeout=10)
    finally:
        sys.setswitchinterval(before)


def test_greedy_completions_of_a_group_are_alike(fleet: Fleet) -> None:
    for group in sample(fleet, temperature=0.0):
        assert len({tuple(completion.token_ids) for completion in group.trajectories}) == 1


def test_an_update_with_the_same_weights_changes_nothing(fleet: Fleet, weights: dict[str, torch.Tensor]) -> None:
    before = sample(fleet)
    fleet.load(stored(weights), version=7)
    after = sample(fleet)
    assert tokens(after) == tokens(before)
    assert {run.version for group in after for t in group.trajectories for run in t.weight_versions} == {7}
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old.trajectories, new.trajectories, strict=True):
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-6)


def test_new_weights_arrive_whole(fleet: Fleet, weights: dict[str, torch.Tensor], policy: ModelOptions) -> None:
    """After an update of every weight the sampler gives the log-probabilities that transformers computes with them."""
    changed = changed_weights(policy.path, 1)
    fleet.load(stored(changed), version=1)
    model = AutoModelForCausalLM.from_pretrained(policy.path)
    model.load_state_dict(from_checkpoint(changed))
    for group in sample(fleet):
        for completion in group.trajectories:
            ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(completion.prompt_token_ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids).unsqueeze(-1)).squeeze(-1)
            assert completion.log_probs == pytest.approx(expected.tolist(), abs=2e-5)


def addresses(worker: Any) -> dict[str, int]:
    """Where the tensors are that a vLLM worker's model computes with: parameters, buffers, and what its modules hold besides."""
    model = worker.model_runner.get_model()
    found = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, module in model.named_modules():
        for holder in (module, getattr(module, "quant_method", None), getattr(module, "impl", None)):
            found |= {f"{name}.{at}": held for at, held in getattr(holder, "__dict__", {}).items()}
    return {name: held.data_ptr() for name, held in found.items() if isinstance(held, torch.Tensor)}


def note_addresses(worker: Any) -> None:
    worker.noted = addresses(worker)


def compare_addresses(worker: Any) -> None:
    now = addresses(worker)
    # Attention has W_UV and W_UK_T from kv_b_proj, and scales of 1 on the CPU, which no kernel reads.
    assert sum(name.endswith(("W_UV", "W_UK_T", "w13_weight")) for name in now) == 4 + 4 + 3
    moved = [name for name in now | worker.noted if now.get(name) != worker.noted.get(name)]
    moved = [name for name in moved if not name.endswith("_scale_cpu")]
    if moved:
        raise WeightUpdateError(f"moved: {moved}")


@pytest.mark.parametrize("module", [None, "model.layers.1.self_attn", "model.layers.1.mlp"])
def test_an_update_writes_each_tensor_to_where_it_was(
    fleet: Fleet, weights: dict[str, torch.Tensor], module: str | None
) -> None:
    """A CUDA graph would compute with the new ones. What kernels for CPUs have packed, in a closure `cpu_linear`, is not looked at."""
    worker = fleet.workers[0].actor
    assert worker is not None
    worker.call(RolloutWorker.everywhere, note_addresses).future().result()
    changed = {n: t * 1.01 for n, t in weights.items() if module is None or n.startswith(f"{module}.")}
    for version in (1, 2):
        fleet.load(stored(changed), version, modules=module and [module])
        worker.call(RolloutWorker.everywhere, compare_addresses).future().result()


def test_each_process_of_a_worker_receives_a_broadcast(fleet: Fleet, weights: dict[str, torch.Tensor]) -> None:
    changed = {name: tensor * 1.01 for name, tensor in weights.items()}
    fleet.load(stored(changed), version=1)
    expected = tokens(sample(fleet))
    fleet.load(stored(weights), version=0)
    learner = LocalPublisher(changed)
    fleet.load(BroadcastSync(300_000).publish(learner), version=2)
    assert learner.published == [f"broadcast to {1 + fleet._options.tensor_parallel}"]
    assert tokens(sample(fleet)) == expected


def test_an_update_that_leaves_a_parameter_out_is_refused_by_name(
    fleet: Fleet, weights: dict[str, torch.Tensor]
) -> None:
    del weights["model.layers.2.self_attn.o_proj.weight"]
    with pytest.raises(WeightUpdateError, match=r"1 of the sampler's \d+ parameters.*layers\.2\.self_attn\.o_proj"):
        fleet.load(stored(weights), version=1)


def test_an_update_with_a_tensor_of_another_shape_is_refused(fleet: Fleet, weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(3)
    with pytest.raises(RolloutError, match="refused a tensor"):
        fleet.load(stored(weights), version=1)


def test_a_prompt_that_fills_the_context_is_refused_by_its_id(fleet: Fleet) -> None:
    with pytest.raises(RolloutError, match=r"prompt 'long' has 64 tokens.*context is 64"):
        list(fleet.sample([Prompt("long", [5] * 64)], 1, SamplingOptions(), seed=0, step=0))


def test_two_prompts_of_one_id_are_refused(fleet: Fleet) -> None:
    with pytest.raises(RolloutError, match="same id"):
        list(fleet.sample([PROMPTS[0], PROMPTS[0]], 1, SamplingOptions(), seed=0, step=0))


def test_a_seed_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    keys = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)
    assert [sample_seed(*key) for key in keys] == [sample_seed(*key) for key in keys]


def test_engine_batches_keep_the_order_and_are_of_like_size() -> None:
    requests = [Request(Prompt(str(i), [1]), 0, i) for i in range(10)]
    batches = engine_batches(requests, 4)
    assert [r for batch in batches for r in batch] == requests
    assert sorted(len(batch) for batch in batches) == [3, 3, 4]
    assert engine_batches([], 4) == []
