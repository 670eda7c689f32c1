"""A checkpoint is whole or absent, and a damaged one is known before anything of it is read."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.run import checkpoints as module
from align.run.checkpoints import CheckpointDirectory, DamagedCheckpointError, hashed_file, verify

RANKS = ("rank_00000.pt", "rank_00001.pt")


def fill(directory: Path) -> dict[str, dict[str, Any]]:
    entries = {}
    for name in RANKS:
        with hashed_file(directory / name) as (file, entry):
            file.write(pickle.dumps({"moments": name}))
        entries[name] = entry
    return entries


@pytest.fixture
def saved(tmp_path: Path) -> CheckpointDirectory:
    directory = CheckpointDirectory(tmp_path / "checkpoints")
    for step in (10, 20):
        directory.write(step, {"positions": {"metrics.jsonl": step}}, fill)
    return directory


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_the_newest_two_stay_and_say_what_their_writer_told(saved: CheckpointDirectory, tmp_path: Path) -> None:
    saved.write(30, {"positions": {"metrics.jsonl": 30}}, fill)
    assert names(tmp_path / "checkpoints") == ["step_00020", "step_00030"]
    newest = saved.newest(pytest.fail)
    assert newest is not None
    assert (newest.step, newest.facts) == (30, {"positions": {"metrics.jsonl": 30}})
    assert names(newest.path) == ["manifest.json", *RANKS]


def test_the_best_stays_until_another_is_better(saved: CheckpointDirectory, tmp_path: Path) -> None:
    saved.write(30, {}, fill, best=10)
    saved.write(40, {}, fill, best=10)
    assert names(tmp_path / "checkpoints") == ["step_00010", "step_00030", "step_00040"]
    saved.write(50, {}, fill, best=50)
    assert names(tmp_path / "checkpoints") == ["step_00040", "step_00050"]


def test_killed_at_eight_chosen_and_forty_random_moments_the_last_complete_checkpoint_is_there(tmp_path: Path) -> None:
    writer = [sys.executable, str(Path(__file__).parent / "checkpoint_writer.py"), str(tmp_path / "checkpoints")]
    done = subprocess.run(writer, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lives = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    assert len(lives) == 48
    # A step is complete before it can be reported, so that one more may be there, and none less.
    assert [how for how, complete, found in lives if int(found) - int(complete) not in (0, 1)] == []
    assert int(lives[-1][2]) > 20


class Hostile:
    def __reduce__(self) -> Any:
        return (Path(os.environ["ALIGN_TEST_HOSTILE"]).touch, ())


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def edit(manifest: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(manifest.read_text())
    change(record)
    manifest.write_text(json.dumps(record))


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def link(file: Path) -> None:
    elsewhere = file.parents[2] / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


CORRUPTIONS: dict[str, Callable[[Path], Any]] = {
    "the first bit of a file": lambda path: flip(path / RANKS[0], 0),
    "the last bit of a file": lambda path: flip(path / RANKS[1], -1),
    "a bit in the middle": lambda path: flip(path / RANKS[0], 20),
    "a file cut off": lambda path: os.truncate(path / RANKS[0], 9),
    "a file emptied": lambda path: (path / RANKS[0]).write_bytes(b""),
    "zeros behind a file": lambda path: (path / RANKS[0]).write_bytes((path / RANKS[0]).read_bytes() + bytes(4)),
    "a file filled with zeros": lambda path: (path / RANKS[0]).write_bytes(bytes((path / RANKS[0]).stat().st_size)),
    "a file gone": lambda path: (path / RANKS[1]).unlink(),
    "a file too many": lambda path: (path / "rank_00002.pt").write_bytes(b"x"),
    "a file under another name": lambda path: (path / RANKS[0]).rename(path / "rank_00007.pt"),
    "the files of two ranks exchanged": lambda path: swap(path / RANKS[0], path / RANKS[1]),
    "a file of the checkpoint before": lambda path: shutil.copy(path.parent / "step_00010" / "manifest.json", path),
    "a link in the place of a file": lambda path: link(path / RANKS[0]),
    "a directory in the place of a file": lambda path: ((path / RANKS[0]).unlink(), (path / RANKS[0]).mkdir()),
    "a hostile pickle": lambda path: (path / RANKS[0]).write_bytes(pickle.dumps(Hostile())),
    "the manifest gone": lambda path: (path / "manifest.json").unlink(),
    "the manifest cut off": lambda path: os.truncate(path / "manifest.json", 40),
    "the manifest emptied": lambda path: (path / "manifest.json").write_text("{}"),
    "another step in the manifest": lambda path: edit(path / "manifest.json", lambda m: m.update(step=30)),
    "other facts in the manifest": lambda path: edit(path / "manifest.json", lambda m: m["facts"].update(positions={})),
    "a hash in the manifest": lambda path: edit(
        path / "manifest.json", lambda m: m["files"][RANKS[0]].update(sha256="0")
    ),
    "a file left out of the manifest": lambda path: edit(path / "manifest.json", lambda m: m["files"].pop(RANKS[0])),
    "another format": lambda path: edit(path / "manifest.json", lambda m: m.update(format=2)),
    "a list in the manifest's place": lambda path: (path / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_is_noticed_named_and_the_checkpoint_before_taken(
    saved: CheckpointDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corruption: str
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setenv("ALIGN_TEST_HOSTILE", str(ran))
    CORRUPTIONS[corruption](tmp_path / "checkpoints" / "step_00020")
    told: list[str] = []
    newest = saved.newest(told.append)
    assert newest is not None
    assert newest.step == 10
    assert len(told) == 1
    assert f"{tmp_path / 'checkpoints' / 'step_00020'} is damaged: " in told[0]
    assert not ran.exists()
    assert names(tmp_path / "checkpoints") == ["step_00010", "step_00020.damaged"]


def test_when_none_is_whole_that_is_an_error_and_stays_one(saved: CheckpointDirectory, tmp_path: Path) -> None:
    for name in ("step_00010", "step_00020"):
        flip(tmp_path / "checkpoints" / name / RANKS[0], 0)
    for _ in range(2):
        with pytest.raises(DamagedCheckpointError, match=r"no checkpoint in .* is whole"):
            saved.newest(lambda damage: None)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(saved: CheckpointDirectory, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_00020"
    with pytest.raises(DamagedCheckpointError, match="it is of step 20"):
        verify(path.rename(path.with_name("step_00099")))


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_full_disk_leaves_the_old_ones_as_they_were_and_nothing_half_written(
    saved: CheckpointDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    synced = 0
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced == place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saved.write(30, {}, fill)
    monkeypatch.undo()
    assert names(tmp_path / "checkpoints") == ["step_00010", "step_00020"]
    assert saved.newest(pytest.fail) == verify(tmp_path / "checkpoints" / "step_00020")
