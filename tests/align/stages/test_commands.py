"""A recipe with `init_from` is two stages, each a run of its own, which share the policy, the machine and the command's words."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.errors import UserError
from align.recipe import PlannedStage, dump_recipe, load_recipe, load_stage
from align.run import RunDirectory, read_status
from align.session.session import Session
from align.stages import commands
from align.stages.commands import run_stage

GRPO = Path("recipes/nano/grpo.yaml")
SFT = Path("recipes/nano/sft.yaml")
POLICY = Path(__file__).parents[3] / "recipes/nano/policy"


def plan(run: Path, *overrides: str, file: Path = GRPO) -> PlannedStage:
    return load_stage(file, ["machine={}", f"run.dir={run}", *overrides])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(stage, policy that it starts from) of what is trained, without engines."""
    seen: list[tuple[str, str]] = []

    def train(stage: str) -> Callable[..., Any]:
        def trained(recipe: Any, data: Any, session: Session) -> Any:
            seen.append((stage, session.policy.path))
            return session.policy.model_copy(update={"path": str(session.run.directory.final_directory)}), {}

        return trained

    data = SimpleNamespace(held_out=SimpleNamespace(prompts={"nano_math/test": {"1 + 1"}}))
    held_out: list[Any] = []
    monkeypatch.setattr(commands, "check", list)
    monkeypatch.setattr("align.session.session.prepare_policy", lambda model, *_, **__: (model, None))
    monkeypatch.setattr(Session, "start_sampling", lambda *_: None)
    monkeypatch.setattr(commands, "load_grpo_data", lambda *_: data)
    monkeypatch.setattr(commands, "load_sft_data", lambda *given: held_out.append(given[-1]))
    monkeypatch.setattr(commands, "train_sft", train("sft"))
    monkeypatch.setattr(commands, "train_grpo", train("grpo"))
    yield seen  # type: ignore[misc]
    assert all(given == data.held_out.prompts for given in held_out)


def test_what_both_share_is_said_once_and_the_rest_is_each_ones_own(tmp_path: Path) -> None:
    shared = ["model.dtype=bfloat16", "seed=3", "rollout={workers: 1, kv_cache_gb: 2}", "run.grace_s=60"]
    stage = plan(tmp_path / "run", *shared, "machine.cores=1", "rollout.max_length=200", "learner.ranks=1")
    first: Any = stage.before and stage.before.recipe
    own: Any = load_recipe(SFT)
    assert (first.model, first.seed, first.machine) == (stage.recipe.model, 3, stage.recipe.machine)
    assert (first.rollout.workers, first.rollout.kv_cache_gb, first.run.grace_s) == (1, 2.0, 60.0)
    assert first.rollout.max_length == own.rollout.max_length == 128
    assert (first.learner, first.data, first.sft) == (own.learner, own.data, own.sft)
    assert first.directory == tmp_path / "run" / "sft"
    assert stage.before is not None
    assert "rollout.kv_cache_gb (0.5 before, 2.0 now)" in stage.before.replaced
    assert not any("machine" in key or "run." in key for key in stage.before.replaced)


def test_a_reward_model_shares_the_policy_and_not_the_workers_that_it_has_none_of(tmp_path: Path) -> None:
    stage = plan(
        tmp_path, f"init_from={SFT}", "model={path: recipes/nano/policy, init: random, dtype: bfloat16}",
        file=Path("recipes/nano/reward_model.yaml"),
    )  # fmt: skip
    first: Any = stage.before and stage.before.recipe
    assert (first.model.dtype, first.rollout) == ("bfloat16", load_recipe(SFT).rollout)  # type: ignore[attr-defined]


def test_a_mistake_in_the_first_stage_is_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"grpo\.yaml: init_from: .*recipes/nano/reward_model\.yaml is a recipe for reward_model"
    ):
        plan(tmp_path, "init_from=recipes/nano/reward_model.yaml")
    wrong = tmp_path / "sft.yaml"
    wrong.write_text(SFT.read_text().replace("zero_stage: 1", "gpus: 1"))
    with pytest.raises(
        UserError, match=r"init_from: .*colocate: learner\.gpus and rollout\.gpus are more than one GPU"
    ):
        plan(tmp_path, f"init_from={wrong}", "colocate=true")


def test_the_first_stage_is_a_run_in_the_directory_of_the_second_which_starts_from_its_policy(
    tmp_path: Path, trained: list[tuple[str, str]]
) -> None:
    run = tmp_path / "run"
    run_stage(plan(run, "rollout.kv_cache_gb=0.25"))
    assert trained == [("sft", str(POLICY)), ("grpo", str(run / "sft" / "final"))]
    for directory, stage in ((run, "grpo"), (run / "sft", "sft")):
        assert read_status(directory) == read_status(directory) | {"state": "finished", "stage": stage}  # type: ignore[operator]
        assert load_recipe(directory / "recipe.yaml").stage == stage
    [told] = [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["kind"] == "init_from"]
    assert "rollout.kv_cache_gb (0.5 before, 0.25 now)" in told["message"]


def test_a_run_that_was_stopped_goes_on_in_the_stage_where_it_was(
    tmp_path: Path, trained: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for name, train in (("train_sft", commands.train_sft), ("train_grpo", commands.train_grpo)):
        monkeypatch.setattr(commands, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run_stage(plan(run))
        assert read_status(run)["state"] == "interrupted"  # type: ignore[index]
        monkeypatch.setattr(commands, name, train)
    assert read_status(run / "sft")["state"] == "finished"  # type: ignore[index]
    capfd.readouterr()
    run_stage(load_stage(run / "recipe.yaml", [f"run.dir={run}"]))  # as `align resume` does
    assert "SFT: done before" in capfd.readouterr().out
    assert trained == [("sft", str(POLICY)), ("grpo", str(run / "sft" / "final"))]


def test_a_finished_first_stage_of_an_older_run_counts_though_its_recipe_says_what_it_shares_in_other_words(
    tmp_path: Path, trained: list[tuple[str, str]]
) -> None:
    """Its policy and rollout workers were those of the second stage, whatever its own recipe says."""
    run = tmp_path / "run"
    stage = plan(run)
    with_own_model = load_recipe(
        SFT, [f"run.dir={run}", "model={path: recipes/nano/policy, init: random, dtype: bfloat16}"]
    )
    for directory, recipe, end in ((run, stage.recipe, "interrupt"), (run / "sft", with_own_model, "finish")):
        made = RunDirectory.create(directory)
        made.save_recipe(dump_recipe(recipe))
        getattr(made, end)()
    run_stage(plan(run))
    assert trained == [("grpo", str(run / "sft" / "final"))]


def test_a_first_stage_of_another_recipe_is_refused_and_with_overwrite_made_anew(
    tmp_path: Path, trained: list[tuple[str, str]]
) -> None:
    run = tmp_path / "run"
    other = tmp_path / "sft.yaml"
    other.write_text(SFT.read_text().replace("steps: 800", "steps: 8"))
    run_stage(plan(run))
    RunDirectory.reopen(run).interrupt()
    recipe = load_recipe(run / "sft" / "recipe.yaml").model_copy(update={"sft": load_recipe(other).sft})  # type: ignore[attr-defined]
    RunDirectory(run / "sft").save_recipe(dump_recipe(recipe))
    with pytest.raises(UserError, match=r"sft holds .* another recipe: sft\.steps \(8 before, 800 now\)"):
        run_stage(plan(run))
    trained.clear()
    run_stage(plan(run, "run.overwrite=true"))
    assert [stage for stage, _ in trained] == ["sft", "grpo"]
