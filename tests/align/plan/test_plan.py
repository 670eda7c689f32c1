"""What a recipe takes on a cluster: by figures that can be worked out by hand."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from align.cli import main
from align.errors import UserError
from align.model import sizes
from align.model.lora import add_adapter
from align.plan.memory import GIB, READING, Training, activation_memory, adapted_parameters, adapter_size, changed_size
from align.plan.placement import NODE_MEMORY_GIB, Cluster, Demand, cluster_of, place
from align.plan.plan import Plan, make_plan
from align.plan.roles import PINNED, work_of
from align.recipe import BFLOAT16_SUMS, LearnerOptions, LoraOptions, OptimizerOptions, load_recipe

LITE, V2, NANO = "deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2", "recipes/nano/policy"


sizes_of = cache(sizes.sizes_of)
APART = ["colocate=false", "rollout={workers: 4, max_length: 2048}"]


def planned(
    recipe: str,
    model: str,
    nodes: int,
    gpus: int,
    *overrides: str,
    node_memory: float = NODE_MEMORY_GIB,
    others: Sequence[str] = (),
) -> Plan:
    """The plan of a recipe for a policy, on GPUs of 80 GiB; of the models `others` the sizes are known too."""
    read = load_recipe(Path(recipe), [f"model.path={model}", *overrides])
    cluster = cluster_of(nodes, gpus, 80 if gpus else 0, node_memory)
    return make_plan(read, sizes_of(model), cluster, {path: sizes_of(path) for path in others})


LITE_SIZE, LITE_ROUTED = 15_706_484_224, 26 * 64 * 3 * 2048 * 1408  # 26 layers of 64 experts, each three matrices


@pytest.mark.parametrize(
    ("changes", "weights", "gradients", "optimiser"),
    [
        # Weights in bfloat16; gradients, a copy and Adam's two moments in float32 (ZeRO, arXiv:1910.02054, section 3.1, has 16).
        ([], 2 * LITE_SIZE / 8, 4 * LITE_SIZE / 8, 12 * LITE_SIZE / 8),
        (["learner.zero_stage=1"], 2 * LITE_SIZE, 4 * LITE_SIZE, 12 * LITE_SIZE / 8),
        (["learner.zero_stage=0"], 2 * LITE_SIZE, 2 * LITE_SIZE, 12 * LITE_SIZE),
        (
            ["learner.zero_stage=1", "learner.expert_parallel=8"],
            2 * (LITE_SIZE - LITE_ROUTED * 7 / 8),
            4 * (LITE_SIZE - LITE_ROUTED * 7 / 8),
            12 * LITE_SIZE / 8,
        ),
    ],
    ids=["ZeRO-3 shares out all", "ZeRO-1 the optimiser alone", "nothing is shared out", "experts are spread"],
)
def test_what_a_rank_holds_of_eighteen_bytes_a_parameter(
    changes: list[str], weights: float, gradients: float, optimiser: float
) -> None:
    plan = planned("recipes/v2_lite/sft.yaml", LITE, 2, 8, *APART, *changes)
    parts = plan.roles[-1].parts
    assert [parts[name] for name in ("weights", "gradients", "optimiser")] == pytest.approx(
        [weights, gradients, optimiser]
    )
    assert changes or plan.refusals == []
    assert (BFLOAT16_SUMS in plan.notes) == ("learner.zero_stage=0" in changes)


def test_without_zero_only_bfloat16_is_warned_of() -> None:
    alone = planned("recipes/v2_lite/sft.yaml", LITE, 2, 8, *APART, "learner.zero_stage=0", "model.dtype=float32")
    assert BFLOAT16_SUMS not in alone.notes


def test_learners_and_rollout_workers_have_gpus_of_their_own_or_share_them_as_the_plan_says() -> None:
    recipe = "recipes/v2_lite/grpo_reasoning.yaml"
    plan = planned(recipe, LITE, 1, 8, *APART)
    assert "needs 12 GPUs, 4 x 1 (rollout workers) + 8 x 1 (learner ranks), and there are 8" in plan.refusals[0]
    assert plan.advice == "colocate=true learner.zero_stage=3 learner.ranks=8 rollout.workers=8"
    assert planned(recipe, LITE, 1, 8, *APART, *plan.advice.split()).refusals == []
    assert planned(recipe, LITE, 1, 2, *APART).advice == ""
    given = planned(recipe, LITE, 1, 8, *APART, "rollout.gpu_memory_share=0.9").advice
    assert given.split()[2] == "rollout.gpu_memory_share=0.85", "with colocate no other is taken"


ONE_GPU = ["learner.ranks=1", "rollout.workers=1", "learner.micro_batch_tokens=4096"]
SHARED = ["learner.gpus=0.6", "rollout.gpus=0.4", "rollout.gpu_memory_share=0.45", "rollout.kv_cache_gb=2"]


def test_adapters_of_deepseek_v2_lite_fit_one_gpu_that_learner_and_sampler_share() -> None:
    """The frozen base twice is 2 * 29.3 of 80 GiB."""
    recipe = "recipes/v2_lite/lora_grpo_reasoning.yaml"
    alone = planned(recipe, LITE, 1, 1, *ONE_GPU)
    assert "needs 2 GPUs, 1 x 1 (rollout workers) + 1 x 1 (learner ranks), and there are 1" in alone.refusals[0]
    assert planned(recipe, LITE, 1, 1, *ONE_GPU, *alone.advice.split()).refusals == []
    assert planned("recipes/v2_lite/lora_sft.yaml", LITE, 1, 2, *ONE_GPU).refusals == []
    plan = planned(recipe, LITE, 1, 1, *ONE_GPU, *SHARED)
    assert plan.refusals == []
    assert plan.nodes[0][0] == "rollout worker 0, scoring worker 0-3, learner rank 0"
    worker, _, learner = plan.roles
    assert worker.limit + learner.limit == pytest.approx(80 * GIB)
    assert worker.parts["KV cache"] == 2 * GIB
    (refusal,) = planned(recipe, LITE, 1, 1, *ONE_GPU, *SHARED, "rollout.kv_cache_gb=8").refusals
    assert "its share of a GPU's memory: raise rollout.gpu_memory_share" in refusal
    (refusal,) = planned(recipe, LITE, 1, 1, *ONE_GPU, *SHARED, "rollout.gpu_memory_share=0.6").refusals
    assert "a learner rank needs" in refusal


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["learner.gpus=0.5"], "learner.gpus"),  # two ranks could meet on one GPU, which NCCL does not allow
        (["rollout.gpus=0.4", "rollout.tensor_parallel=2"], "workers of one process"),
    ],
)
def test_a_gpu_is_shared_by_one_rank_and_one_process_of_a_worker(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        planned("recipes/v2_lite/lora_grpo_reasoning.yaml", LITE, 1, 8, *overrides)


def test_all_parameters_of_deepseek_v2_lite_fit_one_node_where_learners_and_workers_take_turns() -> None:
    recipe = "recipes/v2_lite/grpo_reasoning.yaml"
    plan = planned(recipe, LITE, 1, 8)
    assert plan.refusals == []
    ((placed, host),) = plan.nodes
    assert placed == "rollout worker 0-7, learner rank 0-7, scoring worker 0-3"
    worker, _, learner = plan.roles
    assert worker.parts["KV cache"] == 32 * GIB
    assert worker.total + learner.total > 80 * GIB
    # An eighth of the weights and of the reference, of float32 gradients, and of twelve bytes for the optimiser; and a worker's weights.
    rank = LITE_SIZE * (2 + 2 + 4 + 12) / 8
    assert plan.seconds["taking turns"] == pytest.approx(2 * (rank + 2 * LITE_SIZE) / 5e9)
    # All that rests, what rank 0 reads and Ray's two copies; and what 20 processes take by themselves.
    at_rest = 8 * (rank + PINNED * 2 * LITE_SIZE) + (READING + 2) * 2 * LITE_SIZE
    assert host == pytest.approx(at_rest + (8 * (0.75 + 1.0) + 4 * 0.13) * GIB)
    (refusal,) = planned(recipe, LITE, 1, 8, node_memory=500).refusals
    assert "node 0 needs 753.2 GiB of 500.0 GiB of its own memory" in refusal
    refusal = planned(recipe, LITE, 1, 4).refusals[0]
    assert "8 GPUs are wanted, one for each learner rank and the rollout worker that takes turns" in refusal
    (refusal,) = planned(recipe, LITE, 1, 8, "rollout.kv_cache_gb=60").refusals
    assert refusal.endswith("its share of a GPU's memory: lower rollout.kv_cache_gb")


def test_a_broadcast_takes_a_link_and_not_the_host() -> None:
    """29.3 GiB over NVLink, half of 450 GB/s, or three times through a host at 5 GB/s."""
    seconds = [
        planned("recipes/v2_lite/grpo_reasoning.yaml", LITE, 2, 8, *APART, *way).seconds["weights to the workers"]
        for way in ([], ["weights.transport=broadcast"])
    ]
    assert seconds == pytest.approx([2 * LITE_SIZE * 3 / 5e9, 2 * LITE_SIZE / 225e9])


def test_all_parameters_of_deepseek_v2_take_more_than_sixty_four_learners() -> None:
    (refusal,) = planned("recipes/v2/sft.yaml", V2, 10, 8, "learner.ranks=64").refusals
    assert "it would fit with learner.ranks=80" in refusal.replace("learner.micro_batch_tokens=4096, ", "")


def test_deepseek_v2_is_refused_on_eight_gpus_with_what_would_fit() -> None:
    refusals = planned(
        "recipes/v2/sft.yaml", V2, 1, 8, "learner.ranks=4", "rollout={tensor_parallel: 4, workers: 1}"
    ).refusals
    assert any("learner rank needs" in text and "learner.ranks=" in text for text in refusals)
    assert any("a rollout worker has 0.00 GiB for its KV cache" in text for text in refusals)


def test_ranks_share_out_the_reference_under_zero_3_and_hold_a_second_model_otherwise() -> None:
    recipe, size = "recipes/v2/grpo_reasoning.yaml", sizes_of(V2).total
    shared = planned(recipe, V2, 14, 8)
    assert shared.roles[-1].parts["reference"] == 2 * size / 96
    whole = planned(recipe, V2, 14, 8, "learner.zero_stage=2")
    assert whole.roles[-1].parts["reference"] == 2 * size
    assert any("grpo.kl_coefficient=0" in text for text in whole.refusals)


def test_a_scoring_worker_has_all_reward_models_on_one_gpu() -> None:
    recipe = load_recipe(Path("recipes/v2/grpo_preference.yaml"), [f"model.path={V2}"])
    judges = [str(term.params["path"]) for term in recipe.rewards if term.name == "reward_model"]
    cluster = cluster_of(14, 8, 80)
    (refusal,) = make_plan(recipe, sizes_of(V2), cluster).refusals
    assert "a scoring worker needs 880.2 GiB of 80.0 GiB" in refusal
    assert make_plan(recipe, sizes_of(V2), cluster, dict.fromkeys(judges, sizes_of(LITE))).refusals == []


def test_neither_do_parts_that_are_frozen_take_gradients_or_an_optimiser() -> None:
    plan = planned("recipes/v2_lite/sft.yaml", LITE, 2, 8, *APART, "learner.freeze=[experts]", "learner.zero_stage=1")
    parts = plan.roles[-1].parts
    trained = LITE_SIZE - LITE_ROUTED
    assert [parts["weights"], parts["gradients"]] == pytest.approx([2 * LITE_SIZE, 4 * trained])
    assert parts["optimiser"] == pytest.approx(12 * trained / 8)


def test_adapters_take_no_optimiser_for_what_they_leave_alone() -> None:
    """Two factors of rank 8 on q_proj [3072, 2048], kv_a [576, 2048] and o_proj [2048, 2048] of 27 layers."""
    attention = adapted_parameters(sizes_of(LITE), ["attention"])
    assert adapter_size(attention, 8) == 27 * 8 * ((3072 + 2048) + (576 + 2048) + (2048 + 2048))
    assert changed_size(sizes_of(LITE), attention) == 27 * (2048 * (3072 + 576 + 2048) + 512 + 4096 * 512)
    experts = adapted_parameters(sizes_of(LITE), ["experts"])
    assert adapter_size(experts, 8) == 26 * 64 * 8 * ((2 * 1408 + 2048) + (2048 + 1408))
    with pytest.raises(UserError, match="nothing that is called 'q_proy'"):
        adapted_parameters(sizes_of(LITE), ["q_proy"])


def test_adapters_are_counted_as_peft_makes_them() -> None:
    """The nano policy with real adapters, of every preset."""
    for targets in (["attention"], ["all-linear"], ["experts", "mlp.gate"]):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(NANO))
        adapted = add_adapter(model, LoraOptions(rank=4, targets=targets), "CAUSAL_LM", "nano")
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert adapter_size(adapted_parameters(sizes_of(NANO), targets), 4) == trained


def test_deepseek_v2_lite_with_adapters_fits_one_node_of_eight() -> None:
    plan = planned("recipes/v2_lite/lora_grpo_reasoning.yaml", LITE, 1, 8)
    assert plan.refusals == []
    parts = plan.roles[-1].parts
    assert parts["weights"] == 2 * LITE_SIZE
    assert "reference" not in parts  # the policy without its adapter
    assert plan.nodes[0][0] == "rollout worker 0-3, scoring worker 0-3, learner rank 0-3"


def test_in_bfloat16_workers_have_the_adapter_beside_the_weights() -> None:
    recipe, sizes = "recipes/v2_lite/lora_grpo_reasoning.yaml", sizes_of(LITE)
    adapter = adapter_size(adapted_parameters(sizes, ["attention+shared"]), 32)
    worker = planned(recipe, LITE, 1, 8).roles[0]
    assert worker.parts["adapter"] == 2 * adapter
    assert "adapter" not in planned(recipe, LITE, 1, 8, "model.dtype=float32").roles[0].parts
    roles = load_recipe(Path(recipe), [f"model.path={LITE}"]).roles()
    beside, merged = (work_of(roles, sizes, element) for element in (2, 4))
    assert beside.sent == merged.sent + adapter


def test_adapted_experts_are_copied_beside_their_factors_until_backward() -> None:
    recipe, targets = "recipes/v2_lite/lora_sft.yaml", "learner.lora.targets=[attention, experts]"
    whole, checkpointed, merged, shared = (
        planned(recipe, LITE, 1, 8, *changes).roles[-1].parts.get("experts beside adapters")
        for changes in (
            [targets, "learner.gradient_checkpointing=false"],
            [targets, "learner.gradient_checkpointing=true"],
            [targets, "model.dtype=float32"],
            ["learner.gradient_checkpointing=false"],
        )
    )
    assert whole == 2 * LITE_ROUTED
    assert checkpointed == pytest.approx(whole / 27)
    assert merged is None
    assert shared is None


def test_attention_by_plain_products_keeps_its_matrices() -> None:
    """Gemma 2's, whose logits have a cap: what eager attention keeps beside that of sdpa, seen in bfloat16."""
    sizes = replace(sizes_of(LITE), caps_attention=True)
    options = LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=1e-3), micro_batch_tokens=8192)
    job = Training(sizes, options, 10, 65536, 4096, 2, False)
    assert activation_memory(job)["attention"] == 27 * 16 * 4096**2 * 2 * 8
    assert "attention" not in activation_memory(replace(job, sizes=sizes_of(LITE)))


