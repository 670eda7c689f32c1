"""Where a run goes on, what it refuses to go on with, and what becomes of checkpoints that cannot be written."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align.data.drawing import Source
from align.errors import AlarmError, Terminated, UserError
from align.evaluate.agreement import AgreementError
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerError
from align.recipe import RunOptions
from align.recipe.roles import reward_models
from align.run.checkpoints import hashed_file
from align.run.tensorboard import TensorBoard
from align.session.run import open_run
from align.session.steps import COMPARED, SavingError, Steps, compared, data_digest
from reward import RewardError, RewardTerm
from rollout import RolloutError

from .counting import DATA, Counter, count, recipe, status, steps_of


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was told to stop in its sixth step."""
    made = recipe(tmp_path / "run")
    with pytest.raises(Terminated), open_run(made) as run:
        count(made, run, stop_at=5)
    return tmp_path / "run"


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_told_to_stop_the_step_ends_and_is_saved_and_the_run_goes_on_after_it(stopped: Path) -> None:
    assert (status(stopped), steps_of(stopped)) == ("interrupted", [1, 2, 3, 4, 5, 6])
    assert checkpoints(stopped) == ["step_00004", "step_00006"]
    made = recipe(stopped)
    with open_run(made) as run:
        assert int(count(made, run).value[0]) == sum(range(9))
    assert (status(stopped), steps_of(stopped)) == ("finished", list(range(1, 10)))
    with pytest.raises(UserError, match="already holds a run, finished"), open_run(made):
        pass


