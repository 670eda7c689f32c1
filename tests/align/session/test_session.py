"""New weights travel as the recipe says, and what a killed run left of them is removed."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from align.errors import UserError
from align.learner.group import LearnerDiedError
from align.model.policy import load_tokenizer
from align.model.sizes import sent_bytes
from align.recipe import GrpoRecipe, ModelOptions, load_recipe
from align.recipe.learner import LoraOptions
from align.run import machine
from align.session.checks import check_model, check_recipe, idle_workers, refuse_without_experts
from align.session.run import open_run
from align.session.session import Session, weight_sync_of
from rollout import AdapterSync, BroadcastSync, DirectorySync, FleetOptions, ObjectStoreSync, WeightOptions


def recipe(*overrides: str) -> GrpoRecipe:
    loaded = load_recipe(Path("recipes/nano/grpo.yaml"), ["init_from=null", *overrides])
    assert isinstance(loaded, GrpoRecipe)
    return loaded


def test_through_ray_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    assert weight_sync_of(recipe("weights.bucket_mb=0.5").weights, tmp_path) == ObjectStoreSync(2**19)


def test_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    directory = tmp_path / "weights"
    directory.mkdir()
    (directory / "left.safetensors").touch()
    assert weight_sync_of(recipe("weights.transport=directory").weights, directory) == DirectorySync(directory, 2**28)
    assert not directory.exists()


def test_a_broadcast_has_buckets_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    assert weight_sync_of(WeightOptions(transport="broadcast", bucket_mb=2), tmp_path) == BroadcastSync(2**21)


def test_an_adapter_alone_goes_as_files_too(tmp_path: Path) -> None:
    chosen = recipe("weights.transport=adapter", "learner.lora={rank: 8}")
    assert weight_sync_of(chosen.weights, tmp_path / "weights") == AdapterSync(tmp_path / "weights")


def test_an_adapter_alone_wants_one() -> None:
    with pytest.raises(UserError, match=r"there is none: set learner\.lora"):
        recipe("weights.transport=adapter")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["weights.transport=broadcast", "rollout.gpus=0.4"], "a GPU of its own for each process"),
        (["rollout.cuda_graphs=true", "learner.lora={rank: 8}"], "set weights.transport: adapter"),
        (["colocate=true", "learner.gpus=1"], "more than one GPU together"),
        (["colocate=true", "learner=3"], "learner"),
        (["colocate=true", "rollout.tensor_parallel=2"], "for workers of one process"),
        (["colocate=true", "rollout.resources={fast: 1}"], "are in one place"),
        (["colocate=true", "rollout.gpu_memory_share=0.5"], "rollout.gpu_memory_share has no effect here"),
        (["colocate=true", "weights.transport=broadcast"], "broadcast wants a GPU for each process"),
    ],
)
def test_what_shares_a_gpu_does_so_in_a_way_that_is_possible(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        recipe(*overrides)


def test_rounded_weights_are_refused_beside_an_adapter_and_told_of_by_check() -> None:
    with pytest.raises(UserError, match="the weights without an adapter are never sent"):
        recipe("weights.precision=int8", "learner.lora={rank: 8}")
    told = [note for note in check_recipe(recipe("weights.precision=int8")) if "weights.precision" in note]
    assert [note for note in told if "by 0.3 nats a token" in note and note.endswith("by 0.001")] == told
    assert len(told) == 1
    assert [note for note in check_recipe(recipe()) if "weights.precision" in note] == []


def test_workers_for_which_there_is_no_engine_batch_are_told() -> None:
    [told] = idle_workers(FleetOptions(workers=8, batch_sequences=128), 256)
    assert "8, and the 256 sequences that are sampled at a time are 2 engine batches of at most" in told
    assert told.endswith("or the other to 32")
    assert idle_workers(FleetOptions(workers=2, batch_sequences=128), 200) == []


def test_routing_is_replayed_where_there_is_any_and_something_to_replay() -> None:
    with pytest.raises(UserError, match="no effect with a single update a step"):
        recipe("grpo.routing_replay=learner")
    refuse_without_experts("dense", FleetOptions(), "off")
    for changed in ("grpo.routing_replay=sampler", "rollout.record_experts=true"):
        made = recipe(changed)
        with pytest.raises(UserError, match=rf"{changed.partition('=')[0]} is for a mixture of experts, and dense is"):
            refuse_without_experts("dense", made.roles().rollout, made.grpo.routing_replay)
        assert made.roles().rollout.record_experts
    assert not recipe("grpo.routing_replay=learner", "grpo.updates_per_step=2").roles().rollout.record_experts


@pytest.mark.parametrize(
    ("stage", "lora", "message"),
    [
        (
            "chat_sft",
            "{targets: [attention, experts], dropout: 0.1}",
            r"dropout must be 0 for adapters of mlp\.experts",
        ),
        ("reward_model", "{targets: [no_such_part]}", "has nothing that is called 'no_such_part'"),
    ],
)
def test_adapters_that_cannot_be_made_are_refused_before_a_model_is_loaded(stage: str, lora: str, message: str) -> None:
    made = load_recipe(
        Path(f"recipes/nano/{stage}.yaml"),
        [f"learner.lora={lora}", "model.path=recipes/nano/policy", "model.init=random"],
    )
    with pytest.raises(UserError, match=message):
        check_model(made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it can be served")
def test_an_adapter_alone_is_refused_where_vllm_cannot_add_it() -> None:
    with pytest.raises(UserError, match="no adapters to a model with experts"):
        check_model(recipe("weights.transport=adapter", "learner.lora={}"))


class Started(Exception):  # noqa: N818
    """Carries what a fleet was asked for."""


@pytest.mark.parametrize("trusted", [False, True])
def test_the_workers_trust_the_code_of_a_model_as_the_recipe_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trusted: bool
) -> None:
    def start(*_: Any, **named: Any) -> None:
        raise Started(named)

    monkeypatch.setattr("align.session.session.Fleet", start)
    monkeypatch.setattr("align.session.session.local_ray", lambda sent, _: nullcontext(sizes.append(sent)))
    sizes: list[int] = []
    made = recipe(f"run.dir={tmp_path / 'run'}", "machine={}", f"model.trust_remote_code={str(trusted).lower()}")
    tokenizer = load_tokenizer("recipes/nano/policy")
    with (
        pytest.raises(Started) as started,
        open_run(made) as run,
    ):
        Session(run, made.model, tokenizer).start_sampling(made.roles())
    assert started.value.args[0]["trust_remote_code"] is trusted
    assert sizes == [sent_bytes(made.model, None)]


def test_a_vllm_for_gpus_is_not_asked_to_sample_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("align.session.session.local_ray", lambda *_: nullcontext())
    monkeypatch.setattr("align.session.session.on_gpus", lambda: False)
    monkeypatch.setattr("rollout.processes.version", lambda name: "0.32.0")
    made = recipe(f"run.dir={tmp_path / 'run'}", "machine={}")
    with pytest.raises(UserError, match=r"vLLM is built for GPUs.*ACCELERATOR=cpu"), open_run(made) as run:
        Session(run, made.model, load_tokenizer("recipes/nano/policy")).start_sampling(made.roles())


def test_an_object_store_that_the_weights_do_not_fit_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_STORE", 0)
    monkeypatch.setattr(machine, "MOST_SPILLED", 0)
    monkeypatch.setattr("align.session.checks.shared_memory_bytes", lambda: 2**20)
    with pytest.raises(UserError, match=r"/dev/shm has 0\.0 GiB free"):
        check_model(recipe())
    check_model(recipe("weights.transport=broadcast"))


def test_of_an_adapter_the_modules_that_it_changes_are_sent() -> None:
    model = ModelOptions(path="deepseek-ai/DeepSeek-V2-Lite", dtype="bfloat16")
    assert sent_bytes(model, None) / 2 == pytest.approx(15.7e9, rel=0.01)
    assert sent_bytes(model, LoraOptions(targets=["attention"])) / 2 == pytest.approx(0.37e9, rel=0.02)


def test_learners_are_started_again_as_long_as_there_are_new_checkpoints_between_their_deaths(tmp_path: Path) -> None:
    """A long run on machines that come and go outlives any number of them; one that always dies at the same place does not."""
    with open_run(recipe(f"run.dir={tmp_path / 'run'}")) as run:
        steps = [3, 6, 9, 12, 15, 15, 15, 15]
        begun: list[int] = []

        def train() -> None:
            begun.append(run.resume.step if run.resume else 0)
            if (reached := steps[len(begun) - 1]) != begun[-1]:
                run.checkpoints.write(reached, {"positions": {}}, lambda _: {})
            raise LearnerDiedError("learner rank 0 is gone")

        with pytest.raises(LearnerDiedError):
            Session(run, ModelOptions(path="recipes/nano"), None).restarting(train)
    assert begun == [0, 3, 6, 9, 12, 15, 15, 15]