def test_deepseek_v2_with_adapters_fits_sixty_four_gpus() -> None:
    changes = ["learner.ranks=48", "learner.lora={rank: 16}"]
    assert planned("recipes/v2/grpo_reasoning.yaml", V2, 8, 8, *changes).refusals == []


def test_a_worker_does_not_span_nodes() -> None:
    refusal = planned("recipes/v2/sft.yaml", V2, 32, 4, "rollout.tensor_parallel=8").refusals[0]
    assert "needs 8 GPUs of one node, and a node has 4: lower rollout.tensor_parallel" in refusal


def test_processes_go_to_the_first_node_with_room_and_shares_to_the_fullest_gpu() -> None:
    nodes, unplaced = place(
        Cluster(2, 4, 80 * GIB), [Demand({"worker": 1}, 2), Demand({"judge": 3}, 0.5), Demand({"rank": 5}, 1)]
    )
    assert [str(node) for node in nodes] == ["worker 0, judge 0-2", "rank 0-3"]
    assert unplaced == ["rank"]


def test_the_nano_recipe_fits_its_own_machine() -> None:
    plan = planned("recipes/nano/grpo.yaml", NANO, 1, 0, "init_from=null")
    assert plan.refusals == []
    assert plan.roles[0].parts["KV cache"] == 0.5 * GIB