def test_the_best_of_those_that_were_rated_stays_also_when_the_run_was_interrupted(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run")
    with pytest.raises(Terminated), open_run(made) as run:
        count(made, run, stop_at=5, accuracies={1: 0.2, 3: 0.9})
    assert checkpoints(tmp_path / "run") == ["step_00003", "step_00004", "step_00006"]
    with open_run(made) as run:
        count(made, run, accuracies={7: 0.5})
    assert checkpoints(tmp_path / "run") == ["step_00003", "step_00008", "step_00009"]


def test_the_best_is_saved_also_where_no_other_is(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run").model_copy(update={"save_every": None})
    with open_run(made) as run:
        count(made, run, accuracies={1: 0.2, 3: 0.9, 7: 0.5})
    assert checkpoints(tmp_path / "run") == ["step_00001", "step_00003"], (
        "each when it was the best, of which two are kept"
    )


def test_a_digest_of_data_knows_every_part_of_a_sequence() -> None:
    sequence = TrainingSequence(token_ids=[1, 2, 3], sampled=np.array([False, True, True]), weight=1.0)
    others = [
        replace(sequence, token_ids=[1, 2, 4]),
        replace(sequence, sampled=np.array([True, True, True])),
        replace(sequence, weight=0.5),
    ]
    assert len({data_digest([each]) for each in (sequence, *others)}) == 4
    assert data_digest([replace(sequence)]) == data_digest([sequence])


def test_the_weights_of_reward_models_among_the_rewards_are_compared() -> None:
    terms = [RewardTerm(name="reward_model", params={"path": "runs/rm/final"}), RewardTerm(name="repetition")]
    assert reward_models(terms) == ["runs/rm/final"]
    assert "reward models" in COMPARED
    kept, moved, others = ({"/old/final": "a"}, {"/new/final": "a"}, {"/old/final": "b"})
    assert compared("reward models", kept) == compared("reward models", moved) != compared("reward models", others)
    assert compared("data", kept) != compared("data", moved)


def test_what_was_measured_after_the_checkpoint_is_cut_off(stopped: Path) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7}\n{"half a li')
    (stopped / "samples").mkdir()
    for step in (6, 7):
        (stopped / "samples" / f"step_{step:05d}.parquet").touch()
    with open_run(recipe(stopped)) as run:
        assert steps_of(stopped) == [1, 2, 3, 4, 5, 6]
        assert run.resume is not None
    assert [path.name for path in (stopped / "samples").iterdir()] == ["step_00006.parquet"]
    events = [json.loads(line) for line in (stopped / "events.jsonl").read_text().splitlines()]
    assert events[-1]["message"] == "resuming from step 6"


def test_tensorboard_forgets_what_comes_again(stopped: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = recipe(stopped, steps=7)
    os.rename(stopped / "checkpoints" / "step_00006", stopped / "checkpoints" / ".gone.partial")
    with open_run(made.model_copy(update={"run": RunOptions(dir=stopped, allow_changes=True)})) as run:
        count(made, run)
    events = EventAccumulator(str(stopped / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("counting/loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_tensorboard_has_the_steps_from_before_it_was_there(stopped: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.rmtree(stopped / "tensorboard")
    made = recipe(stopped)
    with open_run(made) as run:
        count(made, run)
    events = EventAccumulator(str(stopped / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("counting/loss")] == list(range(1, made.steps + 1))


def test_a_table_that_comes_first_has_all_metrics_before_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path / "tensorboard", earlier=lambda: [(1, {"loss": 2.0}, 0.0), (2, {"loss": 1.0}, 0.0)])
    board.table(2, "answers", [{"id": "a"}])
    board.finish("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(stopped: Path) -> None:
    (stopped / "checkpoints" / "step_00006" / "rank_00000.pt").write_bytes(b"")
    made = recipe(stopped)
    with open_run(made) as run:
        assert int(count(made, run).value[0]) == sum(range(9))
    log = (stopped / "log.txt").read_text()
    assert "step_00006 is damaged: rank_00000.pt does not have its" in log
    assert "resuming from step 4" in log
    assert '"kind": "warning"' in (stopped / "events.jsonl").read_text()


def test_without_a_whole_checkpoint_it_does_not_begin_again_in_silence(stopped: Path) -> None:
    for path in (stopped / "checkpoints").iterdir():
        (path / "manifest.json").write_text("{}")
    for _ in range(2):
        with (
            pytest.raises(UserError, match=r"no checkpoint in .* is whole.* run\.overwrite=true"),
            open_run(recipe(stopped)),
        ):
            pass
    assert steps_of(stopped) == [1, 2, 3, 4, 5, 6]


def test_another_recipe_is_refused_with_the_keys_that_differ(stopped: Path) -> None:
    with (
        pytest.raises(
            UserError, match=r"another recipe: seed \(0 before, 1 now\); reward_model\.steps \(9 before, 12 now\)"
        ),
        open_run(recipe(stopped, steps=12, seed=1)),
    ):
        pass
    assert status(stopped) == "interrupted"
    made = recipe(stopped, steps=12, allow_changes=True)
    with open_run(made) as run:
        assert int(count(made, run).value[0]) == sum(range(12))
    assert "going on with another recipe: reward_model.steps (9 before, 12 now)" in (stopped / "log.txt").read_text()


def test_other_data_and_another_division_are_refused(stopped: Path) -> None:
    made = recipe(stopped)
    other = [Source("pairs", ["one", "three"], 1)]
    with pytest.raises(UserError, match="the training data are not what they were"), open_run(made) as run:
        count(made, run, data=other)
    made = recipe(stopped, ranks=1, allow_changes=True)
    with (
        pytest.raises(UserError, match=r"learner\.ranks is 1, and checkpoint .* was written with 2"),
        open_run(made) as run,
    ):
        count(made, run)
    assert checkpoints(stopped) == ["step_00004", "step_00006"]


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file can be longer, as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_checkpoints_that_cannot_be_written_are_told_and_after_three_the_run_stops(stopped: Path) -> None:
    made = recipe(stopped, steps=20, allow_changes=True)
    refused = pytest.raises(SavingError, match="3 checkpoints in a row could not be written")
    with refused, open_run(made) as run, small_files(4000):
        count(made, run)
    assert checkpoints(stopped) == ["step_00004", "step_00006"]
    assert (status(stopped), steps_of(stopped)) == ("failed", list(range(1, 13)))
    assert (stopped / "log.txt").read_text().count("could not be written") == 3
    with open_run(made) as run:
        assert int(count(made, run).value[0]) == sum(range(20))


def test_pytorch_on_a_full_disk_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    state = hashed_file(tmp_path / "state.pt")
    with small_files(4000), pytest.raises(OSError, match="too large") as full, state as (file, _):
        torch.save(torch.zeros(100_000), file)
    assert full.value.errno == errno.EFBIG


def test_the_end_of_a_run_says_how_much_of_an_adapter_is_lost_in_merged_weights(tmp_path: Path) -> None:
    class Merged(Counter):
        def save(self, directory: Path) -> float:  # type: ignore[override]
            super().save(directory)
            return 0.25

    made = recipe(tmp_path / "run")
    with open_run(made) as run, Steps(made, run, Merged(), 0, DATA) as steps:  # type: ignore[arg-type]
        steps.save_final(made.model)
    assert (
        "25.00% of what the adapter does is rounded away; final/adapter is exact"
        in (tmp_path / "run" / "log.txt").read_text()
    )


@pytest.mark.parametrize(
    ("where", "error", "saved"),
    [
        ("end", AlarmError("so"), 6),
        ("end", RewardError("the judge is down"), 6),
        ("start", RewardError("the judge is down"), 5),
        ("start", RolloutError("no worker is left"), 5),
        ("start", UserError("row 7 cannot be read"), 5),
        ("end", RolloutError("the weights went nowhere"), None),
        ("start", AgreementError("too far apart"), None),
        ("start", LearnerError("gone"), None),
        ("update", RewardError("asked from another thread"), None),
        ("update", KeyboardInterrupt(), None),
        ("start", KeyboardInterrupt(), None),
    ],
)
def test_what_ends_a_run_and_leaves_its_learner_whole_loses_no_step(
    tmp_path: Path, where: str, error: Exception, saved: int | None
) -> None:
    made = recipe(tmp_path / "run").model_copy(update={"save_every": None})
    with pytest.raises(type(error)), open_run(made) as run:
        count(made, run, fails={(5, where): error})
    assert status(tmp_path / "run") == ("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
    assert [step.name for step in (tmp_path / "run" / "checkpoints").glob("*")] == (
        [f"step_{saved:05d}"] if saved else []
    )
    with open_run(made) as run:
        assert int(count(made, run).value[0]) == sum(range(9))
