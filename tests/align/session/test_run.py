"""What the console says of evaluations: a line of bounded width for each, and a table of the run's."""

from dataclasses import replace

import pytest

from align.evaluate.accuracy import Evaluation
from align.session.run import compare_stages, describe

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
