"""What the console says of evaluations: a line of bounded width for each, and a table of the run's; and what a run goes on with."""

import errno
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from align.errors import UserError
from align.evaluate.accuracy import Evaluation
from align.recipe import Recipe, dump_recipe, load_recipe
from align.run import RunDirectory
from align.run.checkpoints import Checkpoint
from align.session.run import (
    changes,
    changes_since,
    compare_stages,
    describe,
    keep_recipe,
    open_run,
    own_directory,
    positions,
)

NANO = Path(__file__).parents[3] / "recipes/nano"
KINDS = {f"accuracy/kind/{i}": 0.5 for i in range(20)}


def evaluated(domains: int, **rates: float) -> Evaluation:
    by_domain = {f"domain{i}": i / 100 for i in range(domains)}
    return Evaluation(60, 0.25, 20.0, 0.0, by_domain, {4: 0.5}, {"pass": 15}, {"degenerate_share": 0.1, **rates})


def test_single_kinds_are_not_told_in_the_line_of_an_evaluation() -> None:
    told = "25.0% of 60 held-out problems right{}, pass@4 50.0%, degenerate_share 10.0%"
    assert describe(evaluated(1, **KINDS)) == told.format("")
    assert describe(evaluated(2)) == told.format(" (domain0 0.0%, domain1 1.0%)")
    cut_off = replace(evaluated(1), truncated=0.3)
    assert describe(cut_off) == told.format("") + ", 30% of the answers cut off"
    assert describe(evaluated(20)) == told.format(" (0.0% to 19.0% in 20 domains)")


def test_a_share_is_told_of_the_answers_that_could_be_judged() -> None:
    told = describe(replace(evaluated(1), verdicts={"pass": 15, "infra_error": 3}))
    assert told.startswith("25.0% of 57 held-out problems right, ")
    assert told.endswith("; 3 could not be judged, and do not count")


@pytest.mark.parametrize(("domains", "columns"), [(1, 0), (3, 3), (20, 0)])
def test_the_table_of_a_run_has_no_column_for_each_kind_or_each_of_many_domains(domains: int, columns: int) -> None:
    told = []

    class Console:
        def table(self, title: str, heads: list[str], rows: list[list[str]]) -> None:
            told.extend([heads, *rows])

    compare_stages(Console(), {"before": evaluated(domains, **KINDS), "after": evaluated(domains)})  # type: ignore[arg-type]
    names = [f"domain{i}" for i in range(columns)]
    assert told[0] == ["policy", "greedy accuracy", *names, "pass@4", "degenerate_share", "tokens an answer"]
    assert {len(row) for row in told} == {len(told[0])}


def interrupted(directory: Path, *overrides: str, steps: int = 0, saved: int | None = None) -> None:
    """An SFT run that was interrupted after so many steps, with a checkpoint of the step `saved`."""
    with suppress(KeyboardInterrupt), open_run(recipe := sft(directory, *overrides)) as run:
        for step in range(1, steps + 1):
            run.metrics.write(step, "sft", {"loss": 1.0})
        if saved:
            facts = {"recipe": dump_recipe(recipe), "positions": positions(run.directory), "state": {}}
            run.checkpoints.write(saved, facts, lambda directory: {})
            run.directory.note_checkpoint(saved)
        raise KeyboardInterrupt


def sft(directory: Path, *overrides: str) -> Recipe:
    given = ["machine={}", f"run.dir={directory / 'run'}", f"model.path={NANO / 'policy'}", "save_every=2"]
    return load_recipe(NANO / "sft.yaml", [*given, *overrides])


