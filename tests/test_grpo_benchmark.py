"""The benchmark of a GRPO step takes its time from the steps alone."""

import sys
from pathlib import Path

import pytest

from align.run import MetricsLog, RunDirectory


def test_the_ends_of_steps_are_noted_and_those_of_evaluations_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import sides

    log = MetricsLog(RunDirectory.create(tmp_path / "run"))
    with sides.noted_steps() as ends:
        for metrics in ({"evaluation/accuracy": 0.5}, {"step_seconds": 1.0}, {"step_seconds": 2.0}):
            log.write(0, "grpo", metrics)
    log.close()
    del sys.modules["sides"]
    assert len(ends) == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
