"""What a library of the project logs as a warning is an event of the run that it happened in."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from align.learner.group import LearnerError, LearnerGroup
from align.recipe import ModelOptions, Recipe, Roles, RunOptions
from align.session.run import Run, open_run
from rollout import BroadcastSync


class Plain(Recipe):
    """A stage without anything."""

    @property
    def data_stage(self) -> Any:
        return "sft"

    def roles(self) -> Roles:
        return Roles()


def recipe(directory: Path) -> Recipe:
    return Plain(
        stage="sft",
        name="plain",
        run=RunOptions(dir=directory),
        model=ModelOptions(path="recipes/nano/policy"),
        data=[{"card": "nano_math"}],  # type: ignore[list-item]
    )


def events(run: Run) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in run.directory.events_file.read_text().splitlines()]
    return [(line["kind"], line["message"]) for line in lines]


@pytest.mark.parametrize("name", ["align.data.tables", "reward.mixture", "rollout.fleet"])
def test_a_warning_is_an_event_with_its_facts_and_a_line_and_comes_once(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with open_run(recipe(tmp_path / "run")) as run:
        logging.getLogger(name).warning("%d rows left out", 3, extra={"facts": {"samples": ["a#1"]}})
        logging.getLogger(name).info("nothing of note")
    [event] = [json.loads(line) for line in run.directory.events_file.read_text().splitlines()]
    assert event.items() >= {"kind": "warning", "message": "3 rows left out", "samples": ["a#1"]}.items()
    out, err = capfd.readouterr()
    assert out.count("warning: 3 rows left out") == 1
    assert "rows left out" not in err
    assert logging.getLogger(name.split(".")[0]).handlers == []


def test_of_a_run_inside_another_it_is_the_inner_ones(tmp_path: Path) -> None:
    log = logging.getLogger("reward")
    with open_run(recipe(tmp_path / "outer")) as outer:
        log.warning("before")
        with open_run(recipe(tmp_path / "outer" / "sft")) as inner:
            log.warning("inside")
        log.warning("after")
    assert events(inner) == [("warning", "inside")]
    assert events(outer) == [("warning", "before"), ("warning", "after")]


def test_a_learner_that_fails_in_a_broadcast_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise LearnerError("learner rank 0 was not done gathering the weights within 5 s")

    monkeypatch.setattr(LearnerGroup, "publish", fail)
    monkeypatch.setattr(LearnerGroup, "free_address", lambda _: ("127.0.0.1", 1))
    with open_run(recipe(tmp_path / "run")) as run:
        BroadcastSync().publish(object.__new__(LearnerGroup)).send(2)
    [(kind, message)] = events(run)
    assert kind == "warning"
    assert "the broadcast of weights broke off: learner rank 0 was not done" in message
