"""A finished run can be made longer: what it has measured and made stays, and it ends as a run that was as long from the start."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.recipe import RewardModelRecipe
from align.run import RunDirectory, read_samples
from align.run.files import whole_directory
from align.session.longer import make_longer
from align.session.run import open_run
from align.session.steps import Steps

from ..tiny import tiny_recipe
from .counting import DATA, Counter, count, recipe, status, steps_of

CONSTANT = {"learning_rate": 1e-3, "schedule": "constant"}


def train(made: RewardModelRecipe, stop_at: int | None = None) -> list[int]:
    """Make the steps of a recipe and evaluate what came of it; returns what was learned."""
    with open_run(made) as run:
        learned = count(made, run, stop_at).value.tolist()
        rows = [{"completion": str(made.steps)}]
        run.record_numbers("counting", made.steps, "after counting", {"accuracy": float(made.steps)}, rows)
    return learned


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    train(recipe(run))
    return run


def refusal(path: Path, made: RewardModelRecipe) -> str:
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as refused:
        make_longer(path, made)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    return str(refused.value)


def test_it_ends_with_the_weights_samples_and_numbers_of_a_run_that_was_as_long_from_the_start(
    finished: Path, tmp_path: Path
) -> None:
    make_longer(finished, recipe(finished, steps=14))
    learned = train(recipe(finished, steps=14))
    assert learned == train(recipe(tmp_path / "whole", steps=14))
    states = [path / "checkpoints/step_00014/rank_00000.pt" for path in (finished, tmp_path / "whole")]
    assert states[0].read_bytes() == states[1].read_bytes()
    assert status(finished) == "finished"
    assert "resuming from step 9" in (finished / "log.txt").read_text()


def test_what_was_measured_at_its_first_end_stays_and_is_told_from_the_new_end(finished: Path) -> None:
    make_longer(finished, recipe(finished, steps=12))
    train(recipe(finished, steps=12))
    evaluations = [json.loads(line) for line in (finished / "evaluations.jsonl").read_text().splitlines()]
    assert [(e["name"], e["accuracy"]) for e in evaluations] == [("after counting, step 9", 9), ("after counting", 12)]
    tables = {path.stem: read_samples(path)[0]["completion"] for path in (finished / "evaluations").iterdir()}
    assert tables == {"after counting, step 9": "9", "after counting": "12"}
    assert steps_of(finished) == [*range(1, 10), 9, *range(10, 13), 12]


def test_one_that_was_interrupted_loses_nothing_of_its_first_end(finished: Path) -> None:
    made = recipe(finished, steps=14)
    make_longer(finished, made)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), open_run(made):
            raise KeyboardInterrupt
    assert steps_of(finished) == [*range(1, 10), 9]
    with pytest.raises(KeyboardInterrupt):
        train(made, stop_at=11)
    train(made)
    assert steps_of(finished) == [*range(1, 10), 9, *range(10, 15), 14]


def test_final_is_there_until_the_new_one_is_whole(finished: Path) -> None:
    class Failing(Counter):
        def save(self, directory: Path) -> None:
            raise OSError("the disk is full")

    (finished / "final").mkdir()
    (finished / "final" / "model.safetensors").write_text("of step 9")
    made = recipe(finished, steps=14)
    make_longer(finished, made)
    with pytest.raises(OSError, match="full"), open_run(made) as run, Steps(made, run, Failing(), 14, DATA) as steps:  # type: ignore[arg-type]
        steps.save_final(made.model)
    assert status(finished) == "failed"
    assert (finished / "final" / "model.safetensors").read_text() == "of step 9"


def test_a_model_card_that_was_edited_stays(finished: Path) -> None:
    class Saving(Counter):
        def save(self, directory: Path) -> None:
            with whole_directory(directory) as temporary:
                (temporary / "model.safetensors").write_text("of step 14")

    (finished / "final").mkdir()
    (finished / "final" / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    made = recipe(finished, steps=14)
    make_longer(finished, made)
    with open_run(made) as run, Steps(made, run, Saving(), 14, DATA) as steps:  # type: ignore[arg-type]
        steps.save_final(made.model)
    assert {file.name: file.read_text().splitlines()[-1] for file in (finished / "final").iterdir()} == {
        "README.md": "mine",
        "model.safetensors": "of step 14",
    }


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (CONSTANT, "(schedule: constant), so it stays 0.001"),
        ({"learning_rate": 1e-3}, "(schedule: cosine), so it goes from 0.0001 in step 9 to 0.000508 in the next"),
    ],
)
def test_what_the_learning_rate_does_is_said(optimizer: dict[str, Any], told: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys: dict[str, Any] = {"run": {"dir": run}, "save_every": 9, "learner": {"optimizer": optimizer}}
    train(tiny_recipe(**keys))
    made = tiny_recipe(**keys, reward_model={"steps": 18})
    make_longer(run, made)
    train(made)
    log = (run / "log.txt").read_text()
    assert (
        f"the run now has 18 steps in place of 9: from here on the learning rate is that of a run of 18 steps {told}"
        in log
    )
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "longer"] == [9]


def test_no_more_steps_than_were_made_are_refused_with_the_command_that_adds_some(finished: Path) -> None:
    for steps in (5, 9):
        told = refusal(finished, recipe(finished, steps=steps))
        assert f"all of its 9 steps are done, and reward_model.steps is {steps}" in told
        assert f"`align resume {finished} reward_model.steps=18`" in told


def test_without_the_checkpoint_of_its_end_it_is_refused_and_its_weights_are_named(finished: Path) -> None:
    (finished / "checkpoints" / "step_00009").rename(finished / "checkpoints" / "step_00009.damaged")
    told = refusal(finished, recipe(finished, steps=14))
    assert f"{finished / 'checkpoints/step_00009'}, with the state of the optimizer is not there" in told
    assert f"model.path={finished / 'final'}" in told


def test_other_changes_are_refused_by_name_or_allowed_and_told(finished: Path) -> None:
    told = refusal(finished, recipe(finished, steps=14, seed=1))
    assert "another recipe: seed (0 before, 1 now)." in told
    made = recipe(finished, steps=14, seed=1, allow_changes=True)
    make_longer(finished, made)
    train(made)
    assert "going on with another recipe: seed (0 before, 1 now)" in (finished / "log.txt").read_text()


def test_it_can_be_ended_again_where_it_was_but_not_before(finished: Path) -> None:
    make_longer(finished, recipe(finished, steps=14))
    with pytest.raises(UserError, match=r"reward_model\.steps is 5, and .*step_00009 is of step 9"):
        train(recipe(finished, steps=5, allow_changes=True))
    train(recipe(finished, steps=9, allow_changes=True))
    assert status(finished) == "finished"


def stage_of(outer: Path, text: str) -> Path:
    """A finished run inside another one."""
    RunDirectory.create(outer).save_recipe(text)
    inner = outer / "rm"
    train(recipe(inner))
    return inner


def test_a_stage_of_a_pipeline_names_those_that_are_out_of_date_then(tmp_path: Path) -> None:
    inner = stage_of(tmp_path / "all", "{stage: pipeline, stages: [{name: sft}, {name: rm}, {name: grpo}]}")
    assert make_longer(inner, recipe(inner, steps=14)) == ["grpo"]


def test_the_first_stage_of_a_run_that_has_gone_on_from_it_is_refused(tmp_path: Path) -> None:
    inner = stage_of(tmp_path / "all", "{stage: grpo, init_from: sft.yaml}")
    assert f"{inner} is the stage that {tmp_path / 'all'} has gone on from" in refusal(inner, recipe(inner, steps=14))


def test_an_adapter_does_not_go_on_over_other_weights(tmp_path: Path) -> None:
    made, weights = recipe(tmp_path / "run"), tmp_path / "base" / "model.safetensors"
    weights.parent.mkdir()
    base = made.model.model_copy(update={"path": str(weights.parent)})

    def go_on() -> None:
        with open_run(made) as run, Steps(made, run, Counter(), 2, DATA, base=base) as steps:  # type: ignore[arg-type]
            steps.restore()
            list(steps)
            raise KeyboardInterrupt

    weights.write_text("one")
    with pytest.raises(KeyboardInterrupt):
        go_on()
    weights.write_text("two")
    with pytest.raises(UserError, match="the weights of what is not trained are not what they were"):
        go_on()
