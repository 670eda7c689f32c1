"""What the group of ranks does by itself, without any."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.errors import UserError
from align.learner.group import LearnerGroup
from align.learner.objective import Objective, Sums
from align.learner.rank import LearnerRank
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
