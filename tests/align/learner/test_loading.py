"""Rank 0 alone reads a checkpoint: the others get its bits, and never hold more of the model than they keep."""

import importlib
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, PreTrainedModel

from align.errors import UserError
from align.learner.engine import environment
from align.learner.group import LearnerGroup, RankGroup
from align.learner.loading import follow, layout, load_from_rank_0
from align.learner.policy import PolicyRank
from align.learner.reward_model import RewardModelGroup, RewardModelRank
from align.model.policy import load_policy, load_tokenizer
from align.recipe import LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions

NANO = Path(__file__).parents[3] / "recipes" / "nano" / "policy"
OPTIMIZER = OptimizerOptions(learning_rate=1e-3)
LORA = LoraOptions(rank=4, dropout=0.1)
MIB = 2**20


def options(**values: Any) -> LearnerOptions:
    return LearnerOptions(**{"ranks": 2, "zero_stage": 0, "optimizer": OPTIMIZER, **values})


def without_checkpoints(rank: Any) -> None:
    """Let a rank's process read no checkpoint from here on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a rank other than 0 reads the checkpoint")

    PreTrainedModel.as_it_was = vars(PreTrainedModel)["from_pretrained"]
    PreTrainedModel.from_pretrained = refuse


def with_checkpoints(rank: Any) -> None:
    PreTrainedModel.from_pretrained = vars(PreTrainedModel)["as_it_was"]


def content(rank: Any) -> dict[str, Any]:
    """All that a rank's network computes with, whether it is trained, and what would be drawn next."""
    network = rank._network
    tensors = {name: (p.detach().clone(), p.requires_grad) for name, p in network.named_parameters()}
    buffers = {name: (b.clone(), False) for name, b in network.named_buffers()}
    of_reference = {}
    if getattr(rank, "_reference", None) is not None:
        of_reference = {f"reference.{n}": (p.detach().clone(), False) for n, p in rank._reference.named_parameters()}
    return tensors | buffers | of_reference | {"drawn": (torch.get_rng_state(), False)}


@pytest.fixture
def contents(ray_session: None) -> Callable[[RankGroup], list[dict[str, Any]]]:
    """Starts a learner, whose second rank can read no checkpoint; what each rank then holds."""
    import ray

    def start(learner: RankGroup) -> list[dict[str, Any]]:
        try:
            ray.get(learner._ranks[1].__ray_call__.remote(without_checkpoints))
            learner.wait_until_ready()
            return list(ray.get([rank.__ray_call__.remote(content) for rank in learner._ranks]))
        finally:
            ray.get(learner._ranks[1].__ray_call__.remote(with_checkpoints))
            learner.close()

    return start


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    assert [n for n in first if not (torch.equal(first[n][0], second[n][0]) and first[n][1] == second[n][1])] == []