def test_a_run_whose_checkpoints_are_gone_keeps_what_it_has_measured(tmp_path: Path) -> None:
    interrupted(tmp_path, steps=5, saved=4)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = [(tmp_path / "run" / name).read_bytes() for name in ("metrics.jsonl", "status.json")]
    for _ in range(2):
        with pytest.raises(UserError, match=r"has written a checkpoint of step 4, .* put it back"):
            own_directory(sft(tmp_path), tmp_path / "run")
    assert [(tmp_path / "run" / name).read_bytes() for name in ("metrics.jsonl", "status.json")] == before
    # Nor where a start before has failed.
    RunDirectory.reopen(tmp_path / "run").interrupt()
    with pytest.raises(UserError, match=r"put it back"):
        own_directory(sft(tmp_path), tmp_path / "run")


def test_one_that_never_had_a_checkpoint_begins_again(tmp_path: Path) -> None:
    interrupted(tmp_path, steps=5)
    with open_run(sft(tmp_path)) as run:
        assert run.resume is None
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("saved", [None, 2])
def test_another_recipe_is_kept_once_its_state_is_restored_and_consent_is_not(
    saved: int | None, tmp_path: Path
) -> None:
    interrupted(tmp_path, steps=2, saved=saved)
    file, other = tmp_path / "run" / "recipe.yaml", ["sft.sequences_per_step=8", "run.allow_changes=true"]
    kept = file.read_text()
    with suppress(KeyboardInterrupt), open_run(sft(tmp_path, *other)) as run:
        # Without a checkpoint there is nothing to restore.
        assert (file.read_text() == kept) is (saved is not None)
        keep_recipe(run.directory, sft(tmp_path, *other))
        raise KeyboardInterrupt
    assert "allow_changes: false" in file.read_text()
    assert not changes(RunDirectory(tmp_path / "run"), sft(tmp_path, "sft.sequences_per_step=8"))


def test_a_change_after_the_last_checkpoint_is_told_until_there_is_another(tmp_path: Path) -> None:
    interrupted(tmp_path)
    before, directory = dump_recipe(sft(tmp_path)), RunDirectory(tmp_path / "run")
    checkpoint = Checkpoint(tmp_path, 2, {"recipe": before})
    longer = sft(tmp_path, "sft.steps=9000", "sft.sequences_per_step=8")
    assert [key.split()[0] for key in changes_since(checkpoint, directory, longer)] == ["sft.sequences_per_step"]
    assert changes_since(None, directory, longer) == []
    older = Checkpoint(tmp_path, 2, {"recipe": before.replace("sequences_per_step", "no_longer_a_key")})
    assert "that of step 2 could not be compared (" in changes_since(older, directory, longer)[0]


def test_a_run_whose_model_has_moved_is_compared_and_goes_on_where_changes_are_allowed(tmp_path: Path) -> None:
    shutil.copytree(NANO / "policy", tmp_path / "policy")
    interrupted(tmp_path, f"model.path={tmp_path / 'policy'}")
    (tmp_path / "policy").rename(tmp_path / "moved")
    moved = f"model.path={tmp_path / 'moved'}"
    with (
        pytest.raises(UserError, match=r"another recipe: model\.path \('.*policy' before, '.*moved' now\)"),
        open_run(sft(tmp_path, moved)),
    ):
        pass
    with open_run(sft(tmp_path, moved, "run.allow_changes=true")):
        pass


def test_a_run_that_a_full_disk_ends_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def begun() -> None:
        with open_run(sft(tmp_path)) as run:
            monkeypatch.setattr(run.metrics, "event", full)
            full()

    with pytest.raises(OSError, match="No space"):
        begun()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_preference_data_whose_gathering_was_interrupted_are_gathered_anew(tmp_path: Path) -> None:
    def recipe(*overrides: str) -> Recipe:
        given = [
            "machine={}",
            f"model={{path: {NANO / 'policy'}, init: random}}",
            f"run.dir={tmp_path / 'run'}",
            *overrides,
        ]
        return load_recipe(NANO / "preferences.yaml", given)

    with suppress(KeyboardInterrupt), open_run(recipe()) as run:
        run.directory.final_directory.mkdir()
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="already holds a run"):
        own_directory(recipe("preferences.samples=3"), tmp_path / "run")
    with open_run(recipe()) as run:
        assert not run.directory.final_directory.exists()
