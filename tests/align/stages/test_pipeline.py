"""Which stages of a pipeline run: what is done is skipped, and nothing is mixed with what another recipe made."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.errors import UserError
from align.recipe import GrpoRecipe, Pipeline, PlannedStage, dump_recipe, load_pipeline
from align.run import RunDirectory, read_status
from align.session.checks import check_names
from align.stages.commands import run_stage
from align.stages.pipeline import forget, run_pipeline, stages_to_run, stop_with_the_pipeline

STAGES = """\
name: three
stages:
  - {name: sft, recipe: recipes/nano/sft.yaml, set: [sft.steps=5, 'machine={}']}
  - {name: math, recipe: recipes/nano/grpo.yaml, set: ["model={path: '${sft}'}", init_from=null, 'machine={}']}
  - {name: more, recipe: recipes/nano/grpo.yaml, set: ["model={path: '${math}'}", "reference=${sft}", grpo.kl_coefficient=0.04, init_from=null, 'machine={}']}
"""


def pipeline(tmp_path: Path, *overrides: str, text: str = STAGES) -> Pipeline:
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    return load_pipeline(file, [f"run.dir={tmp_path / 'run'}", *overrides])


def finish(plan: Pipeline, *names: str) -> None:
    """As if these stages had run."""
    for stage in plan.stages:
        if stage.name in names:
            directory = RunDirectory.create(stage.directory, overwrite=True)
            directory.save_recipe(dump_recipe(stage.recipe))
            directory.finish()


def to_run(plan: Pipeline, start: str | None = None) -> list[str]:
    return [stage.name for stage in stages_to_run(plan, start)]


def test_a_stage_takes_what_stages_before_it_made(tmp_path: Path) -> None:
    plan = pipeline(tmp_path, "seed=7")
    sft, math, more = plan.stages
    assert math.recipe.model.path == str(tmp_path / "run" / "sft" / "final")
    assert more.recipe.model.path == str(tmp_path / "run" / "math" / "final")
    assert more.recipe.reference == tmp_path / "run" / "sft" / "final"  # type: ignore[attr-defined]
    own = pipeline(tmp_path, "seed=7", text=STAGES.replace("sft.steps=5", "sft.steps=5, seed=3"))
    assert [stage.recipe.seed for stage in own.stages] == [3, 7, 7]
    recipe = re.sub("(?m)^seed: .*$", "seed: 5", Path("recipes/nano/sft.yaml").read_text())
    (tmp_path / "own.yaml").write_text(recipe)
    text = STAGES.replace("recipes/nano/sft.yaml", str(tmp_path / "own.yaml"))
    assert [stage.recipe.seed for stage in pipeline(tmp_path, text=text).stages] == [5, 0, 0]
    assert sft.recipe.sft.steps == 5  # type: ignore[attr-defined]
    assert {stage.recipe.seed for stage in plan.stages} == {7}
    assert more.recipe.directory == tmp_path / "run" / "more"


def test_what_is_done_is_skipped_up_to_the_first_that_is_not(tmp_path: Path) -> None:
    plan = pipeline(tmp_path)
    assert to_run(plan) == ["sft", "math", "more"]
    finish(plan, "sft")
    assert to_run(plan) == ["math", "more"]
    finish(plan, "more")
    assert to_run(plan) == ["math", "more"]
    finish(plan, "math")
    assert to_run(plan) == []


def test_it_can_start_at_any_stage_whose_inputs_are_there(tmp_path: Path) -> None:
    plan = pipeline(tmp_path)
    finish(plan, "sft", "math", "more")
    assert to_run(plan, "math") == ["math", "more"]
    assert to_run(plan, "sft") == ["sft", "math", "more"]
    with pytest.raises(UserError, match=r"no such stage; its stages are sft, math, more"):
        to_run(plan, "maths")


def test_what_is_to_run_again_is_no_longer_done(tmp_path: Path) -> None:
    plan = pipeline(tmp_path)
    finish(plan, "sft", "math", "more")
    for stage in stages_to_run(plan, "math"):
        forget(stage)
    finish(plan, "math")  # and then the pipeline was stopped
    assert to_run(plan) == ["more"]


def test_it_can_stop_after_any_stage_and_then_says_that_it_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pipeline(tmp_path)
    ran = []

    def run_stage(stage: PlannedStage) -> int:
        ran.append(stage.name)
        finish(plan, stage.name)
        return 0

    monkeypatch.setattr("align.stages.pipeline.run_stage", run_stage)
    monkeypatch.setattr("align.stages.pipeline.check", list)
    for arguments, names, state in (
        ((None, "math"), ["sft", "math"], "paused"),
        ((None, "sft"), [], "paused"),
        ((None, None), ["more"], "finished"),
        ((None, "math"), [], "finished"),
        (("sft", "sft"), ["sft"], "paused"),  # what was made of the old one is out of date
        ((None, None), ["math", "more"], "finished"),
    ):
        ran.clear()
        assert run_pipeline(plan, *arguments) == 0
        assert ran == names
        assert read_status(plan.directory)["state"] == state  # type: ignore[index]
    with pytest.raises(UserError, match=r"--to maths: the pipeline has no such stage"):
        run_pipeline(plan, None, "maths")
    with pytest.raises(UserError, match=r"--to sft comes before --from more: nothing would be run"):
        run_pipeline(plan, "more", "sft")
    assert read_status(plan.directory)["state"] == "finished"  # type: ignore[index]


def test_it_does_not_begin_where_the_judge_of_a_stage_to_come_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"instruction": "Name a fruit", "output": "An apple"}\n')
    judge = f"{{base_url: '{nobody}', model: m, retries: 0}}"
    judged = f"{{benchmark: alpaca_eval, questions: {questions}, max_new_tokens: 16, judge: {judge}}}"
    hook = f'"evaluation.hooks=[{{name: judged, params: {judged}}}]"'
    plan = pipeline(tmp_path, text=STAGES.replace('"reference=${sft}"', hook))
    with pytest.raises(UserError, match=f"the judge 'm' at {nobody} cannot be asked: Connection error"):
        run_pipeline(plan, None)
    assert not plan.directory.exists()
    monkeypatch.setattr("align.stages.pipeline.run_stage", lambda stage: 0)
    assert run_pipeline(plan, None, "math") == 0
    with pytest.raises(UserError, match="cannot be asked: Connection error"):
        run_stage(plan.stages[-1])
    assert not plan.stages[-1].directory.exists()


def test_it_does_not_start_after_a_stage_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 'sft' before it is not done yet"):
        to_run(pipeline(tmp_path), "math")


def test_a_stage_that_was_run_with_another_recipe_is_never_taken_for_this_one(tmp_path: Path) -> None:
    finish(pipeline(tmp_path), "sft")
    with pytest.raises(
        UserError, match=r"stage 'sft' was run with another recipe .*seed \(0 before, 1 now\).*--from sft"
    ):
        to_run(pipeline(tmp_path, "seed=1"))
    assert to_run(pipeline(tmp_path, "seed=1"), "sft") == ["sft", "math", "more"]


def test_a_pipeline_that_was_moved_goes_on_with_what_it_made(tmp_path: Path) -> None:
    plan = pipeline(tmp_path, "run.dir=" + str(tmp_path / "old"))
    RunDirectory.create(plan.directory).save_recipe(plan.text)
    finish(plan, "sft", "math", "more")
    plan.directory.rename(tmp_path / "run")
    assert to_run(pipeline(tmp_path)) == []
    with pytest.raises(
        UserError, match=r"stage 'more' was run with another recipe .*: reference \(.* before, None now\),"
    ):
        to_run(pipeline(tmp_path, text=STAGES.replace('"reference=${sft}", grpo.kl_coefficient=0.04, ', "")))


def test_a_stage_that_was_interrupted_and_went_on_is_done_as_any_other(tmp_path: Path) -> None:
    """It then has the settings of a run that goes on."""
    plan = pipeline(tmp_path)
    finish(plan, "sft")
    sft = plan.stages[0]
    resumed = sft.recipe.model_copy(update={"run": sft.recipe.run.model_copy(update={"overwrite": False})})
    RunDirectory(sft.directory).save_recipe(dump_recipe(resumed))
    assert to_run(plan) == ["math", "more"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of stages that were started, of which each ends at once and failed."""
    commands: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(wait=lambda: 1)

    monkeypatch.setattr("align.stages.pipeline.subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr("align.stages.pipeline.check", list)
    monkeypatch.setattr("align.stages.pipeline.environment_record", dict)
    return commands


def test_a_stage_imports_nothing_from_the_working_directory(tmp_path: Path, ran: list[list[str]]) -> None:
    run_pipeline(pipeline(tmp_path), None)
    (tmp_path / "align.py").write_text("raise SystemExit('not this one')")
    command = [*ran[0][: ran[0].index("align.cli") + 1], "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_stage_that_was_cut_short_goes_on_with_its_recipe_or_is_refused_and_nothing_of_it_is_lost(
    tmp_path: Path, ran: list[list[str]]
) -> None:
    plan = pipeline(tmp_path)
    RunDirectory.create(plan.directory).interrupt()
    directory = RunDirectory.create(plan.stages[0].directory)
    directory.save_recipe(dump_recipe(plan.stages[0].recipe))
    checkpoint = directory.checkpoints_directory / "step_00003"
    checkpoint.mkdir(parents=True)
    directory.interrupt()
    changed = STAGES.replace("sft.steps=5", "sft.sequences_per_step=7, sft.steps=5")
    with pytest.raises(
        UserError, match=r"stage 'sft' was cut short with another recipe .*sft\.sequences_per_step.*--from sft"
    ):
        run_pipeline(pipeline(tmp_path, text=changed), None)
    assert checkpoint.is_dir()
    assert not ran
    # What may always change, and what is allowed to, does.
    for text, more in ((STAGES, "save_every=2"), (changed, "run.allow_changes=true")):
        run_pipeline(pipeline(tmp_path, text=text.replace("sft.steps=5", f"sft.steps=5, {more}")), None)
        assert {more, "run.overwrite=false"} <= set(ran.pop())
        assert checkpoint.is_dir()
    run_pipeline(plan, "sft")
    assert "run.overwrite=false" not in ran.pop()
    assert not checkpoint.is_dir()


def test_a_pipeline_leaves_other_runs_and_the_parts_of_its_own_as_they_are(tmp_path: Path) -> None:
    plan = pipeline(tmp_path)
    RunDirectory.create(tmp_path / "run").save_recipe("stage: grpo\nname: other\n")
    with pytest.raises(UserError, match="holds a run of a single recipe: give the pipeline another"):
        run_pipeline(plan, None)
    with pytest.raises(UserError, match=r"stage 'final': .*new has something else of that name"):
        run_pipeline(
            pipeline(tmp_path, f"run.dir={tmp_path / 'new'}", text=STAGES.replace("name: more", "name: final")), None
        )


def test_what_runs_anew_runs_the_sft_of_its_init_from_anew(tmp_path: Path, ran: list[list[str]]) -> None:
    text = "name: one\nstages:\n  - {name: math, recipe: recipes/nano/grpo.yaml, set: ['machine={}']}\n"
    plan = pipeline(tmp_path, text=text)
    RunDirectory.create(plan.directory).interrupt()
    for part in reversed(plan.stages[0].parts):
        directory = RunDirectory.create(part.directory)
        directory.save_recipe(dump_recipe(part.recipe))
        directory.finish() if part.name == "sft" else directory.interrupt()
    run_pipeline(plan, None)  # cut short before its first checkpoint
    assert "run.overwrite=false" in ran.pop()
    run_pipeline(plan, "math")
    assert "run.overwrite=false" not in ran.pop()


def test_what_a_pipeline_says_of_runs_holds_for_its_stages(tmp_path: Path) -> None:
    plan = pipeline(tmp_path, "run.grace_s=600", "run.allow_changes=true")
    assert {(stage.recipe.run.grace_s, stage.recipe.run.allow_changes) for stage in plan.stages} == {(600.0, True)}
    with pytest.raises(UserError, match=r"run\.overwrite: .*--from STAGE"):
        pipeline(tmp_path, "run.overwrite=true")
    # A stage's own word stays where the pipeline's copy of itself is read.
    graced = STAGES.replace("sft.steps=5", "sft.steps=5, run.grace_s=300")
    copy = tmp_path / "recipe.yaml"
    copy.write_text(pipeline(tmp_path, text=graced).text.replace("overwrite: false", "overwrite: true"))
    assert load_pipeline(copy).stages[0].recipe.run.grace_s == 300
    # Preferences always begin anew.
    load_pipeline(Path("recipes/nano/pipeline.yaml"), ["run.allow_changes=true"])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("${math}", "${maths}", r"stage 'more' takes \$\{maths\}, but before it there is only sft, math"),
        ("name: math", "name: sft", "two stages are named 'sft'"),
        ("sft.steps=5", "sft.stepz=5", r"stage 'sft': .*unknown key 'sft.stepz' \(did you mean 'steps'"),
        ("recipes/nano/sft.yaml", "recipes/nano/sfd.yaml", r"stage 'sft': recipes/nano/sfd.yaml: no such recipe"),
        ("name: three", "nam: three", r"line 1: unknown key 'nam' \(did you mean 'name'"),
        ("'${sft}'", "'/nowhere/at/all'", r"stage 'math': .*model.path names /nowhere/at/all, which does not exist"),
    ],
)
def test_a_pipeline_with_a_mistake_is_refused_before_its_first_stage(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(tmp_path, text=STAGES.replace(before, after))


def test_a_round_of_iterative_grpo_goes_on_from_the_policy_and_the_reward_model_of_the_round_before(
    tmp_path: Path,
) -> None:
    plan = load_pipeline(Path("recipes/nano/pipeline_iterative.yaml"), [f"run.dir={tmp_path}"])
    made = {stage.name: stage for stage in plan.stages}
    for stage in plan.stages:
        check_names(stage.recipe.data, stage.recipe.data_stage, stage.recipe.roles())
    final = {name: str(tmp_path / name / "final") for name in made}
    pairs, reward, policy = (made[name].recipe for name in ("pairs_2", "reward_2", "policy_2"))
    assert pairs.model.path == policy.model.path == final["policy_1"]
    assert reward.model.path == final["reward_1"]
    assert [(str(data.path), data.share) for data in reward.data] == [
        (final["pairs_2"] + "/arithmetic", 0.9),
        (final["pairs_1"] + "/arithmetic", 0.1),
    ]
    assert isinstance(policy, GrpoRecipe)
    assert policy.grpo.kl_coefficient
    assert policy.reference is None  # the policy at the start of the stage
    assert [term.params.get("path") for term in policy.rewards] == [None, final["reward_2"]]
    assert {stage.recipe.seed for name, stage in made.items() if name.endswith("_2")} == {1}


def test_a_stage_hears_of_the_end_of_a_pipeline_that_ray_has_started_as_a_job() -> None:
    """Ray blocks SIGINT in what it starts, and what is blocked stays so in a new process."""
    blocked = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        said = [
            subprocess.run([sys.executable, "-c", blocked], preexec_fn=first, capture_output=True, text=True).stdout
            for first in (None, stop_with_the_pipeline)
        ]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert said == ["True\n", "False\n"]
