"""The tables of docs/moe.md: every run has a valid recipe, what is there is not made again, and the learner judges as its sampler did."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.learner.batch import TrainingSequence
from align.recipe import GrpoRecipe, ModelOptions, load_recipe


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import replay_tables

    yield replay_tables
    del sys.modules["replay_tables"]


def test_each_run_is_named_once_and_has_a_recipe_that_says_what_its_row_says(tables: Any, tmp_path: Path) -> None:
    assert len({cell.name for cell in tables.CELLS}) == len(tables.CELLS) == 18
    for cell in tables.CELLS:
        keys = [
            *tables.PATIENT,
            *tables.COMMON,
            f"model.path={tables.NANO / 'policy'}",
            "model.init=random",
            f"run.dir={tmp_path}",
        ]
        recipe = load_recipe(tables.NANO / "grpo.yaml", [*keys, *cell.overrides])
        assert isinstance(recipe, GrpoRecipe)
        assert (recipe.grpo.steps, recipe.grpo.updates_per_step, recipe.seed) == (20, cell.updates, cell.seed)
        assert recipe.weights.precision == ("int8" if cell.sampler == "int8 grid" else "model")
        assert (recipe.grpo.routing_replay != "off") == cell.remedy.startswith("R")
        assert (recipe.grpo.correction.kind != "none") == (cell.remedy.split()[-1] in ("tis", "icepop", "geometric"))
        assert recipe.learner.freeze == (["router"] if cell.remedy == "frozen router" else [])


def test_a_command_goes_on_after_what_is_there(
    tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that fails is told of and tried again; what is there, of both tables, is kept."""
    corrections = {kind: [0.25, 0.5] for kind in tables.CORRECTIONS}
    numbers = {"mean": 0.01, "max": 0.5, "k3": 1e-4, "changed": 0.02}
    made: list[str] = []

    def judge(policy: ModelOptions, sampler: str, prompts: int, group_size: int) -> Any:
        made.append(sampler)
        return [{"sampler": sampler, "updates": 1, "way": "R3", **numbers, "corrections": corrections}]

    def run(stage: str, recipe: Path, directory: Path, keys: Any) -> bool:
        made.append(directory.name)
        return len(made) != 5

    monkeypatch.setattr(tables, "trained_policy", lambda out, tiny: out)
    monkeypatch.setattr(tables, "measure", judge)
    monkeypatch.setattr(tables, "align", run)
    row = numbers | {"cut": None, "size": None, "cv": 0.5, "reward": 0.7, "accuracy": [0.5, 0.4, 0.6]}
    monkeypatch.setattr(tables, "measured", lambda directory: row)
    command = ["--out", str(tmp_path)]
    assert tables.main(command) == 1
    failed = tables.CELLS[1].name
    assert capsys.readouterr().err == f"failed: {failed}\n"
    assert len(made) == 3 + 18
    assert tables.main(command) == 0
    assert len(made) == 3 + 18 + 1
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert "| bfloat16 | 1 | R3 | 1.0e-02 | 0.5 | 1.0e-04 | 2.00% |" in lines
    assert "| int8 grid | 1 | R3 | " + " | ".join(["25.00%, 0.500"] * 4) + " |" in lines
    assert sum("50.0% (40.0% to 60.0%)" in line for line in lines) == 18


def test_a_learner_agrees_with_its_own_samples_until_it_is_updated(tables: Any, policy: ModelOptions) -> None:
    """With replay the learner's own experts change nothing; the routers move with the updates, but for frozen ones."""
    mismatch = sys.modules["mismatch"]
    ids = np.random.default_rng(0).integers(5, 90, (6, 24))
    made = [TrainingSequence.of_completion(row.tolist(), 8, 0.01, advantage=(-1.0) ** n) for n, row in enumerate(ids)]
    first = mismatch.Learner(policy, "learner", [])
    drawn = [replace(s, sampler_log_probs=s.old_log_probs) for s in first.before_updates(made)]
    for way, replays in mismatch.WAYS.items():
        learner = mismatch.Learner(policy, replays, ["router"] if way == "frozen router" else [])
        before = learner.judge(learner.routed(drawn))
        assert before["max"] < 1e-5
        assert before["changed"] == 0
        assert before["corrections"]["tis"] == pytest.approx([0, 1], abs=1e-6)
        router = [p.detach().clone() for n, p in learner._module.named_parameters() if n.endswith("mlp.gate.weight")]
        learner.update(drawn)
        moved = [p for n, p in learner._module.named_parameters() if n.endswith("mlp.gate.weight")]
        assert any((a != b).any() for a, b in zip(router, moved, strict=True)) == (way != "frozen router")
        assert learner.judge(drawn)["mean"] > 1e-4
