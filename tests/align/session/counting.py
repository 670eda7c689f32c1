"""A stage without engines: its learner counts."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from align.data.drawing import Source
from align.recipe import RewardModelRecipe
from align.run.checkpoints import Entry, hashed_file
from align.session.run import Run
from align.session.steps import Steps

from ..tiny import tiny_recipe

DATA = [Source("pairs", ["one", "two"], 1)]


class Counter:
    """The least that can learn: it counts, in a tensor."""

    def __init__(self) -> None:
        self.value = torch.zeros(1000, dtype=torch.int64)
        self.closed = False
        self.updates = self.bad_updates = 0
        self.is_idle = True

    def save_state(self, directory: Path) -> dict[str, Entry]:
        with hashed_file(directory / "rank_00000.pt") as (file, entry):
            torch.save(self.value, file)
        return {"rank_00000.pt": entry}

    def load_state(self, directory: Path) -> None:
        self.value = torch.load(directory / "rank_00000.pt", weights_only=True)

    def save(self, directory: Path) -> None:
        directory.mkdir()

    def close(self) -> None:
        self.closed = True


def recipe(directory: Path, steps: int = 9, ranks: int = 2, seed: int = 0, **run: Any) -> RewardModelRecipe:
    return tiny_recipe(
        seed=seed,
        run={"dir": directory, **run},
        learner={"ranks": ranks, "optimizer": {"learning_rate": 1e-3}},
        save_every=2,
        reward_model={"steps": steps},
    )


def count(
    made: RewardModelRecipe,
    run: Run,
    stop_at: int | None = None,
    data: Any = DATA,
    accuracies: Mapping[int, float] = MappingProxyType({}),
    fails: Mapping[tuple[int, str], Exception] = MappingProxyType({}),
) -> Counter:
    """Make the steps of a recipe; at `stop_at` a signal comes in the middle of the step, `accuracies` are after some.

    `fails` are raised in a step, at its "start", in its "update" or at its "end".
    """
    learner = Counter()
    with Steps(made, run, learner, made.reward_model.steps, data, state={"seen": []}) as steps:  # type: ignore[arg-type]
        run.progress.stage("counting", made.reward_model.steps, completed=steps.done)
        steps.tell_length()
        steps.restore()
        assert learner.bad_updates == max(0, steps.done - 1)
        for step in steps:
            if stop_at == step:
                os.kill(os.getpid(), signal.SIGTERM)
            if error := fails.get((step, "start")):
                raise error
            learner.updates += 1
            if error := fails.get((step, "update")):
                learner.is_idle = False
                raise error
            learner.value += step
            learner.bad_updates = step
            steps.state["seen"].append(step)
            if step + 1 in accuracies:
                steps.note_accuracy(step + 1, accuracies[step + 1])
            run.record_step("counting", step + 1, {"loss": float(step)}, ())
            if error := fails.get((step, "end")):
                raise error
    assert learner.closed
    assert learner.bad_updates == made.reward_model.steps - 1
    assert steps.state["seen"] == list(range(steps.done))
    return learner


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def status(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text())["state"])
