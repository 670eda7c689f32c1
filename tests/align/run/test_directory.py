"""A run owns its directory: nothing of anybody else's is touched, and no two processes write one run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import align
from align.errors import UserError
from align.run import RunDirectory, read_status, write_atomically

REPOSITORY = Path(align.__file__).parents[1]
OWNER = """
import sys
from align.run import RunDirectory
run = RunDirectory.create(sys.argv[1])
print("owned", flush=True)
sys.stdin.read()
"""


@contextmanager
def owner(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the run in `path` until it is killed."""
    command = [sys.executable, "-c", OWNER, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        try:
            yield process
        finally:
            process.kill()


def tree(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def finished(path: Path) -> None:
    run = RunDirectory.create(path)
    run.save_recipe("seed: 1\n")
    run.finish()


def test_a_new_run_is_running_and_has_its_files_under_their_names(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs" / "nano")
    run.save_recipe("seed: 1\n")
    run.save_environment({"cores": 2})
    run.enter("sft")

    assert run.recipe_file.read_text() == "seed: 1\n"
    assert json.loads(run.environment_file.read_text()) == {"cores": 2}
    status = read_status(run.path)
    assert status is not None
    assert status.pop("started") is not None
    assert status == {"state": "running", "stage": "sft", "ended": None, "error": None}
    assert run.samples_file(12) == run.path / "samples" / "step_00012.parquet"
    assert sorted(tree(run.path)) == ["environment.json", "recipe.yaml", "run.lock", "status.json"]


def test_the_status_says_how_a_run_ended(tmp_path: Path) -> None:
    finished(tmp_path / "a")
    failing = RunDirectory.create(tmp_path / "b")
    failing.fail(ValueError("loss is nan"))
    RunDirectory.create(tmp_path / "c").interrupt()

    statuses = [read_status(tmp_path / name) for name in "abc"]
    assert [status and status["state"] for status in statuses] == ["finished", "failed", "interrupted"]
    assert [status and status["error"] for status in statuses] == [None, "ValueError: loss is nan", None]
    assert all(status and status["started"] <= status["ended"] for status in statuses)


def test_a_run_that_goes_on_began_when_it_began(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run").interrupt()
    file = tmp_path / "run" / "status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"started": "2026-01-02T03:04:05+00:00"}))
    before = read_status(tmp_path / "run")
    RunDirectory.reopen(tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert before is not None
    assert status is not None
    assert (status["state"], status["started"], status["ended"]) == ("running", before["started"], None)


def test_a_directory_with_a_run_is_refused_with_its_state_and_the_cure(tmp_path: Path) -> None:
    finished(tmp_path / "nano")
    before = tree(tmp_path)

    with pytest.raises(UserError) as refusal:
        RunDirectory.create(tmp_path / "nano")

    message = str(refusal.value)
    assert str(tmp_path / "nano") in message
    assert "finished" in message
    assert "run.dir=" in message
    assert "run.overwrite=true" in message
    assert tree(tmp_path).keys() == before.keys()
    assert tree(tmp_path)["nano/status.json"] == before["nano/status.json"]


def test_a_run_whose_process_was_killed_counts_as_interrupted(tmp_path: Path) -> None:
    with owner(tmp_path / "nano"):
        pass

    with pytest.raises(UserError, match="interrupted"):
        RunDirectory.create(tmp_path / "nano")
    RunDirectory.create(tmp_path / "nano", overwrite=True).finish()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_process_is_refused_with_the_number_of_the_first(tmp_path: Path, overwrite: bool) -> None:
    with owner(tmp_path / "nano") as first:
        before = tree(tmp_path)
        with pytest.raises(UserError, match=rf"in use by process {first.pid}\b"):
            RunDirectory.create(tmp_path / "nano", overwrite=overwrite)
        assert tree(tmp_path) == before


def test_one_process_cannot_own_a_run_twice_until_it_has_ended(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "nano")
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        RunDirectory.create(tmp_path / "nano", overwrite=True)
    run.finish()
    RunDirectory.create(tmp_path / "nano", overwrite=True)


def test_overwriting_removes_the_earlier_run_and_its_stages(tmp_path: Path) -> None:
    earlier = RunDirectory.create(tmp_path / "nano")
    earlier.save_recipe("seed: 1\n")
    RunDirectory.create(earlier.path / "sft").finish()
    (earlier.checkpoints_directory / "step_00020").mkdir(parents=True)
    earlier.fail("out of memory")

    run = RunDirectory.create(tmp_path / "nano", overwrite=True)

    assert sorted(tree(run.path)) == ["run.lock", "status.json"]
    status = read_status(run.path)
    assert status is not None
    assert (status["state"], status["error"], status["ended"]) == ("running", None, None)


def test_overwriting_spares_what_a_link_in_the_run_points_to(tmp_path: Path) -> None:
    finished(tmp_path / "nano")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "weights").write_text("precious")
    (tmp_path / "nano" / "checkpoints").symlink_to(tmp_path / "disk")

    RunDirectory.create(tmp_path / "nano", overwrite=True)

    assert (tmp_path / "disk" / "weights").read_text() == "precious"
    assert not (tmp_path / "nano" / "checkpoints").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "status.json", "samples/thesis.tex", "sft/thesis.tex", "run.lock/a"])
def test_somebodys_files_are_never_taken_for_a_run(tmp_path: Path, name: str, overwrite: bool) -> None:
    file = tmp_path / "work" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    if name == "run.lock/a":
        (tmp_path / "work" / "thesis.tex").write_text("")
    before = tree(tmp_path)

    with pytest.raises(UserError, match=r"is not empty and holds no run.*run\.dir="):
        RunDirectory.create(tmp_path / "work", overwrite=overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["nano", "nano/sft"])
def test_somebodys_files_inside_a_run_are_not_overwritten(tmp_path: Path, place: str) -> None:
    run = RunDirectory.create(tmp_path / "nano")
    RunDirectory.create(run.path / "sft").finish()
    run.save_recipe("seed: 1\n")
    run.finish()
    (tmp_path / place / "notes.txt").write_text("precious")

    with pytest.raises(UserError, match=r"notes\.txt"):
        RunDirectory.create(tmp_path / "nano", overwrite=True)
    assert (tmp_path / place / "notes.txt").read_text() == "precious"
    assert run.recipe_file.exists()
    # A run that goes on leaves them where they are.
    RunDirectory.reopen(tmp_path / "nano").finish()
    assert (tmp_path / place / "notes.txt").read_text() == "precious"


def test_a_run_is_not_overwritten_while_one_of_its_stages_is_owned(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "nano")
    run.save_recipe("seed: 1\n")
    stage = RunDirectory.create(run.path / "sft")
    run.finish()

    with pytest.raises(UserError, match="in use"):
        RunDirectory.create(tmp_path / "nano", overwrite=True)
    assert run.recipe_file.exists()
    stage.finish()


def test_what_a_crash_leaves_before_the_first_status_does_not_block_a_run(tmp_path: Path) -> None:
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "run.lock").write_text("process 1 on elsewhere\n")
    (tmp_path / "nano" / ".status.json.1234.partial").write_text('{"sta')
    run = RunDirectory.create(tmp_path / "nano")
    assert sorted(tree(run.path)) == ["run.lock", "status.json"]


def test_a_file_in_the_place_of_the_directory_or_of_its_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "nano"):
        with pytest.raises(UserError, match=r"file.*run\.dir="):
            RunDirectory.create(path, overwrite=True)
    assert tree(tmp_path) == {"file": b"precious"}


def test_a_run_in_the_copy_that_ray_makes_for_a_job_is_refused(tmp_path: Path) -> None:
    """It would be gone with the job, and never found by the next one."""
    with pytest.raises(UserError, match=r"give run\.dir a whole path on storage that stays"):
        RunDirectory.create(tmp_path / "working_dir_files" / "_ray_pkg_029f88d5" / "runs" / "first")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_made_is_refused_and_leaves_no_parents(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write the run directory .* run\.dir="):
        RunDirectory.create(tmp_path / "runs" / ("n" * 300))
    assert tree(tmp_path) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(UserError, match="Permission denied"):
        RunDirectory.create(tmp_path / "closed" / "nano")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a.json", "new \ud800")
    assert tree(tmp_path) == {"a.json": b"old"}
    write_atomically(tmp_path / "a.json", b"new")
    assert tree(tmp_path) == {"a.json": b"new"}
