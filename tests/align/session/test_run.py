"""What the console says of evaluations: a line of bounded width for each, and a table of the run's."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from align.errors import UserError
from align.evaluate.accuracy import Evaluation
from align.recipe import Recipe, load_recipe
from align.session.run import compare_stages, describe, open_run, own_directory

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