def test_the_command_says_what_does_not_fit_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "recipes/v2/sft.yaml", "--gpus-per-node", "8", "--gpu-memory", "80"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "235,741,434,880 parameters" in printed.out
    assert printed.err.startswith("does not fit: no GPU is left for")
    assert main([*arguments, "--nodes", "13", "learner.ranks=88"]) == 0


def test_the_fastest_dtype_is_that_of_the_cluster_and_not_of_the_machine_that_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("align.recipe.dtype.bfloat16_speedup", lambda: 0.5)
    fastest, pipeline, run = tmp_path / "sft.yaml", tmp_path / "pipeline.yaml", tmp_path / "run"
    text = Path("recipes/v2/sft.yaml").read_text()
    fastest.write_text(text.replace("dtype: bfloat16", "dtype: fastest"))
    assert "dtype: fastest" in fastest.read_text()
    stage = {"name": "sft", "recipe": str(fastest), "set": ["learner.ranks=88"]}
    pipeline.write_text(yaml.safe_dump({"name": "p", "stages": [stage]}))
    cluster = ["--gpus-per-node", "8", "--gpu-memory", "80", "--nodes", "13"]

    def plan(recipe: Path | str, *overrides: str) -> tuple[int, bool]:
        status = main(["plan", str(recipe), *cluster, *overrides])
        return status, "bfloat16" in capsys.readouterr().out

    assert plan(fastest, "learner.ranks=88") == (0, True)
    assert plan(pipeline) == (0, True)
    assert plan("recipes/v2/sft.yaml", "learner.ranks=88", "model.dtype=fastest") == (0, True)
    assert plan(fastest, "learner.ranks=88", "model.dtype=float32") == (1, False)
    # A run that was begun in another dtype goes on in it.
    run.mkdir()
    (run / "recipe.yaml").write_text("model: {dtype: float32}")
    assert plan(fastest, "learner.ranks=88", f"run.dir={run}") == (1, False)