def test_all_ranks_hold_the_bits_of_the_checkpoint(contents: Any, policy: ModelOptions) -> None:
    first, second = contents(LearnerGroup(policy, options(), seed=0, reference=policy))
    assert_equal(first, second)
    loaded = load_policy(policy)
    expected = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert any("inv_freq" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(second[name][0], tensor), name
    for name, tensor in loaded.named_parameters():
        assert torch.equal(second[f"reference.policy.{name}"][0], tensor), name


def test_adapters_are_those_of_rank_0(contents: Any, policy: ModelOptions) -> None:
    assert_equal(*contents(LearnerGroup(policy, options(lora=LORA), seed=0)))


def test_the_head_of_a_reward_model_and_what_is_drawn_next_are_rank_0_s(contents: Any, policy: ModelOptions) -> None:
    first, second = contents(RewardModelGroup(policy, options(), seed=0))
    assert_equal(first, second)
    assert not second["score.weight"][0].any()


def test_what_rank_0_cannot_load_ends_all_ranks_with_its_error(ray_session: None, tmp_path: Path) -> None:
    DeepseekV2Config.from_pretrained(NANO).save_pretrained(tmp_path)
    load_tokenizer(NANO).save_pretrained(tmp_path)
    learner = LearnerGroup(ModelOptions(path=str(tmp_path)), options(), seed=0)
    with pytest.raises(UserError, match="transformers cannot load"):
        learner.wait_until_ready()
    learner.close()


def test_a_rank_whose_node_has_another_configuration_says_so() -> None:
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
    with patch("torch.distributed.get_rank", return_value=3), pytest.raises(UserError, match=r"rank 3 makes another"):
        follow(model, layout(other))


def test_buffers_stay_where_the_parameters_are() -> None:
    model = torch.nn.BatchNorm1d(2)
    group = {"get_world_size": 2, "get_rank": 0, "broadcast": None, "broadcast_object_list": None}
    with ExitStack() as stack:
        for name, value in group.items():
            stack.enter_context(patch(f"torch.distributed.{name}", return_value=value))
        # As on a GPU, from where the process group sends.
        load_from_rank_0(lambda: model, torch.device("meta"))
    assert {tensor.device.type for tensor in [*model.buffers(), *model.parameters()]} == {"cpu"}


def test_dtypes_are_those_of_rank_0() -> None:
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    other.bias.data = other.bias.data.bfloat16()
    follow(model, layout(other))
    assert layout(model) == layout(other)


# What a rank holds in memory while it starts.

GIVEN: dict[str, dict[str, Any]] = {
    "zero-0": {"zero_stage": 0},
    "zero-1": {"zero_stage": 1},
    "zero-2": {"zero_stage": 2},
    "zero-3": {"zero_stage": 3},
    "lora": {"zero_stage": 0, "lora": LORA},
    "lora under zero-3": {"zero_stage": 3, "lora": LORA},
    "experts shared": {"zero_stage": 2, "expert_parallel": 2},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: Any) -> tuple[ModelOptions, float]:
    """A model of a few hundred MB, three quarters of it routed experts, and its size in MiB."""
    path = tmp_path_factory.mktemp("large")
    config = DeepseekV2Config.from_pretrained(NANO)
    config.num_hidden_layers, config.hidden_size, config.n_routed_experts = 9, 1024, 128
    config.intermediate_size, config.dtype = 2048, torch.bfloat16
    load_tokenizer(NANO).save_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return ModelOptions(path=str(path), dtype="bfloat16"), sum(p.numel() * 2 for p in model.parameters()) / MIB


class Peak(threading.Thread):
    """Watches how much memory of this process is neither files nor shared, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_mib = self.largest = self.now()
        self.start()

    @staticmethod
    def now() -> float:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    def run(self) -> None:
        while True:
            self.largest = max(self.largest, self.now())
            time.sleep(0.002)

    def take(self) -> float:
        """The most since the start or the last time, beyond what there was at the start."""
        found, self.largest = max(self.largest, self.now()) - self.start_mib, 0.0
        return found


def start_rank(rank: int, port: int, model: ModelOptions, learner: LearnerOptions, kind: Any, results: Any) -> None:
    """Set up a rank in this process; how much it held before its engine started, and afterwards."""
    os.environ |= environment(rank, learner.ranks, 1)
    importlib.import_module("deepspeed")
    importlib.import_module("peft")
    with patch("align.learner.rank.introduce_this_process"):
        worker = kind(model, learner)
    # What Python imports for a model is there before it is measured.
    load_policy(ModelOptions(path=str(NANO)), empty=True)
    engine, found, peak = worker._start_engine, {}, Peak()

    def start_engine(*module: Any) -> Any:
        found["loading"] = peak.take()
        return engine(*module)

    worker._start_engine = start_engine
    worker.setup("127.0.0.1", port, 0, *([None] if kind is PolicyRank else []))
    found["starting"] = peak.take()
    results.put((rank, found))
    results.close()
    results.join_thread()


def measured(model: ModelOptions, learner: LearnerOptions, kind: Any = PolicyRank) -> list[dict[str, float]]:
    """What each rank of a learner held at most, in MiB: `loading`, before its engine started, and `starting` that."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        context.Process(target=start_rank, args=(rank, port, model, learner, kind, results))
        for rank in range(learner.ranks)
    ]
    for rank in ranks:
        rank.start()
    found = dict(results.get(timeout=300) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    return [found[rank] for rank in range(learner.ranks)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("way", "ranks"), [*((way, 2) for way in GIVEN), ("zero-3", 4), ("experts shared", 4), ("reward model", 2)]
)
def test_a_rank_holds_nothing_of_the_model_before_its_engine_starts(
    large: tuple[ModelOptions, float], way: str, ranks: int
) -> None:
    """Under ZeRO-3 with adapters, where no optimizer state hides it, no more than its share and a block after that."""
    model, size = large
    kind = RewardModelRank if way == "reward model" else PolicyRank
    first, *others = measured(model, options(ranks=ranks, **GIVEN.get(way, {})), kind)
    print(f"\n{way}, {ranks} ranks, a model of {size:.0f} MiB:", first, *others)
    assert first["loading"] > 0.9 * size
    for rank in others:
        assert rank["loading"] < 0.05 * size + 20
        if way == "lora under zero-3":
            assert rank["starting"] < 0.7 * size
