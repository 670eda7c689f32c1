"""What a run knows of the files that its rewards are in: their content when it goes on, and the columns that they read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from align.data.types import Example
from align.errors import UserError
from align.recipe import PlannedStage, Recipe, load_recipe
from align.session.checks import check_columns, check_reward_models
from align.session.run import changes, open_run
from reward import RewardTerm

ROOT = Path(__file__).parents[3]


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    reward = f"rewards=[{{name: '{tmp_path / 'mine.py'}:f'}}]"
    base = [f"run.dir={tmp_path / 'run'}", "init_from=null", f"model.path={ROOT / 'recipes/nano/policy'}", reward]
    return load_recipe(ROOT / "recipes/nano/grpo.yaml", [*base, *overrides])


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The reward file of a run that was interrupted."""
    file = tmp_path / "mine.py"
    file.write_text("def f(sample): return 1\n")
    with pytest.raises(KeyboardInterrupt), open_run(recipe(tmp_path)):
        raise KeyboardInterrupt
    return file


def test_a_run_goes_on_with_the_reward_file_as_it_was(interrupted: Path, tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        assert not changes(run.directory, recipe(tmp_path))


def test_a_changed_reward_file_is_named_and_refused_unless_changes_are_allowed(
    interrupted: Path, tmp_path: Path
) -> None:
    interrupted.write_text("def f(sample): return 2\n")
    told = f"rewards (the content of {interrupted} has changed)"
    with pytest.raises(UserError) as refused, open_run(recipe(tmp_path)):
        pass
    assert told in str(refused.value)
    assert "run.allow_changes=true" in str(refused.value)
    with open_run(recipe(tmp_path, "run.allow_changes=true")):
        pass
    events = [json.loads(line)["message"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert f"going on with another recipe: {told}" in events


def test_files_that_a_reward_file_imports_from_beside_it_belong_to_it(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "__init__.py").write_text("from .metric import M\n")
    (tmp_path / "units" / "metric.py").write_text("M = 'm'\n")
    (tmp_path / "helpers.py").write_text("import json\nfrom units import M\n")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "mine.py").write_text(
        "def f(sample):\n    import helpers\n    from reward import Score\n    return 1\n"
    )
    with pytest.raises(KeyboardInterrupt), open_run(recipe(tmp_path)) as run:
        raise KeyboardInterrupt
    (tmp_path / "other.py").write_text("changed")
    assert changes(run.directory, recipe(tmp_path)) == []
    for name in ("helpers.py", "units/__init__.py", "units/metric.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    assert changes(run.directory, recipe(tmp_path)) == [
        f"rewards (the content of {tmp_path / name} has changed)"
        for name in ("helpers.py", "units/__init__.py", "units/metric.py")
    ]


def example(domain: str, **metadata: str) -> Example:
    return Example(f"{domain}/1", ({"role": "user", "content": "?"},), None, "3 m", domain, metadata=metadata)


def test_a_column_that_a_reward_reads_and_the_data_lack_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(completions, answer, unit, messages): return []\n")
    term = RewardTerm(name=f"{tmp_path / 'mine.py'}:f")
    check_columns([term], [example("a", unit="m"), example("a")])
    with pytest.raises(
        UserError, match=r"exact_answer reads the column 'answer', .* have, but without text or a number"
    ):
        check_columns([RewardTerm(name="exact_answer")], [replace(example("a", answer="yes"), answer=None)])
    with pytest.raises(UserError) as refused:
        check_columns([term], [example("a", unit="m"), example("b", units="m")])
    assert "rewards: f reads the column 'unit', which the data of the domain 'b' lack (such as b/1)" in str(
        refused.value
    )
    assert "their columns: answer, completion_tokens, ground_truth, messages, units" in str(refused.value)
    check_columns([term.model_copy(update={"domains": ["a"]})], [example("a", unit="m"), example("b")])


def test_a_reward_model_that_is_not_there_is_refused_before_the_stages_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def f(sample): return 1\n")

    def stage(path: Path | str) -> PlannedStage:
        made = recipe(tmp_path, f"rewards=[{{name: reward_model, label: helpful, params: {{path: '{path}'}}}}]")
        return PlannedStage("grpo", Path("mine.yaml"), [], made)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_reward_models([stage(tmp_path), stage("someone/reward-model")])
    with pytest.raises(UserError, match=r"mine\.yaml: rewards: helpful: .*/rmm/final does not exist"):
        check_reward_models([stage(tmp_path / "rmm" / "final")])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_reward_models([stage(tmp_path / "rmm" / "final")])