@pytest.mark.parametrize(("nodes", "gpus", "memory"), [(0, 8, 80), (2, 0, 0), (1, 8, 0)])
def test_a_cluster_that_cannot_be_is_refused(nodes: int, gpus: int, memory: float) -> None:
    with pytest.raises(UserError, match="--"):
        cluster_of(nodes, gpus, memory)


def test_experts_on_their_way_are_counted_where_they_are_replayed_or_recorded() -> None:
    """DeepSeek-V2 has 59 layers with experts, of which a token takes 6, and 160 ids fit a byte."""
    one_step = ["grpo.prompts_per_step=64", "grpo.group_size=16", "rollout={workers: 4, max_length: 1000}", *APART[:1]]
    one_step += ["sampling.max_new_tokens=500", "evaluation.max_new_tokens=500"]
    read = [
        load_recipe(Path("recipes/v2/grpo_reasoning.yaml"), [*one_step, *more])
        for more in ([], ["grpo.updates_per_step=2", "grpo.routing_replay=learner"])
    ]
    plain, replayed = (work_of(recipe.roles(), sizes_of(V2), 2) for recipe in read)
    assert plain.sizes.routes_a_token == 59 * 6
    assert (plain.route_bytes, replayed.route_bytes) == (0, 64 * 16 * 1000 * 354)
    assert sizes_of(LITE).routes_a_token == 26 * 6
    noted = make_plan(read[1], sizes_of(V2), cluster_of(20, 8, 80, NODE_MEMORY_GIB)).notes
    assert any("354 bytes a token, take 0.34 GiB of Ray's object store" in note for note in noted)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_teacher_is_counted_in_memory_and_time(zero: int) -> None:
    """A rank holds all of it, or its share under ZeRO-3, in the policy's dtype; two operations a parameter and token."""
    options = [*APART, f"learner.zero_stage={zero}"]
    without, taught = (
        planned("recipes/v2_lite/grpo_reasoning.yaml", LITE, 2, 8, *options, *more, others=[V2])
        for more in ([], [f"grpo.distill={{teacher: {V2}}}"])
    )
    held = 2 * sizes_of(V2).total / (without.roles[-1].count if zero == 3 else 1)
    assert taught.roles[-1].parts["teacher"] == pytest.approx(held)
    assert taught.roles[-1].total - without.roles[-1].total == pytest.approx(held)
    assert taught.seconds["training"] > without.seconds["training"]
    assert taught.refusals


