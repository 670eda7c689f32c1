"""What the group of ranks does by itself, without any."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from align.errors import UserError
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective, Sums
from align.learner.rank import LearnerRank, Trained
from align.recipe import LearnerOptions, OptimizerOptions


def group(**found: Any) -> Any:
    """A group whose ranks return what `found` says they do."""
    made: Any = object.__new__(LearnerGroup)
    made._options = LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=1e-3))
    made.replay, made._at_work = "off", list
    made._gather = lambda calls, doing, *_: found[doing]
    return made


@pytest.mark.parametrize("updates", [[], [[]], [[], []]])
def test_a_step_of_which_nothing_is_kept_makes_no_update(updates: list[list[Any]]) -> None:
    total, norm = group().update(updates, Objective(), 1e-3, lambda sums: pytest.fail("nothing to check"))
    assert (total, norm) == (Sums(), 0.0)


def test_the_loss_of_several_updates_is_their_mean() -> None:
    made, of_updates = group(), iter([Sums(loss=1.0, kl=0.5, tokens=3), Sums(loss=3.0, kl=1.5, tokens=5)])
    made._before_updates = lambda sequences, temperature: sequences
    made.accumulate, made.apply = lambda batch, objective: next(of_updates), lambda rate: 1.0
    total, _ = made.update([["a"], [], ["b"]], Objective(), 1e-3, lambda sums: None)
    assert (total.loss, total.kl, total.tokens) == (2.0, 2.0, 8)


def test_a_rank_without_work_gives_no_routes() -> None:
    made = group()
    made._options = made._options.model_copy(update={"ranks": 2})
    experts = np.zeros((3, 1, 2), dtype=np.uint8)
    work, _ = made._split([TrainingSequence.of_completion([1, 2, 3, 4], 2, 1.0, experts=experts)])
    ranks = sorted((sequence for [[sequence]] in work), key=lambda sequence: sequence.weight)
    assert [sequence.weight for sequence in ranks] == [0.0, 1.0]
    assert [sequence.experts is None for sequence in ranks] == [True, False]


@pytest.mark.parametrize(
    ("sent", "start_s", "expected"),
    [(0, None, 1800), (10**9, None, 1800), (2 * 236 * 10**9, None, 6608), (2 * 236 * 10**9, 5.0, 5.0)],
)
def test_a_large_state_has_the_time_that_its_bytes_take(
    sent: int, start_s: float | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr("ray.get", lambda references, timeout: limits.append(timeout))
    made = group()
    made.trained = Trained("all", None, sent)
    LearnerGroup._gather(made, [], "saving their state", start_s, made._state_s)
    assert limits == [expected]


def test_a_model_that_this_machine_does_not_see_is_not_taken_for_saved(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    with pytest.raises(OSError, match=r"run\.dir must be on a file system that all nodes share"):
        group(saving=[None]).save(tmp_path / "final")
    assert (tmp_path / "final" / "config.json").exists()


def test_a_run_whose_directory_another_node_does_not_see_is_refused(tmp_path: Path) -> None:
    def rank(node: Path) -> Any:
        reads = SimpleNamespace(remote=lambda file, text: LearnerRank.reads(None, node / file.name, text))  # type: ignore[arg-type]
        return SimpleNamespace(reads=reads)

    made = group()
    made._gather = lambda calls, doing: calls
    (tmp_path / "status.json").write_text("mine")
    made._ranks = [rank(tmp_path), rank(tmp_path)]
    made.check_shared(tmp_path / "status.json")
    (tmp_path / "other").mkdir()
    made._ranks = [rank(tmp_path), rank(tmp_path / "other")]
    with pytest.raises(UserError, match=r"run\.dir must be on a file system that all nodes share"):
        made.check_shared(tmp_path / "status.json")
    (tmp_path / "other" / "status.json").write_text("of an earlier run")
    with pytest.raises(UserError, match="all nodes share"):
        made.check_shared(tmp_path / "status.json")