def test_workers_for_which_a_step_has_no_engine_batch_do_not_sample_faster() -> None:
    cases = [(8, 2048), (16, 2048), (8, 128), (16, 64)]
    seconds = []
    for workers, size in cases:
        step = [
            "grpo.prompts_per_step=64",
            "grpo.group_size=16",
            f"rollout.workers={workers}",
            f"rollout.batch_sequences={size}",
            "rollout.concurrent_sequences=64",
        ]
        recipe = load_recipe(Path("recipes/v2/grpo_reasoning.yaml"), step)
        seconds.append(make_plan(recipe, sizes_of(V2), cluster_of(40, 8, 80)).seconds["sampling"])
    assert seconds[0] == seconds[1] > seconds[2] > seconds[3]


def test_refill_is_counted_as_if_no_group_of_any_round_had_variance() -> None:
    """Two rounds are sampled one after the other, and the experts of all three times travel with what was sampled."""
    step = ["grpo.prompts_per_step=64", "grpo.group_size=16", "rollout.record_experts=true"]
    read = [
        load_recipe(Path("recipes/v2/grpo_reasoning.yaml"), [*step, *more]) for more in ([], ["grpo.refill_rounds=2"])
    ]
    once, refilled = (make_plan(recipe, sizes_of(V2), cluster_of(20, 8, 80)) for recipe in read)
    assert refilled.seconds["sampling"] == pytest.approx(3 * once.seconds["sampling"])
    assert refilled.seconds["training"] == once.seconds["training"]
    routes = [work_of(recipe.roles(), sizes_of(V2), 2).route_bytes for recipe in read]
    assert routes[1] == 3 * routes[0] > 0
    assert any("a step samples 1,024 completions, and 3,072 where" in note for note in refilled.notes)
    assert not any("refill" in note for note in once.notes)


@pytest.mark.parametrize("zero", [1, 3])
def test_rounded_weights_take_a_copy_of_what_is_rounded_in_the_nodes_memory(zero: int) -> None:
    """All but embeddings, head [102400, 2048 each], 26 routers [64, 2048] and norms; of each rank, or under ZeRO-3 of rank 0."""
    options = [*APART, f"learner.zero_stage={zero}"]
    plain, rounded = (
        planned("recipes/v2_lite/grpo_reasoning.yaml", LITE, 2, 8, *options, *more)
        for more in ([], ["weights.precision=int8"])
    )
    norms = 27 * (2 * 2048 + 512) + 2048
    copy = 2 * (LITE_SIZE - 2 * 102_400 * 2048 - 26 * 64 * 2048 - norms)
    more = [new - old for (_, new), (_, old) in zip(rounded.nodes, plain.nodes, strict=True)]
    assert more == pytest.approx([copy, 0] if zero == 3 else [4 * copy, 4 * copy])
    assert [role.parts for role in rounded.roles] == [role.parts for role in plain.roles]
    assert any("28.5 GiB of unrounded weights wait" in note for note in rounded.notes)


def test_without_gpus_that_copy_is_among_the_memory_of_a_rank() -> None:
    plain, rounded = (
        planned("recipes/nano/grpo.yaml", NANO, 1, 0, "init_from=null", *more).roles[-1].total
        for more in ([], ["weights.precision=bfloat16"])
    )
    assert rounded - plain == 4 * sizes_of(NANO).total


def test_dpo_computes_its_reference_once_a_step_and_is_not_told_to_leave_it_out() -> None:
    plan = planned("recipes/nano/dpo.yaml", NANO, 1, 0, "model.init=random")
    supervised = planned("recipes/nano/sft.yaml", NANO, 1, 0, "rollout.max_length=160", "sft.sequences_per_step=64")
    # Operations a token: two forward and four backward, and two of the reference.
    assert plan.seconds["training"] == pytest.approx(supervised.seconds["training"] * 8 / 6)
    (refused,) = planned("recipes/nano/dpo.yaml", LITE, 1, 8).refusals
    assert "kl_coefficient" not in refused


@pytest.mark.parametrize("recipe", ["dpo", "reward_model"])
def test_a_micro_batch_has_room_for_both_completions_of_a_pair(recipe: str) -> None:
    def activations(length: int, tokens: int) -> float:
        section = "rollout" if recipe == "dpo" else "reward_model"
        overrides = ["model.init=random", f"{section}.max_length={length}", f"learner.micro_batch_tokens={tokens}"]
        plan = planned(f"recipes/nano/{recipe}.yaml", NANO, 1, 0, *overrides)
        return next(role.total for role in plan.roles if role.name.startswith("learner"))

    assert activations(1024, 512) == activations(1024, 2048)
    assert activations(512, 2048) == activations(1024, 2048)
